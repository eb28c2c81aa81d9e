"""Time and memory of the analysis, and memory of the cut. One thread.

    python benchmarks/analysis.py models --output benchmarks/results/grouping.jsonl  # all of models.txt; resumable
    python benchmarks/analysis.py depth                                 # chains of 125 … 1000 layers
    python benchmarks/analysis.py large                                 # a model of a billion parameters
    python benchmarks/analysis.py cut resnet50 vit_base_patch16_224 --output benchmarks/results/surgery_memory.json

The first three are on meta tensors, in one process. "Grouping" is what follows the export: the graph made functional,
the rules run over it, the groups collected; the rules and the groups alone stand beside it. Garbage collection is
paused: one full collection takes 0.25 s once torch and timm are loaded, whatever it interrupts. The best of three is
taken.

The last says what a cut adds to the memory of a process, beside a deep copy of the model, in a process for every row
(Linux): every group is cut evenly until 55% of the MACs are left, without verification. "Added" is the highest resident
memory while cutting less that before it; "largest" is the model's largest parameter.
"""

import argparse
import copy
import gc
import resource
import time
from pathlib import Path
from typing import Any

import timm
import torch
from common import Lines, apart, listed, with_memory
from parts.coverage_timm import even_plan
from torch import nn

import ekgfx
from ekgfx.base.files import write_json
from ekgfx.graph.functional import functionalize


def analyse(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Milliseconds of each part, operators and groups."""
    start = time.process_time()
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
    row: dict[str, Any] = {"export_ms": round(1e3 * (time.process_time() - start))}
    gc.collect()
    gc.disable()
    whole, alone = [], []
    for _ in range(3):
        start = time.process_time()
        functionalize(program)
        middle = time.process_time()
        traced = ekgfx.TracedModel(model, program, ((x,), {}))
        groups = traced.groups
        end = time.process_time()
        whole.append(end - middle)
        alone.append(end - middle - (middle - start))
    gc.enable()
    row |= {"grouping_ms": round(1e3 * min(whole), 1), "rules_and_groups_ms": round(1e3 * max(min(alone), 0), 1)}
    return row | {"operators": len(traced.operations), "groups": len(groups)}


def timm_model(name: str) -> tuple[nn.Module, torch.Tensor]:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        return model, torch.randn(2, *model.pretrained_cfg["input_size"])


def chain(layers: int) -> tuple[nn.Module, torch.Tensor]:
    """Convolutions with norms and a residual addition over every second one."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.b(self.a(x).relu()))

    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(3, 8, 1), *(Block() for _ in range(layers // 2))).eval(), torch.randn(2, 3, 8, 8)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("models", "depth", "large", "cut"))
    parser.add_argument("models", nargs="*", help="timm names (default: benchmarks/models.txt)")
    parser.add_argument("--output", type=Path, help="JSON lines; of cut, JSON")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what in ("models", "cut") and asked.output is None:
        parser.error("give a file with --output")
    if asked.what == "depth":
        for layers in (125, 250, 500, 1000):
            print(layers, analyse(*chain(layers)), flush=True)
    elif asked.what == "large":
        model, x = timm_model("eva_giant_patch14_224")
        params = sum(p.numel() for p in model.parameters())
        row = analyse(model, x)
        print(params, row, f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    elif asked.what == "cut":
        rows = []
        for name in asked.models:
            for way in WAYS:
                rows.append(apart(memory_of_cut, name, way))
                print(rows[-1], flush=True)
        write_json(asked.output, rows)
    else:
        found = Lines(asked.output)
        for name in asked.models or listed():
            if {"model": name} not in found:
                found.add({"model": name, **analyse(*timm_model(name))})


if __name__ == "__main__":
    main()
