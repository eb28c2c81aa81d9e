"""What a search to several budgets costs, beside one to the tightest alone.

    python benchmarks/search.py budgets --data cifar10:cifar10 --weights resnet20-cifar10.safetensors \
        --output benchmarks/results/search_budgets.jsonl

A ResNet of CIFAR's kind, judged on `--images` training images drawn with the seed. Both searches are made in each of
`--rounds`, in turn; their times are CPU seconds of one thread. In the first round each plan is compared with that of a
search to its budget alone. One JSON line a search; the last line printed compares the medians.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import Lines, chosen, environment, in_turn

import ekgfx
from ekgfx.data import load
from ekgfx.models import source
from ekgfx.models.weights import load_weights
from ekgfx.search import SearchResult


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    lines, asks = Lines(asked.output), chosen(asked, "network", "images", "accept", "budgets", "seed")
    tightest = min(asked.budgets)
    ways: dict[str, Any] = {"tightest": tightest, "all": tuple(asked.budgets)}
    data, built = load(asked.data), source.parse(f"ekgfx.models:{asked.network}_cifar", "none").build()
    load_weights(built.model, Path(asked.weights))
    traced = ekgfx.trace(built.model.eval(), torch.randn(2, 3, 32, 32))
    order = torch.randperm(data.size("train"), generator=torch.Generator().manual_seed(asked.seed))
    seen = [(batch.images, batch.labels) for batch in data.loader("train", 160, subset=order[: asked.images])]

    def search(flops: Any) -> SearchResult:
        return ekgfx.search(traced, seen, flops=flops, accept=asked.accept, seed=asked.seed)

    for turn, way in in_turn(list(ways), asked.rounds):
        key = {**asks, "way": way, "round": turn}
        if key in lines:
            continue
        began = time.process_time()
        found = search(ways[way])
        seconds = time.process_time() - began
        row = {**key, "steps": len(found.steps), "cpu_seconds": seconds}
        if found.points and turn == 0:
            pairs = [(found.at(**point.asked), search(point.asked["flops"])) for point in found.points]
            row["same_as_alone"] = [one.plan == other.plan for one, other in pairs]
        lines.add({**row, **environment()})
    ratios = [
        statistics.median(line["cpu_seconds"] for line in lines if line.items() >= {**asks, "way": way}.items())
        for way in ("all", "tightest")
    ]
    print(f"{ratios[0] / ratios[1]:.2f} times as long as a search to {tightest} alone")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="data SPEC")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--network", default="resnet20", choices=["resnet20", "resnet56"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.75, 0.55, 0.4])
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--accept", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
