"""What validation batches and half precision do to a search's result and time: the paper's batches, smaller ones, the
hardest images first; and the paper's in bf16.

    python benchmarks/search.py batches --data cifar10:DIR --weights resnet56-cifar10.safetensors --output FOLDER

CIFAR's ResNet-56 after step 0 (of seed 0) is searched to `--keep` of its MACs in each of the `--kinds`, on the images
that each of `--seeds` draws. Then: test accuracy with BatchNorm estimated anew, and after `--epochs` of `--images`
training images (none: left out); and where the search first departs from that of the same seed's "256". One thread, CPU
seconds. Searches go on from FOLDER, and what is in its results is not done again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import Lines
from torch import Tensor, nn

import ekgfx
from ekgfx import data as datasets
from ekgfx.base.files import append_line, read_lines
from ekgfx.models import resnet56_cifar
from ekgfx.models.weights import load_weights
from ekgfx.search import SearchResult, Step
from ekgfx.surgery.calibrate import calibrate
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.evaluation import evaluate
from ekgfx.training.finetune import finetune
from ekgfx.training.step_zero import hardness_order, prepare

KINDS = {
    "256": (256, False, None),
    "64": (64, False, None),
    "64 hardest first": (64, True, None),
    "256 bf16": (256, False, "bf16"),
}
"""Samples in a batch, whether the hardest come first, and the half precision that is computed in."""
PLAIN = "256"
"""What the others are compared with."""


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    folder = Path(asked.output)
    folder.mkdir(parents=True, exist_ok=True)
    normal = resnet56_cifar().pretrained_cfg
    data = datasets.load(asked.data, mean=normal["mean"], std=normal["std"])
    results = Lines(folder / "results.jsonl")
    for seed in asked.seeds:
        for kind in asked.kinds:
            if {"seed": seed, "kind": kind} in results:
                continue
            model = after_step_0(data, asked.weights, folder)
            history = history_of(folder, kind, seed)
            traced, found = searched(model, batches(model, data, kind, seed), asked.keep, history, KINDS[kind][2])
            pruned = ekgfx.prune(model, found.plan, traced)
            calibrate(pruned, data.loader("train", 256, shuffle=True, seed=0), limit=16)
            test = data.loader("test", 256)
            line: dict[str, Any] = {"seed": seed, "kind": kind, "keep": asked.keep, "steps": len(found.steps)}
            line |= {"seconds": sum(step["cpu"] for step in read_lines(history.with_suffix(".seconds")))}
            if kind != PLAIN and (steps := read_lines(history_of(folder, PLAIN, seed))):
                line |= {"as 256": compared(steps, read_lines(history))}
            line |= {"params": traced.cost(found.plan).params / traced.cost().params}
            line |= {"before": evaluate(pruned, test).accuracy}
            if asked.epochs:
                subset = torch.randperm(data.size("train"), generator=torch.Generator().manual_seed(0))[: asked.images]
                schedule = "cosine" if asked.epochs > 1 else "constant"
                training = {
                    "epochs": asked.epochs,
                    "lr": 0.01,
                    "batch_size": 128,
                    "schedule": schedule,
                    "val_fraction": 0,
                }
                finetune(pruned, data, subset=subset, **training)
                line |= {"after": evaluate(pruned, test).accuracy, "epochs": asked.epochs, "images": asked.images}
            results.add(line)


def after_step_0(data: datasets.Data, weights: str, folder: Path) -> nn.Module:
    """ResNet-56 with its weights after step 0, which is done once."""
    model, file = resnet56_cifar(), folder / "prepared.pt"
    if file.exists():
        model.load_state_dict(torch.load(file))
    else:
        load_weights(model, Path(weights))
        prepare(model, data)
        torch.save(model.state_dict(), file)
    return model.eval()


def batches(model: nn.Module, data: datasets.Data, kind: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The validation batches of a kind, of the images that `seed` draws."""
    size, hardest_first, _ = KINDS[kind]
    _, val = data.search_subset(256, 32, seed)
    if hardest_first:
        val = val[hardness_order(model, data.loader("train", size, subset=val))]
    return [(batch.images, batch.labels) for batch in data.loader("train", size, subset=val)]


def history_of(folder: Path, kind: str, seed: int) -> Path:
    """The steps of a search."""
    return folder / f"search-{kind.replace(' ', '-')}-{seed}.jsonl"


def compared(plain: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """How far two searches go together: steps of the longer, steps before the first that differs, and how many steps
    cut the same at the same place."""
    same = [a["removed"] == b["removed"] for a, b in zip(plain, ours, strict=False)]
    first = same.index(False) if False in same else len(same)
    return {"steps": max(len(plain), len(ours)), "before the first other": first, "same": sum(same)}


def searched(model: nn.Module, batches: Any, keep: float, history: Path, amp: Any) -> tuple[TracedModel, SearchResult]:
    """The search, resumed from its history; the CPU seconds of each step are noted beside."""
    traced, last = ekgfx.trace(model, batches[0][0][:2]), [time.process_time()]

    def note(step: Step) -> None:
        now = time.process_time()
        append_line(history, step.to_json())
        append_line(history.with_suffix(".seconds"), {"step": step.number, "cpu": now - last[0]})
        last[0] = now

    return traced, ekgfx.search(traced, batches, flops=keep, amp=amp, on_step=note, resume_from=read_lines(history))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="cifar10:data/cifar10")
    parser.add_argument("--weights", default="data/weights/resnet56-cifar10.safetensors")
    parser.add_argument("--output", required=True)
    parser.add_argument("--keep", type=float, default=0.45)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--images", type=int, default=12_800)
    parser.add_argument("--epochs", type=int, default=1)
