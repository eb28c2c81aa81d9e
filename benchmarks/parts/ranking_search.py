"""Which importance an EKG search should rank channels by: `taylor`, the paper's, or others, on small networks.

    python benchmarks/ranking.py search resnet20 --images cifar10:DIR --weights resnet20-cifar10.safetensors \
        --output benchmarks/results/search_importance.jsonl
    python benchmarks/ranking.py search digits --images digits --output benchmarks/results/search_importance.jsonl

`digits` is the network of `ekgfx.models.digits_cnn`, `inverted` a small one of inverted residuals for the same images;
both are trained first (20 epochs, seed 0), which takes seconds. The search sees `--count` training images with their
labels, drawn by the seed; BatchNorm and the repair see the same. Accuracy and loss are of the first test images, before
any training: with BatchNorm's averages corrected, and repaired. A line of the output is one network; one that is there
is not measured again.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Lines, chosen, environment
from parts import ranking_cut
from torch import nn

import ekgfx
from ekgfx import data as datasets
from ekgfx.models import digits_cnn, resnet20_cifar
from ekgfx.surgery.calibrate import calibrate
from ekgfx.training.evaluation import evaluate

NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "digits": (digits_cnn, "digits"),
    "inverted": (lambda: ranking_cut.network("digits"), "digits"),
    "resnet20": (resnet20_cifar, "resnet20"),
}
"""Network, and the images that it is for."""


class Subject:
    """A network, the images that are looked at, and those that a cut network is judged by."""

    def __init__(self, asked: argparse.Namespace, seed: int) -> None:
        build, images = NETWORKS[asked.network]
        mean, std = ranking_cut.NORMAL[images]
        self.asked, self.seed = asked, seed
        self.data = datasets.load(asked.images, mean=mean, std=std, seed=0, classes=10)
        model = ranking_cut.trained(build, self.data, asked.weights)
        self.traced = ekgfx.trace(model, torch.zeros(ranking_cut.size_of(images)))
        order = torch.randperm(self.data.size("train"), generator=torch.Generator().manual_seed(seed))
        loader = self.data.loader("train", 64, subset=order[: asked.count])
        self.batches = [(batch.images, batch.labels) for batch in loader]

    def score(self, network: nn.Module) -> dict[str, float | None]:
        most = min(self.asked.test_images, self.data.size("test"))
        found = evaluate(network.eval(), self.data.loader("test", 500, subset=torch.arange(most)))
        return {"accuracy": found.accuracy, "loss": found.loss}

    def measure(self, importance: str) -> dict[str, Any]:
        started = time.process_time()
        result = ekgfx.search(
            self.traced,
            self.batches,
            flops=self.asked.keep,
            importance=importance,
            accept=self.asked.accept,
            seed=self.seed,
        )
        seconds = time.process_time() - started
        cut, repaired = (ekgfx.prune(self.traced.model, result.plan, self.traced).eval() for _ in range(2))
        calibrate(cut, self.batches, traced=self.traced)
        ekgfx.repair(repaired, self.traced, result.plan, [images for images, _ in self.batches], seed=self.seed)
        return {
            "kept": self.traced.cost(result.plan).macs / self.traced.cost().macs,
            "steps": len(result.steps),
            "search_seconds": round(seconds, 1),
            "cut": self.score(cut),
            "repaired": self.score(repaired),
        }


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    subject, lines = functools.cache(lambda seed: Subject(asked, seed)), Lines(asked.output)
    for seed in asked.seeds:
        for importance in asked.importance:
            key = {**chosen(asked, "network", "keep", "count", "accept", "test_images"), "seed": seed}
            key["importance"] = importance
            if key not in lines:
                lines.add({**key, **subject(seed).measure(importance), **environment()})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--images", required=True, help="data SPEC")
    parser.add_argument("--weights", help="none: it is trained first")
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument(
        "--importance", nargs="+", default=["taylor", "taylor-per-sample", "least-squares", "magnitude"]
    )
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--accept", type=int, default=1, help="candidates that a step takes together")
    parser.add_argument("--count", type=int, default=200, help="images to search and repair on")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
