"""What it saves to keep freed memory, as the command line does: forward passes in processes of their own, in turn.

    python benchmarks/analysis.py freed resnet50 vit_small_patch16_224 --output benchmarks/results/freed_memory.json

One thread; CPU seconds of the program and of the system, pages mapped, and the highest resident memory, with and
without `ekgfx.base.memory.keep_freed_memory`; the median of the rounds.
"""

import argparse
import resource
import statistics
from typing import Any

import timm
import torch
from common import Sheet, apart, chosen, in_turn

from ekgfx.base.memory import keep_freed_memory

WAYS = ("as it comes", "kept")


def forward(name: str, way: str, batch: int, passes: int) -> dict[str, float]:
    """Seconds, pages and MiB of some forward passes after a first one."""
    torch.set_num_threads(1)
    if way == "kept" and not keep_freed_memory():
        raise RuntimeError("this C library, or the environment, manages memory otherwise")
    model = timm.create_model(name).eval()
    x = torch.randn(batch, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        model(x)
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(passes):
            model(x)
        after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "program": round(after.ru_utime - before.ru_utime, 2),
        "system": round(after.ru_stime - before.ru_stime, 2),
        "pages": after.ru_minflt - before.ru_minflt,
        "peak_mib": after.ru_maxrss >> 10,
    }


def main(asked: argparse.Namespace) -> None:
    found = Sheet(asked.output, chosen(asked, "batch", "passes", "rounds"))
    for name in asked.models:
        rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _, way in in_turn(WAYS, asked.rounds):
            rows[way].append(apart(forward, name, way, asked.batch, asked.passes))
        medians: dict[str, Any] = {
            way: {key: statistics.median(row[key] for row in each) for key in each[0]} for way, each in rows.items()
        }
        found.keep(**{name: medians})
        print(name, medians, flush=True)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", help="timm names")
    parser.add_argument("--output", required=True, help="JSON")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
