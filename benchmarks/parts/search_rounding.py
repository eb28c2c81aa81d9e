"""How far does rounding move the importance of channels? As far as the network's derivative jumps.

    python benchmarks/search.py rounding --data folder:imagenet-sample \\
        --weights resnet50-imagenet-keras-fp16.safetensors

The ResNet-50 of `examples/resnet50_keras.py` on `--images` photographs, in double precision: importance (eq. 9) as it
is, and with the images moved by 10⁻⁶ of their deviation, about what rounding in single precision does to a network's
activations. Once with its ReLUs, whose derivative jumps at zero, and once with SiLUs instead, whose does not; the
weights are the same. One JSON line each: the largest change of a score relative to the group's largest score, as the
median and the maximum over groups, and the median over groups of the median relative change of a score.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import torch
from parts.search_cases import NETWORKS, problem_of, unpruned
from torch import Tensor, nn

import ekgfx
from ekgfx.models import source
from ekgfx.models.weights import load_weights
from ekgfx.pipeline import job
from ekgfx.search.importance import Scores, taylor

MOVED = 1e-6


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    built = source.parse(NETWORKS["resnet50_keras"], "none").build()
    load_weights(built.model, Path(asked.weights))
    opened = job.open_data(asked.data, built, 0)
    mixed = torch.randperm(opened.size("train"), generator=torch.Generator().manual_seed(0))
    (batch,) = opened.loader("train", asked.images, subset=mixed[: asked.images])
    model, images = built.model.eval().double(), batch.images.double()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=images.dtype)
    moved = images + MOVED * images.std() * noise
    for name in ("ReLU", "SiLU"):
        if name == "SiLU":
            smooth(model)
        changes = compared(scores(model, images, batch.labels), scores(model, moved, batch.labels))
        print(json.dumps({"activation": name, "images": asked.images, "moved": MOVED, **changes}), flush=True)


def scores(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Importance of the unpruned network's channels."""
    problem = problem_of(ekgfx.trace(model, images[:2]), [(images, labels)])
    start = unpruned(problem)
    return taylor(problem, start.plan, start.knowledge)


def compared(one: Scores, other: Scores) -> dict[str, float]:
    """How far scores are apart."""
    largest = [float((one[group] - other[group]).abs().max() / one[group].max()) for group in one]
    single = [float(((one[g] - other[g]).abs() / one[g])[one[g] > 0].median()) for g in one]
    return {"median": median(largest), "most": max(largest), "single": median(single)}


def smooth(model: nn.Module) -> None:
    """Puts a SiLU in the place of every ReLU."""
    for name, child in model.named_children():
        if isinstance(child, nn.ReLU):
            setattr(model, name, nn.SiLU())
        smooth(child)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="data SPEC")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", type=int, default=8)
