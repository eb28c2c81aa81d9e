"""What tells how good a sub-network becomes? Four things that are known before the training, compared.

    python benchmarks/landscape_study.py ekgfx.models:resnet20_cifar --weights resnet20-cifar10.safetensors \
        --data cifar10:DIR --output benchmarks/results/landscape_resnet20.jsonl
    python benchmarks/landscape_study.py … --figure docs/landscape_resnet20.png      # draws what is there already

Draws sub-networks of equal cost: widths at random, scaled until `--keep` of the MACs are left, the channels of least L1
norm gone. Each is a line of the output, independent of the others and the same for the same seed; a line that is there
is not measured again, and the search for the knowledge goes on after its last step. Of each, before any training:

    validation    CE on validation images, batch statistics: what a search without knowledge minimizes
    reward        CE + CE to the ensemble knowledge (eq. 4) of an EKG search to the same budget: what EKG minimizes
    condition     |λ_min / λ_max| of the Hessian of the loss on those images, by Lanczos (see `ekgfx.landscape`)
    repaired      CE on those images after the repair, which sees `--repair-images` of the training images

and, after `--epochs` of training on other images, without knowledge:

    potential            CE on test images, trained from the cut network, its BatchNorms' averages corrected
    potential_repaired   the same, trained from the repaired network

At the end: Spearman's rank correlation of each of the four with both, with a 95% interval by bootstrap over
sub-networks (10,000 resamples). The paper gives 0.32 for validation and 0.73 for condition (ResNet-56).
"""

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Lines, environment
from scipy.stats import rankdata, spearmanr
from torch import nn

import ekgfx
from ekgfx import landscape
from ekgfx.base.files import append_line, read_lines
from ekgfx.data import Data
from ekgfx.graph.plan import Plan
from ekgfx.models import source
from ekgfx.pipeline import job
from ekgfx.search.candidates import important_first
from ekgfx.search.importance_peers import magnitude
from ekgfx.search.problem import Budget, Problem, width_rules
from ekgfx.search.reward import Objective, assess, validation_batches
from ekgfx.surgery.calibrate import calibrate
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.evaluation import Metrics, evaluate

PREDICTORS = {
    "validation": "validation loss",
    "reward": "EKG's reward (negative)",
    "condition": "|λ_min / λ_max|",
    "repaired": "loss after the repair",
}
POTENTIALS = {"potential": "cut network", "potential_repaired": "repaired network"}
"""What is predicted, and what the training began with."""
RESAMPLES = 10_000
NOT_SETTINGS = ("output", "figure", "subnetworks", "threads")


@dataclass(frozen=True)
class Study:
    """What all sub-networks share: the traced model, its data, validation batches, the indices to train on, and the
    ensemble knowledge T per batch."""

    asked: argparse.Namespace
    traced: TracedModel
    data: Data
    problem: Problem
    train: torch.Tensor
    knowledge: tuple[torch.Tensor, ...]

    def plan(self, number: int) -> Plan:
        """The widths of sub-network `number`, at random, and the largest multiple of them within the budget."""
        draw = np.random.default_rng([self.asked.seed, number])
        drawn = {name: draw.uniform(self.asked.narrowest, 1.0) for name in self.problem.rules}
        scores = magnitude(self.problem, self.problem.full(), None)

        def at(scale: float) -> Plan:
            plan = self.problem.full()
            for name, rule in self.problem.rules.items():
                order = important_first(range(rule.size), scores[name])
                plan = plan.with_kept(name, order[: rule.kept(min(scale * drawn[name], 1.0))])
            return plan

        return at(bisect(lambda scale: self.problem.budget.met(at(scale)), 0.0, 1.0 / self.asked.narrowest))

    def measure(self, number: int) -> dict[str, Any]:
        """What is known of a sub-network before the training, and how good it becomes."""
        asked, plan = self.asked, self.plan(number)
        clock = [time.process_time()]
        batches, objective = self.problem.batches, self.problem.objective
        before, _ = assess(self.problem.network(plan), batches, objective, self.knowledge)
        pruned = ekgfx.prune(self.traced.model, plan, self.traced)
        repaired = copy.deepcopy(pruned)
        calibrate(pruned, self.data.loader("train", 128, subset=self.train), limit=8)
        held = [(batch.inputs.args[0], batch.target) for batch in batches]
        curved = landscape.spectrum(pruned, held, steps=asked.steps, tolerance=asked.tolerance, seed=asked.seed)
        clock.append(time.process_time())
        images = [batch.images for batch in self.data.loader("train", 64, subset=self.train[: asked.repair_images])]
        ekgfx.repair(repaired, self.traced, plan, images, seed=asked.seed)
        given_back = evaluate(repaired.eval(), held)
        clock.append(time.process_time())
        after, after_repair = self.trained(pruned), self.trained(repaired)
        clock.append(time.process_time())
        return {
            "kept": self.problem.budget.fraction(plan),
            "validation": before.loss,
            "reward": -before.reward,
            "condition": curved.condition,
            "repaired": given_back.loss,
            "largest": curved.largest[0],
            "smallest": curved.smallest[0],
            "errors": [curved.largest_errors[0], curved.smallest_errors[0]],
            "products": curved.steps,
            "potential": after.loss,
            "accuracy": after.accuracy,
            "potential_repaired": after_repair.loss,
            "accuracy_repaired": after_repair.accuracy,
            "cpu_seconds": np.diff(clock).round(1).tolist(),
        }

    def trained(self, network: nn.Module) -> Metrics:
        """Trains on labels alone; on the test images afterwards."""
        asked = self.asked
        ekgfx.finetune(
            network,
            self.data,
            subset=self.train,
            epochs=asked.epochs,
            lr=asked.lr,
            batch_size=asked.batch_size,
            schedule="cosine",
            seed=asked.seed,
            val_fraction=0,
        )
        return evaluate(network, self.data.loader("test", 500, subset=torch.arange(asked.test_images)))


