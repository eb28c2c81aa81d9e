"""Memory of the cut: what it adds to a process, beside a deep copy of the model. One thread; Linux.

    python benchmarks/analysis.py memory resnet50 vit_base_patch16_224 --output benchmarks/results/surgery_memory.json

A process for every row. Every group is cut evenly until 55% of the MACs are left, without verification. "Added" is the
highest resident memory while cutting less that before it; "largest" is the model's largest parameter.
"""

import argparse
import copy
from typing import Any

import timm
import torch
from common import apart, with_memory
from parts.coverage_timm import even_plan
from torch import nn

import ekgfx
from ekgfx.base.files import write_json

WAYS = ("deepcopy", "prune", "prune inplace")


def memory_of_cut(name: str, way: str) -> dict[str, Any]:
    """MiB of the model, of its largest parameter, and added by one way."""
    torch.set_num_threads(1)
    model = timm.create_model(name).eval()
    traced = ekgfx.trace(model, torch.randn(2, *model.pretrained_cfg["input_size"]))
    plan = even_plan(traced, 0.55)
    sizes = [p.numel() * p.element_size() / 2**20 for p in model.parameters()]

    def cut() -> nn.Module:
        if way == "deepcopy":
            return copy.deepcopy(model)
        return ekgfx.prune(model, plan, traced, verify=False, inplace=way == "prune inplace")

    weights = {"weights": round(sum(sizes), 1), "largest": round(max(sizes), 1)}
    _, added = with_memory(cut)
    return {"model": name, "way": way, **weights, "added": added}


def main(asked: argparse.Namespace) -> None:
    rows = []
    for name in asked.models:
        for way in WAYS:
            rows.append(apart(memory_of_cut, name, way))
            print(rows[-1], flush=True)
    write_json(asked.output, rows)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", help="timm names")
    parser.add_argument("--output", required=True, help="JSON")
