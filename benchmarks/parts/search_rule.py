"""Under a budget that steps save unequal parts of: should a step take the candidate of the highest reward, or the one
that loses the least reward per unit saved?

    python benchmarks/search.py rule --data cifar10:cifar10 --weights resnet20-cifar10.safetensors \
        --output benchmarks/results/step_rule.jsonl
    python benchmarks/search.py rule --data cifar10:cifar10 --weights resnet56-cifar10.safetensors \
        --network resnet56 --keep 0.45 --accept 1 --output benchmarks/results/step_rule_resnet56.jsonl

The second is what a search within a latency budget does (`ekgfx.search.ranking`), the first what one within a budget of
MACs does. Latency takes a table of one machine; here MACs stand for it, which everybody counts alike:
ResNet-20 or ResNet-56 to `--keep` of its MACs by both rules, with one and with four groups a step, on 256 training
images drawn with each seed. Accuracy and loss are of 4000 test images, BatchNorm's statistics estimated anew on 1000
other training images, without fine-tuning. One JSON line a search; one that the output holds is not repeated.
"""

import argparse
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import Lines

import ekgfx
from ekgfx.data import load
from ekgfx.models import source
from ekgfx.models.weights import load_weights
from ekgfx.search.problem import Budget
from ekgfx.surgery.calibrate import calibrate
from ekgfx.training.evaluation import evaluate

RULES = {"highest reward": False, "reward lost per unit": True}
SEEN, AGAIN, TEST = 256, 1000, 4000


def measure(rule: str, seed: int, accept: int, data: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """One search and what it leaves."""
    built = source.parse(f"ekgfx.models:{asked.network}_cifar", "none").build()
    load_weights(built.model, asked.weights)
    model = built.model.eval()
    traced = ekgfx.trace(model, torch.randn(2, 3, 32, 32))
    order = torch.randperm(data.size("train"), generator=torch.Generator().manual_seed(seed))
    seen = [(batch.images, batch.labels) for batch in data.loader("train", SEEN, subset=order[:SEEN])]
    budget = Budget.of(lambda plan: traced.cost(plan).macs, asked.keep, "MACs", weighed=RULES[rule])
    with patch("ekgfx.search.find_budget", lambda *_, **__: budget):  # MACs have but one rule outside of here
        began = time.process_time()
        found = ekgfx.search(traced, seen, flops=asked.keep, accept=accept)
        seconds = time.process_time() - began
    network = ekgfx.prune(model, found.plan, traced)
    calibrate(network, data.loader("train", 250, subset=order[SEEN : SEEN + AGAIN]))
    test = evaluate(network, data.loader("test", 500, subset=torch.arange(TEST)))
    return {
        "rule": rule,
        "seed": seed,
        "accept": accept,
        "accuracy": test.accuracy,
        "loss": test.loss,
        "steps": len(found.steps),
        "cpu_seconds": round(seconds, 1),
        "macs_kept": budget.fraction(found.plan),
        "params_kept": traced.cost(found.plan).params / traced.cost().params,
    }


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    data, done = load(asked.data), Lines(asked.output)
    for accept in asked.accept:
        for seed in asked.seeds:
            for rule in RULES:
                if {"rule": rule, "seed": seed, "accept": accept} not in done:
                    done.add(measure(rule, seed, accept, data, asked))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="data SPEC of CIFAR-10")
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="JSON lines")
    parser.add_argument("--network", choices=("resnet20", "resnet56"), default="resnet20")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--accept", type=int, nargs="+", default=[1, 4])
