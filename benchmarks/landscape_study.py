"""What tells how good a sub-network becomes? Validation loss, the paper's condition number and EKG's reward, compared.

    python benchmarks/landscape_study.py ekgfx.models:resnet20_cifar --weights resnet20-cifar10.safetensors \
        --data cifar10:DIR --output benchmarks/results/landscape_resnet20.jsonl
    python benchmarks/landscape_study.py … --figure docs/landscape_resnet20.png      # draws what is there already

Draws sub-networks of equal cost: widths at random, scaled until `--keep` of the MACs are left, the channels of least L1
norm gone. Each is a line of the output, independent of the others and the same for the same seed; a line that is there
is not measured again, and the search for the knowledge goes on after its last step. Of each, before any training:

    validation    CE on validation images, batch statistics: what a search without knowledge minimizes
    reward        CE + CE to the ensemble knowledge (eq. 4) of an EKG search to the same budget: what EKG minimizes
    condition     |λ_min / λ_max| of the Hessian of the loss on those images, by Lanczos (see `ekgfx.landscape`)

and, after `--epochs` of training on other images, without knowledge:

    potential     CE on test images

At the end: Spearman's rank correlation of each of the three with `potential`, with a 95% interval by bootstrap over
sub-networks (10,000 resamples). The paper gives 0.32 for validation and 0.73 for condition (ResNet-56).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

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
from ekgfx.search.reward import Objective, validation_batches
from ekgfx.search.reward import evaluate as judge
from ekgfx.surgery.calibrate import calibrate
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.evaluation import evaluate

PREDICTORS = {"validation": "validation loss", "reward": "EKG's reward (negative)", "condition": "|λ_min / λ_max|"}
PAPER = {"validation": 0.32, "condition": 0.73}
RESAMPLES = 10_000


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
        """One line of the output."""
        asked, start = self.asked, time.monotonic()
        plan = self.plan(number)
        batches, objective = self.problem.batches, self.problem.objective
        before, _ = judge(self.problem.network(plan), batches, objective, self.knowledge)
        pruned = ekgfx.prune(self.traced.model, plan, self.traced)
        calibrate(pruned, self.data.loader("train", 128, subset=self.train), limit=8)
        held = [(batch.inputs.args[0], batch.target) for batch in batches]
        curved = landscape.spectrum(pruned, held, steps=asked.steps, tolerance=asked.tolerance, seed=asked.seed)
        looked = time.monotonic() - start
        ekgfx.finetune(
            pruned,
            self.data,
            subset=self.train,
            epochs=asked.epochs,
            lr=asked.lr,
            batch_size=asked.batch_size,
            schedule="cosine",
            seed=asked.seed,
            val_fraction=0,
        )
        after = evaluate(pruned, self.data.loader("test", 500, subset=torch.arange(asked.test_images)))
        return {
            "number": number,
            "kept": self.problem.budget.fraction(plan),
            "validation": before.loss,
            "reward": -before.reward,
            "condition": curved.condition,
            "largest": curved.largest[0],
            "smallest": curved.smallest[0],
            "errors": [curved.largest_errors[0], curved.smallest_errors[0]],
            "products": curved.steps,
            "potential": after.loss,
            "accuracy": after.accuracy,
            "seconds": [round(looked, 1), round(time.monotonic() - start - looked, 1)],
        }


def bisect(met: Callable[[float], bool], low: float, high: float, rounds: int = 30) -> float:
    """The largest scale that is within the budget, given that it is at `low`."""
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if met(middle) else (low, middle)
    return low


def main() -> None:
    asked = arguments()
    output = Path(asked.output)
    facts = {
        key: value for key, value in vars(asked).items() if key not in ("output", "figure", "subnetworks", "threads")
    }
    facts["weights"], facts["data"] = Path(asked.weights).name, asked.data.partition(":")[0]
    head, *lines = read_lines(output) or [None]
    if head is not None and head["settings"] != facts:
        raise SystemExit(f"{output} was made with other settings; choose another --output")
    missing = [n for n in range(asked.subnetworks) if n not in {line["number"] for line in lines}]
    if missing and not asked.figure:
        if head is None:
            append_line(output, {"settings": facts, "date": time.strftime("%Y-%m-%d")})
        study = prepare(asked)
        for number in missing:
            lines.append(study.measure(number))
            append_line(output, lines[-1])
            print(json.dumps(lines[-1]), flush=True)
    print(json.dumps(summary(lines), indent=1))
    draw(lines, Path(asked.figure or output.with_suffix(".png")), asked)


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
    logits = [judge(problem.network(plan), problem.batches, problem.objective, None)[1] for plan in result.plans]
    knowledge = tuple(torch.stack(parts).mean(0) for parts in zip(*logits, strict=True))  # eq. 8
    return Study(asked, traced, data, problem, train, knowledge)


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlations with `potential`, and their 95% bootstrap intervals."""
    found: dict[str, Any] = {"subnetworks": len(lines)}
    for name in PREDICTORS:
        low, high = np.nanpercentile(list(resampled(lines, name)), [2.5, 97.5])
        found[name] = {"spearman": rank(lines, name), "interval_95": [float(low), float(high)]}
    gap = [a - b for a, b in zip(resampled(lines, "condition"), resampled(lines, "validation"), strict=True)]
    found["condition_minus_validation"] = np.nanpercentile(gap, [2.5, 50, 97.5]).tolist()
    return found


def rank(lines: Sequence[dict[str, Any]], name: str) -> float:
    return float(spearmanr([line[name] for line in lines], [line["potential"] for line in lines]).statistic)


def resampled(lines: Sequence[dict[str, Any]], name: str) -> Iterator[float]:
    """The correlation in resamples of the sub-networks, the same resamples for every name."""
    draw = np.random.default_rng(0)
    values = np.array([[line[name], line["potential"]] for line in lines])
    for _ in range(RESAMPLES):
        part = values[draw.integers(0, len(values), len(values))]
        ranks = part.argsort(0).argsort(0).astype(float)
        for column in (0, 1):  # ties, which resampling makes, share their mean rank
            _, inverse, counts = np.unique(part[:, column], return_inverse=True, return_counts=True)
            ranks[:, column] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        yield float(np.corrcoef(ranks.T)[0, 1]) if (ranks.std(0) > 0).all() else float("nan")


def draw(lines: Sequence[dict[str, Any]], path: Path, asked: argparse.Namespace) -> None:
    """One panel per predictor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    found = summary(lines)
    for axes, (name, title) in zip(figure.subplots(1, len(PREDICTORS), sharey=True), PREDICTORS.items(), strict=True):
        axes.scatter([line[name] for line in lines], [line["potential"] for line in lines], s=14)
        low, high = found[name]["interval_95"]
        axes.set(xlabel=title, title=f"ρ = {found[name]['spearman']:.2f} ({low:.2f} … {high:.2f})")
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
