"""How many hours the ImageNet recipes would take on this machine: projected from measured throughput, not measured.

    python benchmarks/imagenet.py hours --recipe imagenet-resnet50 --output benchmarks/results/imagenet_hours.json
    python benchmarks/imagenet.py hours --recipe imagenet-resnet50 --images folder:DIR …     # and what decoding allows

Measures, with random weights and images and the recipe's own settings (batch and warm-up as given here):

    forward    images per second of the unpruned network with batch statistics, as the search and the bank run it
    training   images per second of fine-tuning: two views, memory bank, the network cut to the recipe's budget
    decoding   images per second of the loader, two augmented views (with --images)

and projects: step 0 (train_per_class images of each class, one view), search (its MACs as `ekgfx.search.effort`
estimates them, at the rate of `forward`), bank (a pass per teacher over 1,281,167 images), fine-tuning (epochs passes).
The paper reports 315 GPU hours for ResNet-50, search and fine-tuning together. Every machine's numbers are entries of
their own.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import environment

import ekgfx
from ekgfx.base.files import read_json, write_json
from ekgfx.models import source
from ekgfx.pipeline import job
from ekgfx.search.effort import search_macs
from ekgfx.settings import recipe
from ekgfx.settings.recipe import Recipe, Training

IMAGES, CLASSES = 1_281_167, 1000


class RandomBank:
    """Logits as a memory bank of K teachers would give them."""

    def __init__(self, teachers: int, device: torch.device) -> None:
        self.teachers, self.device = teachers, device

    def logits(self, index: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(index), self.teachers, CLASSES, device=self.device)


def median_seconds(work: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Of `rounds` repetitions after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        start = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - start)
    return statistics.median(times[1:])


def throughput(asked: argparse.Namespace, settings: Recipe, device: torch.device) -> tuple[dict[str, float], float]:
    """Images per second of every kind of work, and the MACs of the search."""
    built = source.parse(settings.model or "", "none").build()
    size = built.example_inputs[0].shape[1:]
    model = built.model.to(device)
    traced = ekgfx.trace(model, torch.randn(2, *size, device=device))
    images = torch.randn(asked.batch, *size, device=device)
    network = traced.subnetwork(None, batch_stats=True)

    def forward() -> None:
        with torch.no_grad():
            network(images)

    found = {"forward": asked.batch / median_seconds(forward, asked.rounds, device)}
    keep = settings.search.flops or 1.0
    plan = ekgfx.search(
        traced, strategy="uniform", importance="magnitude", flops=keep, align=settings.search.align
    ).plan
    pruned = ekgfx.prune(model, plan, traced)
    labels = torch.arange(asked.batch, device=device)
    batches = [(torch.stack([images, images]), labels, torch.arange(asked.batch))] * (asked.rounds + 1)
    ends: list[float] = []

    def noted(_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.monotonic())

    options = {field.name: getattr(settings.finetune, field.name) for field in fields(Training)}
    ekgfx.finetune(
        pruned,
        batches,
        bank=RandomBank(settings.finetune.teachers, device),
        on_batch=noted,
        **{**options, "epochs": 1, "views": 2, "workers": 0, "amp": settings.finetune.amp if asked.amp else None},
    )
    steps = [later - earlier for earlier, later in pairwise(ends)]
    found["training"] = asked.batch / statistics.median(steps)
    if asked.images:
        data = job.open_data(asked.images, built, 0)
        loader = data.loader("train", asked.batch, shuffle=True, augment=True, views=2, workers=asked.workers)
        start = time.monotonic()
        count = sum(len(batch.index) for batch in loader)
        found["decoding"] = count / (time.monotonic() - start)
    samples = settings.search.val_per_class * CLASSES
    return found, search_macs(traced, samples, keep, step=settings.search.step, accept=settings.search.accept or 1) / (
        traced.cost().macs
    )


def project(settings: Recipe, rates: dict[str, float], search_images: float) -> dict[str, float]:
    """Hours of every part. search_images: the search's MACs in forward passes of the unpruned network."""
    hours = {
        "step 0": settings.search.train_per_class * CLASSES / (2 * rates["training"]),
        "search": search_images / rates["forward"],
        "bank": settings.finetune.teachers * IMAGES / rates["forward"],
        "fine-tuning": settings.finetune.epochs * IMAGES / rates["training"],
    }
    if "decoding" in rates:
        hours["fine-tuning, decoding alone"] = settings.finetune.epochs * IMAGES / rates["decoding"]
    return {name: round(seconds / 3600, 2) for name, seconds in hours.items()}


def main(asked: argparse.Namespace) -> None:
    device = job.pick_device(asked.device)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    output = Path(asked.output)
    lines: list[dict[str, Any]] = read_json(output) if output.exists() else []
    for name in asked.recipe:
        settings = recipe.load(name)
        rates, search_images = throughput(asked, settings, device)
        hours = project(settings, rates, search_images)
        line = {
            "recipe": name,
            **environment(device),
            "images_per_second": {kind: round(rate, 2) for kind, rate in rates.items()},
            "projected_hours": hours,
            "projected_total": round(sum(h for part, h in hours.items() if "decoding" not in part), 1),
            "batch": asked.batch,
            "amp": settings.finetune.amp if asked.amp else None,
        }
        lines = [old for old in lines if (old["recipe"], old["hardware"]) != (name, line["hardware"])] + [line]
        write_json(output, lines)
        print(json.dumps(line), flush=True)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", nargs="+", default=[n for n in recipe.names() if n.startswith("imagenet-")])
    parser.add_argument("--output", required=True, help="JSON")
    parser.add_argument("--images", help="data SPEC of image files to decode; without it decoding is not measured")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode")
    parser.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, default=True, help="the recipe's half precision"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
