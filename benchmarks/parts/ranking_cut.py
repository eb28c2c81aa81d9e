"""Which channels a cut should keep: importance criteria side by side, before and after the repair, on few images.

    python benchmarks/ranking.py cut digits --train 30 --images digits --weights inverted-digits.pt
    python benchmarks/ranking.py cut digits --images digits --weights inverted-digits.pt \
        --output benchmarks/results/ranking.jsonl
    python benchmarks/ranking.py cut resnet20 --images cifar10:DIR --weights resnet20-cifar10.safetensors \
        --output benchmarks/results/ranking.jsonl

`cifar10` and `digits` are small networks of inverted residuals as in MobileNetV2, that `--train EPOCHS` trains;
`resnet20` has published weights and no depthwise convolution.

Criterion, BatchNorm and repair see the same training images (`--count`), drawn by the seed; accuracy is that of the
first 2,000 test images. A line of the output is one cut network; one that is there is not measured again. `--oracle N`
measures the criteria against the truth instead: the rank correlation, within each group, with what the removal of one
channel does to the outputs on 200 test images (KL divergence), for N groups.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Lines, environment
from parts import ranking_criteria
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx import data as datasets
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.plan import Plan
from ekgfx.models import resnet20_cifar
from ekgfx.models.weights import load_weights
from ekgfx.search import IMPORTANCE, find_budget, global_, uniform
from ekgfx.search.importance import Criterion, Scores
from ekgfx.search.problem import Problem, width_rules
from ekgfx.search.recorder import Recorder
from ekgfx.search.result import apply_step
from ekgfx.search.reward import Objective, validation_batches
from ekgfx.surgery.calibrate import calibrate
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.evaluation import evaluate

NORMAL = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "digits": ((0.305,), (0.376,)),
    "resnet20": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
BLOCKS = {
    "cifar10": (24, ((32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1)), 256),
    "digits": (16, ((16, 1), (24, 2), (24, 1), (24, 1), (32, 2), (32, 1)), 128),
}
"""Channels of the stem; channels and stride of the inverted residuals; channels of the last convolution."""
STRATEGIES = {"uniform": uniform.run, "global": global_.run}
BEFORE = "taylor, before depthwise"
CRITERIA: dict[str, Criterion] = {
    BEFORE: IMPORTANCE["taylor"],
    "taylor": IMPORTANCE["taylor"],
    "taylor-per-sample": IMPORTANCE["taylor-per-sample"],
    "squares per sample": ranking_criteria.squares,
    "magnitude": IMPORTANCE["magnitude"],
    "L2": ranking_criteria.l2,
    "bn-scale": IMPORTANCE["bn-scale"],
    "least-squares": IMPORTANCE["least-squares"],
    "random": IMPORTANCE["random"],
}


def network(name: str) -> nn.Module:
    """Images of CIFAR-10 are halved by the stem."""
    if name == "resnet20":
        return resnet20_cifar()
    width, blocks, last = BLOCKS[name]
    stem = nn.Conv2d(len(NORMAL[name][0]), width, 3, 2 if name == "cifar10" else 1, 1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU6()]
    for out, stride in blocks:
        layers.append(InvertedResidual(width, out, stride=stride, exp_ratio=4.0, act_layer=nn.ReLU6))
        width = out
    head = (nn.Conv2d(width, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6())
    return nn.Sequential(*layers, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


def data_of(asked: argparse.Namespace, seed: int) -> datasets.Data:
    mean, std = NORMAL[asked.network]
    return datasets.load(asked.images, mean=mean, std=std, seed=seed, classes=10)


def trained(build: Callable[[], nn.Module], data: datasets.Data, weights: str | None) -> nn.Module:
    """A network with its weights, or trained on the data for 20 epochs, seed 0."""
    torch.manual_seed(0)
    model = build()
    if weights:
        load_weights(model, Path(weights))
    else:
        ekgfx.finetune(model, data, epochs=20, lr=0.1, batch_size=64, schedule="cosine", seed=0, val_fraction=0)
    return model.eval()


def size_of(network: str) -> tuple[int, int, int, int]:
    return (2, 1, 8, 8) if network == "digits" else (2, 3, 32, 32)


class Subject:
    """A network, the images that are looked at, and what a cut network is judged by."""

    def __init__(self, asked: argparse.Namespace, seed: int) -> None:
        self.asked, self.seed = asked, seed
        self.data = data_of(asked, seed)
        model = network(asked.network)
        load_weights(model, Path(asked.weights))
        self.traced = ekgfx.trace(model.eval(), torch.zeros(size_of(asked.network)))
        order = torch.randperm(self.data.size("train"), generator=torch.Generator().manual_seed(seed))
        loader = self.data.loader("train", asked.count, subset=order[: asked.count])
        self.batches = [(batch.images, batch.labels) for batch in loader]
        self.images = [images for images, _ in self.batches]
        self.scores = functools.cache(self._scores)

    def score(self, model: nn.Module) -> float | None:
        """Accuracy on the test images."""
        test = self.data.loader("test", 500, subset=torch.arange(min(self.asked.test_images, self.data.size("test"))))
        return evaluate(model, test).accuracy

    def problem(self, keep: float) -> Problem:
        """As `ekgfx.search` poses it."""
        return Problem(
            traced=self.traced,
            batches=validation_batches(self.batches),
            objective=Objective(),
            budget=find_budget(self.traced, flops=keep),
            rules=width_rules(self.traced, frozenset(), 1, 0.0),
            guided=False,
            ensemble=False,
            rescale=True,
            seed=self.seed,
        )

    def _scores(self, criterion: str) -> Scores:
        problem = self.problem(0.5)
        with read_before_depthwise(self.traced) if criterion == BEFORE else still():
            return CRITERIA[criterion](problem, problem.full(), None)

    def plan(self, criterion: str, strategy: str, keep: float) -> Plan:
        problem = self.problem(keep)
        recorder = Recorder(replace(problem, batches=()), None)
        STRATEGIES[strategy](recorder.problem, lambda *_: self.scores(criterion), recorder)
        sizes = {name: group.size for name, group in self.traced.groups.items()}
        return apply_step(problem.full(), recorder.steps[0], sizes)


@contextmanager
def still() -> Iterator[None]:
    yield


@contextmanager
def read_before_depthwise(traced: TracedModel) -> Iterator[None]:
    """Groups whose activations are read where they were read at first: as soon as a convolution comes, of any kind."""
    groups = dict(traced.groups._groups)
    for name, group in groups.items():
        traced.groups._groups[name] = replace(group, gates=ranking_criteria.early_gates(traced, group))
    try:
        yield
    finally:
        traced.groups._groups.update(groups)


def measure(subject: Subject, plan: Plan) -> dict[str, Any]:
    """One cut network: as it was cut, with BatchNorm re-estimated, and repaired."""
    traced = subject.traced
    cut = ekgfx.prune(traced.model, plan, traced).eval()
    cost = traced.cost(plan)
    row: dict[str, Any] = {"macs_kept": cost.macs / traced.cost().macs, "cut": subject.score(cut)}
    calibrate(cut, subject.images)
    row["reestimated"] = subject.score(cut)
    pruned = ekgfx.prune(traced.model, plan, traced).eval()
    found = ekgfx.repair(pruned, traced, plan, subject.images, most=subject.asked.count, seed=subject.seed)
    return row | {"repaired": subject.score(pruned), "kl": [found.before.error, found.after.error]}


def oracle(subject: Subject, count: int, channels: int = 16) -> Iterator[dict[str, Any]]:
    """For `count` groups evenly spread over the network: how well each criterion ranks its channels."""
    traced = subject.traced
    groups = list(traced.groups.values())
    (batch,) = subject.data.loader("test", 200, subset=torch.arange(200))
    with torch.no_grad():
        dense = SubNetwork(traced, {}, batch_stats=True)(batch.images).log_softmax(1)
        for at in torch.linspace(0, len(groups) - 1, count).round().long().unique().tolist():
            group = groups[at]
            drawn = torch.randperm(group.size, generator=torch.Generator().manual_seed(subject.seed))[:channels]
            truth = []
            for channel in drawn.tolist():
                kept = traced.groups.kept(Plan().with_kept(group.name, sorted({*range(group.size)} - {channel})))
                out = SubNetwork(traced, kept, batch_stats=True)(batch.images).log_softmax(1)
                truth.append(float(F.kl_div(out, dense, reduction="batchmean", log_target=True)))
            with torch.enable_grad():
                found = {name: subject.scores(name)[group.name][drawn] for name in subject.asked.criteria}
            yield {
                "group": group.name,
                "kind": ranking_criteria.kind(traced, group),
                "channels": len(drawn),
                "median_kl": float(torch.tensor(truth).median()),
                "median_score": {k: float(v.median()) for k, v in found.items()},
                "rank_correlation": {k: round(spearman(v, torch.tensor(truth)), 3) for k, v in found.items()},
            }


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([each.argsort().argsort().double() for each in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def train(asked: argparse.Namespace) -> None:
    """Trains the network from scratch; goes on where it stopped."""
    torch.manual_seed(0)
    model, data = network(asked.network), data_of(asked, 0)
    ekgfx.finetune(
        model,
        data,
        epochs=asked.train,
        batch_size=128 if asked.network == "cifar10" else 64,
        lr=0.1,
        weight_decay=5e-4,
        schedule="cosine",
        warmup=1,
        channels_last=True,
        augment=asked.network == "cifar10",
        test=data.loader("test", 500),
        checkpoint=f"{asked.weights}.training",
        on_epoch=lambda epoch: print(epoch, flush=True),
    )
    torch.save(model.state_dict(), asked.weights)


def rows_of(asked: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What is asked for: each row's key, and what measures the rest of it. Budgets and seeds outermost: what is
    compared is measured side by side."""
    subject = functools.cache(lambda seed: Subject(asked, seed))
    for seed in asked.seeds:
        yield (
            {"network": asked.network, "plan": "unpruned", "seed": seed},
            lambda seed=seed: {"accuracy": subject(seed).score(subject(seed).traced.model)},
        )
        for keep in asked.keep:
            for strategy in asked.strategies:
                for name in asked.criteria:
                    key = {"network": asked.network, "plan": name, "strategy": strategy, "keep": keep, "seed": seed}
                    key["count"] = asked.count

                    def found(name: str = name, strategy: str = strategy, keep: float = keep, seed: int = seed) -> Any:
                        return measure(subject(seed), subject(seed).plan(name, strategy, keep))

                    yield key, found


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if asked.train:
        return train(asked)
    here, lines = environment(), Lines(asked.output)
    if asked.oracle:
        for seed in asked.seeds:
            for row in oracle(Subject(asked, seed), asked.oracle):
                lines.add({"network": asked.network, "oracle": True, "seed": seed, **row, **here})
        return None
    for key, found in rows_of(asked):
        if key not in lines:
            started = time.process_time()
            row = key | found()
            lines.add(row | {"cpu_seconds": round(time.process_time() - started, 1), **here})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", choices=list(NORMAL))
    parser.add_argument("--images", required=True, help="data SPEC")
    parser.add_argument("--weights", required=True, help="with --train: the file to write")
    parser.add_argument("--output", help="JSON lines")
    parser.add_argument("--criteria", type=lambda text: text.split(";"), default=list(CRITERIA))
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--oracle", type=int, default=0, metavar="GROUPS")
    parser.add_argument("--train", type=int, default=0, metavar="EPOCHS")
