"""What the repair changes for those who train, choose or search afterwards: three questions, on small networks.

    python benchmarks/repair.py questions finetune resnet20 --images cifar10:DIR \
        --weights resnet20-cifar10.safetensors --output benchmarks/results/repair_questions.jsonl
    python benchmarks/repair.py questions finetune resnet56 --images cifar10:DIR --weights weights_pretrained.npz \
        --history benchmarks/results/repair_resnet56.history.jsonl --keep 0.45 --count 500 --train-images 2500 \
        --test-images 5000 --epochs 0 1 4 10 --output benchmarks/results/repair_questions.jsonl
    python benchmarks/repair.py questions potential digits --images digits --train-images 800 \
        --output benchmarks/results/repair_questions.jsonl
    python benchmarks/repair.py questions polish digits --images digits --train-images 800 \
        --output benchmarks/results/repair_questions.jsonl

finetune: from the repaired network or from the one with BatchNorm's averages corrected, same plan (L1, uniform; or that
of a search, by its `--history`), images and epochs. potential: sub-networks of equal MACs with random widths; what
tells before training which will be good after it? polish: from EKG's plan, a step of width goes from one group to
another and is kept where the cost is within the budget and the network better, which is judged repaired, or with its
averages corrected, by the KL divergence from the unpruned network on training images that neither the repair nor the
search saw.

The network for digits is trained first (20 epochs, seed 0), which takes a few seconds. A line of the output is one
network; one that is there is not measured again.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Lines, chosen, environment
from parts import ranking_cut
from plans import from_history
from torch import nn

import ekgfx
from ekgfx import data as datasets
from ekgfx.data.batches import Inputs
from ekgfx.graph.plan import Plan
from ekgfx.models import digits_cnn, resnet20_cifar, resnet56_cifar_projection
from ekgfx.repair.judge import Judge
from ekgfx.search.candidates import important_first
from ekgfx.search.importance_peers import magnitude
from ekgfx.search.problem import Budget, Problem, width_rules
from ekgfx.search.reward import Objective, validation_batches
from ekgfx.surgery.calibrate import calibrate
from ekgfx.training.evaluation import evaluate

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "digits": (digits_cnn, (2, 1, 8, 8), 0.05),
    "resnet20": (resnet20_cifar, (2, 3, 32, 32), 0.02),
    "resnet56": (resnet56_cifar_projection, (2, 3, 32, 32), 0.002),
}
"""Network, its input, the learning rate that it is fine-tuned with."""


class Subject:
    """A network, its data, and three disjoint parts of the training images: to repair on (`--count`), to judge by (as
    many), and to train on (`--train-images`)."""

    def __init__(self, asked: argparse.Namespace, seed: int) -> None:
        build, shape, self.rate = NETWORKS[asked.network]
        self.asked, self.seed = asked, seed
        normal: Any = build().pretrained_cfg
        self.data = datasets.load(asked.images, mean=normal["mean"], std=normal["std"], seed=seed, classes=10)
        model = ranking_cut.trained(build, self.data, asked.weights)
        self.traced = ekgfx.trace(model, torch.zeros(shape))
        order = torch.randperm(self.data.size("train"), generator=torch.Generator().manual_seed(seed))
        self.train = order[2 * asked.count :][: asked.train_images]
        self.images, self.fresh = (
            [(batch.images, batch.labels) for batch in self.data.loader("train", 64, subset=part)]
            for part in order[: 2 * asked.count].split(asked.count)
        )
        with torch.no_grad():
            self.judge = Judge(self.traced.model, [Inputs.of(images) for images, _ in self.fresh])
        self.problem = Problem(
            traced=self.traced,
            batches=validation_batches(self.images),
            objective=Objective(),
            budget=Budget.of(lambda plan: self.traced.cost(plan).macs, asked.keep, "MACs"),
            rules=width_rules(self.traced, frozenset(), 1, 0.0),
            guided=False,
            ensemble=False,
            rescale=True,
            seed=seed,
        )
        self.scores = magnitude(self.problem, self.problem.full(), None)

    def cut(self, plan: Plan, repaired: bool) -> nn.Module:
        """The network of a plan, repaired or with BatchNorm's averages corrected."""
        pruned = ekgfx.prune(self.traced.model, plan, self.traced).eval()
        if repaired:
            ekgfx.repair(pruned, self.traced, plan, [images for images, _ in self.images], seed=self.seed)
        else:
            calibrate(pruned, self.images, traced=self.traced)
        return pruned

    def divergence(self, plan: Plan, repaired: bool) -> float:
        """KL on fresh images; infinite where it is no number."""
        error = self.judge(self.cut(plan, repaired)).error
        return float("inf") if error is None else error

    def test(self, network: nn.Module) -> dict[str, float | None]:
        most = min(self.asked.test_images, self.data.size("test"))
        found = evaluate(network.eval(), self.data.loader("test", 500, subset=torch.arange(most)))
        return {"accuracy": found.accuracy, "loss": found.loss}

    def tune(self, network: nn.Module, epochs: int) -> nn.Module:
        """Trains on labels, where there are epochs."""
        if epochs:
            ekgfx.finetune(
                network,
                self.data,
                subset=self.train,
                epochs=epochs,
                lr=self.rate,
                batch_size=64,
                schedule="cosine",
                channels_last=True,
                seed=self.seed,
                val_fraction=0,
            )
        return network

    def of_widths(self, widths: dict[str, int]) -> Plan:
        """The channels of the largest L1 norm."""
        plan = self.problem.full()
        for name, width in widths.items():
            order = important_first(range(self.traced.groups[name].size), self.scores[name])
            plan = plan.with_kept(name, order[:width])
        return plan