def bisect(met: Callable[[float], bool], low: float, high: float, rounds: int = 30) -> float:
    """The largest scale that is within the budget, given that it is at `low`."""
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if met(middle) else (low, middle)
    return low


def main() -> None:
    asked = arguments()
    lines = Lines(asked.output)
    settings = {key: value for key, value in vars(asked).items() if key not in NOT_SETTINGS}
    settings["weights"], settings["data"] = Path(asked.weights).name, asked.data.partition(":")[0]
    study = functools.cache(lambda: prepare(asked))
    for number in range(0 if asked.figure else asked.subnetworks):
        key = {**settings, "number": number}
        if key not in lines:
            lines.add({**key, **study().measure(number), **environment()})
    found = [line for line in lines if line.items() >= settings.items()]
    print(json.dumps(summary(found), indent=1))
    draw(found, Path(asked.figure or lines.path.with_suffix(".png")), asked)


def prepare(asked: argparse.Namespace) -> Study:
    """Model, data, and what candidates are judged on."""
    torch.set_num_threads(asked.threads)
    built = source.parse(asked.model, asked.weights).build()
    data = job.open_data(asked.data, built, asked.seed)
    traced = ekgfx.trace(built.model, built.example_inputs)
    train, val = data.search_subset(asked.train_per_class, asked.val_per_class, asked.seed)
    batches = [(batch.images, batch.labels) for batch in data.loader("train", 128, subset=val)]
    problem = Problem(
        traced=traced,
        batches=validation_batches(batches),
        objective=Objective(),
        budget=Budget.of(lambda plan: traced.cost(plan).macs, asked.keep, "MACs"),
        rules=width_rules(traced, frozenset(), align=1, min_width=0.0),
        guided=True,
        ensemble=False,
        rescale=True,
    )
    history = Path(asked.output).with_suffix(".search.jsonl")
    result = ekgfx.search(
        traced,
        batches,
        flops=asked.keep,
        accept=asked.accept,
        rescale=True,
        seed=asked.seed,
        resume_from=read_lines(history),
        on_step=lambda step: append_line(history, step.to_json()),
    )
    logits = [assess(problem.network(plan), problem.batches, problem.objective, None)[1] for plan in result.plans]
    knowledge = tuple(torch.stack(parts).mean(0) for parts in zip(*logits, strict=True))  # eq. 8
    return Study(asked, traced, data, problem, train, knowledge)


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlations of what is known before with what comes after, and their 95% bootstrap intervals."""
    found: dict[str, Any] = {"subnetworks": len(lines)}
    for after in POTENTIALS:
        drawn = {name: resampled(lines, name, after) for name in PREDICTORS}
        found[after] = {name: [rank(lines, name, after), *interval(drawn[name])] for name in PREDICTORS}
        for name in PREDICTORS.keys() - {"validation"}:
            gap = drawn[name] - drawn["validation"]
            found[after][f"{name} - validation"] = [float(np.nanmedian(gap)), *interval(gap)]
    return found


def rank(lines: Sequence[dict[str, Any]], name: str, after: str) -> float:
    return float(spearmanr([line[name] for line in lines], [line[after] for line in lines]).statistic)


def interval(values: np.ndarray) -> list[float]:
    return list(np.nanpercentile(values, [2.5, 97.5]).tolist())


def resampled(lines: Sequence[dict[str, Any]], name: str, after: str) -> np.ndarray:
    """The correlation in resamples of the sub-networks, the same resamples for every name."""
    values = np.array([[line[name], line[after]] for line in lines])
    ranks = rankdata(values[np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))], axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    spread = np.sqrt(np.square(ranks).sum(1).prod(1))
    with np.errstate(invalid="ignore"):
        return np.asarray(ranks.prod(2).sum(1) / spread)  # no number where a resample is of one sub-network alone


def draw(lines: Sequence[dict[str, Any]], path: Path, asked: argparse.Namespace) -> None:
    """One panel per predictor, of what is trained from the cut network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6), layout="constrained")
    found = summary(lines)
    for axes, (name, title) in zip(figure.subplots(1, len(PREDICTORS), sharey=True), PREDICTORS.items(), strict=True):
        axes.scatter([line[name] for line in lines], [line["potential"] for line in lines], s=14)
        said = "ρ = {:.2f} ({:.2f} … {:.2f})".format(*found["potential"][name])
        axes.set(xlabel=title, title=said)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"test loss after {asked.epochs} epochs")
    figure.suptitle(
        f"{len(lines)} random sub-networks of {asked.model.partition(':')[2]} at {asked.keep:.0%} of its MACs"
    )
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", help="as `ekgfx prune` takes it")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--figure", help="draw what is there, and measure nothing")
    parser.add_argument("--subnetworks", type=int, default=20)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--narrowest", type=float, default=0.2, help="least width ratio drawn, before scaling")
    parser.add_argument("--train-per-class", type=int, default=200)
    parser.add_argument("--val-per-class", type=int, default=16)
    parser.add_argument("--repair-images", type=int, default=200)
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="most Hessian-vector products")
    parser.add_argument("--tolerance", type=float, default=2e-3, help="of the eigenvalues, relative to the largest")
    parser.add_argument("--accept", type=int, default=2, help="candidates per step of the search for the knowledge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
