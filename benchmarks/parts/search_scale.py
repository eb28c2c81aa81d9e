"""What a step of the search costs, in time and memory, against depth, width, number of groups and of images.

    python benchmarks/search.py scale --output benchmarks/results/search_scale.json [--large]

One step (importance, candidates, accepted network; nothing cut yet) of residual networks of plain blocks on random
images of 32×32 pixels in batches of 64, one thread, CPU seconds, each case in a process of its own, whose growth is its
memory. One thing is varied at a time, from 8 blocks of 32 channels, all groups and 128 images. `--large` measures a
step of ViT-Base and ConvNeXt-Base on 8 images of 224×224 pixels in two batches too. What the file holds already is not
measured again. The times are those of candidates that all are evaluated to their end.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import apart, with_memory
from parts.search_cases import problem_of
from parts.search_ways import timed
from torch import Tensor, nn

import ekgfx
from ekgfx.base.files import read_json, write_json
from ekgfx.search.ekg import State
from ekgfx.search.problem import Problem
from ekgfx.search.reward import assess

BASE = {"blocks": 8, "width": 32, "groups": 9, "images": 128}
VARIED = {"blocks": (4, 8, 16, 32), "width": (16, 32, 64), "groups": (2, 4, 9), "images": (64, 128, 256)}
LARGE = ("vit_base_patch16_224", "convnext_base")


class Block(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), then ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.an, self.bn = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn(self.b(self.an(self.a(x)).relu()))).relu()


class Network(nn.Module):
    """A stem, blocks of one width at 16×16 pixels, and a classifier."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def problem(blocks: int, width: int, groups: int, images: int) -> Problem:
    """A step's problem; only the first `groups` groups may shrink."""
    torch.manual_seed(0)
    pictures, labels = torch.randn(images, 3, 32, 32), torch.arange(images) % 10
    traced = ekgfx.trace(Network(blocks, width).eval(), pictures[:2])
    posed = problem_of(traced, list(zip(pictures.split(64), labels.split(64), strict=True)))
    return replace(posed, rules=dict(list(posed.rules.items())[:groups]))


def large(name: str) -> Problem:
    """The problem of a network of timm with random weights, label-free."""
    import timm

    torch.manual_seed(0)
    pictures = torch.randn(8, 3, 224, 224)
    traced = ekgfx.trace(timm.create_model(name).eval(), pictures[:2])
    return problem_of(traced, [(half, None) for half in pictures.split(4)])


def measured(posed: Problem) -> dict[str, Any]:
    """The step's parts and its memory."""
    _, knowledge = assess(posed.network(posed.full()), posed.batches, posed.objective, None)
    state = State(posed.full(), dict.fromkeys(posed.rules, 1.0), knowledge)
    found, memory = with_memory(lambda: timed(posed, state, "all", early_stop=False))
    figures = {key: round(found[key], 3) for key in ("importance", "candidate", "step")}
    case = {"candidates": found["candidates"], "macs": posed.traced.cost().macs, "groups": len(posed.rules)}
    return {**figures, **case, "MiB": memory}


def one(name: str, options: dict[str, int] | None) -> dict[str, Any]:
    """One case, in this process. options: of a residual network; None: a network of timm."""
    torch.set_num_threads(1)
    return measured(large(name) if options is None else problem(**options))


def main(asked: argparse.Namespace) -> None:
    cases: dict[str, dict[str, int] | None] = {}
    for varied, values in VARIED.items():
        for value in values:
            more = {"groups": value + 1} if varied == "blocks" else {}
            cases[f"{varied}={value}"] = {**BASE, varied: value, **more}
    cases |= dict.fromkeys(LARGE) if asked.large else {}
    known = read_json(asked.output) if asked.output.exists() else {}
    for name, options in cases.items():
        if name not in known:
            known[name] = apart(one, name, options)
            print(name, known[name], flush=True)
            write_json(asked.output, known)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--large", action="store_true")