Rows = Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]
"""What tells a line from others, and what measures the rest of it."""


def finetune(asked: argparse.Namespace) -> Rows:
    subject = functools.cache(lambda seed: Subject(asked, seed))

    @functools.cache
    def plan(seed: int) -> Plan:
        if asked.history:
            return from_history(subject(seed).traced, Path(asked.history), asked.keep)
        return ekgfx.search(subject(seed).traced, flops=asked.keep, strategy="uniform", importance="magnitude").plan

    def measure(seed: int, repaired: bool, epochs: int) -> dict[str, Any]:
        return subject(seed).test(subject(seed).tune(subject(seed).cut(plan(seed), repaired), epochs))

    for seed in asked.seeds:
        for epochs in asked.epochs:
            for repaired in (False, True):
                yield (
                    {"epochs": epochs, "repaired": repaired, "seed": seed},
                    lambda a=(seed, repaired, epochs): measure(*a),
                )


def potential(asked: argparse.Namespace) -> Rows:
    (seed,) = asked.seeds[:1]
    subject = functools.cache(lambda: Subject(asked, seed))

    def measure(number: int) -> dict[str, Any]:
        it, draw = subject(), np.random.default_rng([seed, number])
        drawn = {name: draw.uniform(0.2, 1.0) for name in it.problem.rules}

        def at(scale: float) -> Plan:
            sizes = {name: it.traced.groups[name].size for name in drawn}
            return it.of_widths({n: max(1, round(min(1.0, scale * drawn[n]) * sizes[n])) for n in drawn})

        low, high = 0.0, 5.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if it.problem.budget.met(at(middle)) else (low, middle)
        plan = at(low)
        row: dict[str, Any] = {"kept": it.problem.budget.fraction(plan)}
        for name, repaired in (("reestimated", False), ("repaired", True)):
            network = it.cut(plan, repaired)
            found = evaluate(network, ((images, labels) for images, labels in it.fresh))
            row[name] = {"loss": found.loss, "kl": it.judge(network).error}
            it.tune(network, asked.epochs[-1])
            row[name]["potential"] = it.test(network)["loss"]
        return row

    for number in range(asked.subnetworks):
        yield {"number": number, "epochs": asked.epochs[-1], "seed": seed}, functools.partial(measure, number)


