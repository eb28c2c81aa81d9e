"""Time of the analysis, on meta tensors, in one process and one thread.

    python benchmarks/analysis.py time models --output benchmarks/results/grouping.jsonl  # all of models.txt; resumable
    python benchmarks/analysis.py time depth                                 # chains of 125 … 1000 layers
    python benchmarks/analysis.py time large                                 # a model of a billion parameters

"Grouping" is what follows the export: the graph made functional, the rules run over it, the groups collected; the rules
and the groups alone stand beside it. Garbage collection is paused: one full collection takes 0.25 s once torch and timm
are loaded, whatever it interrupts. The best of three is taken.
"""

import argparse
import gc
import resource
import time
from typing import Any

import timm
import torch
from common import Lines, listed
from torch import nn

import ekgfx
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


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if asked.what == "depth":
        for layers in (125, 250, 500, 1000):
            print(layers, analyse(*chain(layers)), flush=True)
    elif asked.what == "large":
        model, x = timm_model("eva_giant_patch14_224")
        params = sum(p.numel() for p in model.parameters())
        row = analyse(model, x)
        print(params, row, f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    elif asked.output is None:
        raise SystemExit("give a file with --output")
    else:
        found = Lines(asked.output)
        for name in asked.models or listed():
            if {"model": name} not in found:
                found.add({"model": name, **analyse(*timm_model(name))})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("models", "depth", "large"))
    parser.add_argument("models", nargs="*", help="timm names (default: benchmarks/models.txt)")
    parser.add_argument("--output", help="of models: JSON lines")