def polish(asked: argparse.Namespace) -> Rows:
    subject = functools.cache(lambda seed: Subject(asked, seed))

    @functools.cache
    def by_ekg(seed: int) -> Plan:
        it = subject(seed)
        return ekgfx.search(it.traced, it.images, flops=asked.keep, seed=seed, rescale=False).plan

    def polished(seed: int, repaired: bool) -> tuple[Plan, dict[str, Any]]:
        """Draws a group to shrink and one to grow, a tenth of their channels, for as long as `--seconds` last."""
        it, plan, draw = subject(seed), by_ekg(seed), np.random.default_rng([seed, 7])
        started, trials, taken = time.process_time(), 0, 0
        best = it.divergence(plan, repaired)
        while time.process_time() - started < asked.seconds:
            less, more = draw.choice(list(it.problem.rules), 2, replace=False)
            new = moved(it, moved(it, plan, str(less), -1), str(more), 1)
            if new == plan or not it.problem.budget.met(new):
                continue
            trials += 1
            found = it.divergence(new, repaired)
            if found < best:
                best, plan, taken = found, new, taken + 1
        return plan, {"trials": trials, "taken": taken}

    ways: dict[str, Callable[[int], tuple[Plan, dict[str, Any]]]] = {
        "EKG": lambda seed: (by_ekg(seed), {}),
        "EKG, polished, repaired": lambda seed: polished(seed, True),
        "EKG, polished, not repaired": lambda seed: polished(seed, False),
    }

    def measure(way: str, seed: int) -> dict[str, Any]:
        by_ekg(seed) if way.startswith("EKG,") else None  # its time is its own line's
        started = time.process_time()
        plan, facts = ways[way](seed)
        seconds, it = time.process_time() - started, subject(seed)
        network = it.cut(plan, True)
        row = {**facts, "kept": it.problem.budget.fraction(plan), "search_seconds": round(seconds, 1)}
        row |= {"kl": it.judge(network).error, "after_repair": it.test(network)}
        return row | {"after_training": it.test(it.tune(network, asked.epochs[-1]))}

    for seed in asked.seeds:
        for way in ways:
            key = {"way": way, "epochs": asked.epochs[-1], "seconds": asked.seconds, "seed": seed}
            yield key, functools.partial(measure, way, seed)


def moved(subject: Subject, plan: Plan, name: str, way: int, share: float = 0.1) -> Plan:
    """The plan with a group wider or narrower by a share of its channels (one at least): by L1, of those that are kept
    the least goes, of those that are gone the most comes back."""
    size = subject.traced.groups[name].size
    kept = list(plan.kept.get(name, range(size)))
    gone = [channel for channel in range(size) if channel not in kept]
    some = max(1, round(share * size))
    if way > 0:
        kept += important_first(gone, subject.scores[name])[:some]
    else:
        kept = important_first(kept, subject.scores[name])[: max(1, len(kept) - some)]
    return plan.with_kept(name, sorted(kept))


def spearman(lines: list[dict[str, Any]], before: str, what: str, after: str) -> tuple[float, ...]:
    """Rank correlation of a figure before training with the loss after it, and its 95% interval by bootstrap (2,000
    resamples)."""
    values = np.array([[line[before][what], line[after]["potential"]] for line in lines])

    def rank(part: Any) -> float:
        ranks = np.array([[(column < v).mean() + (column <= v).mean() for v in column] for column in part.T])
        return float(np.corrcoef(ranks)[0, 1])

    draw = np.random.default_rng(0)
    found = [rank(values[draw.integers(0, len(values), len(values))]) for _ in range(2_000)]
    return rank(values), *np.nanpercentile(found, [2.5, 97.5]).tolist()


QUESTIONS = {"finetune": finetune, "potential": potential, "polish": polish}


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    lines = Lines(asked.output)
    kept = ("question", "network", "keep", "count", "train_images", "test_images")
    for key, measure in QUESTIONS[asked.question](asked):
        key = {**chosen(asked, *kept), **key}
        if key not in lines:
            started = time.process_time()
            row = {**key, **measure()}
            lines.add({**row, "cpu_seconds": round(time.process_time() - started, 1), **environment()})
    if asked.question == "potential":
        found = [line for line in lines if line.items() >= chosen(asked, *kept).items()]
        for after in ("reestimated", "repaired"):
            for before in ("reestimated", "repaired"):
                for what in ("loss", "kl"):
                    print(f"{before} {what} → {after}:", spearman(found, before, what, after))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--images", required=True, help="data SPEC")
    parser.add_argument("--weights", help="none: it is trained first")
    parser.add_argument("--history", help="finetune: steps of a search, as JSON lines  [default: L1, uniform]")
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--count", type=int, default=200, help="images to repair on")
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--subnetworks", type=int, default=36)
    parser.add_argument("--seconds", type=float, default=60, help="CPU time of a polish")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
