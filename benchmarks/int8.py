"""INT8 alone, pruned alone, both: ResNet-50 with real weights on a few ImageNet images, one CPU thread.

    python benchmarks/int8.py --images folder:imagenet-sample --weights resnet50-imagenet-keras-fp16.safetensors \
        --history benchmarks/results/imagenet_sample.history.jsonl --output benchmarks/results/int8.json

The halves of the sample are those of `benchmarks/imagenet_sample.py`. The first half repairs the pruned network,
calibrates both INT8 files and chooses among their variants, without labels; accuracy is measured on the second.

The plan is that of a recorded EKG search to 55% of the MACs, whose widths were free: they are rounded to whole tiles of
16 channels, up or down, so that the budget holds. Where channels are lost, it is those of the smallest weights; where
they come back, those of the largest. All networks are timed in turn in one process. What is done is not done again:
the repaired weights and the ONNX files are in `--work`.
"""

import argparse
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import imagenet_sample
import torch
from ekgfx.export import export_report
from repair import from_history
from safetensors.torch import load_file, save_file
from torch import nn

import ekgfx
from ekgfx.base.files import read_json, write_json
from ekgfx.graph.plan import Plan
from ekgfx.tracing.trace import TracedModel

TILE = 16


def aligned(traced: TracedModel, plan: Plan, keep: float, tile: int = TILE) -> Plan:
    """The plan with its widths on whole tiles, within the budget: a width goes up where it fills more of its last tile
    than a share that is as small as may be."""
    full = traced.cost().macs
    for part in range(tile + 1):
        rounded = plan
        for name, kept in plan.kept.items():
            group = traced.groups[name]
            whole, rest = divmod(len(kept), tile)
            width = min(group.size, max(tile, tile * (whole + (rest > part))))
            rounded = rounded.with_kept(name, resized(traced, name, kept, width))
        if traced.cost(rounded).macs <= keep * full:
            return rounded
    raise SystemExit(f"no widths in tiles of {tile} are within {keep:.0%} of the MACs")


def resized(traced: TracedModel, name: str, kept: tuple[int, ...], width: int) -> tuple[int, ...]:
    """So many channels of a group, those of the largest weights (L1 of the layer that the group is named after) gone or
    come back last."""
    sizes = traced.model.get_submodule(name).weight.detach().abs().flatten(1).sum(1)  # type: ignore[union-attr, operator]
    order = sorted(range(traced.groups[name].size), key=lambda channel: (channel not in kept, -float(sizes[channel])))
    return tuple(sorted(order[:width]))


def repaired(setting: imagenet_sample.Setting, asked: argparse.Namespace) -> tuple[nn.Module, Plan, float | None]:
    """The pruned network, repaired on the first half of the images, and the CPU seconds that took, if it was done now."""
    traced = setting.traced
    plan = aligned(traced, from_history(traced, Path(asked.history)), asked.keep)
    network = ekgfx.prune(traced.model, plan, traced).eval()
    weights, seconds = Path(asked.work) / "repaired.safetensors", None
    if weights.exists():
        network.load_state_dict(load_file(weights))
    else:
        images = [batch[0] for batch in setting.batches(setting.seen)]
        started = time.process_time()
        found = ekgfx.repair(network, traced, plan, images, most=len(setting.seen), seed=asked.seed, on_layer=told)
        seconds = round(time.process_time() - started, 1)
        print(found, f"{seconds} CPU seconds", flush=True)
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, weights)
    return network, plan, seconds


def told(layer: Any, number: int, count: int) -> None:
    print(f"{number}/{count} {layer.name}: {layer.before:.3g} → {layer.after:.3g} ({layer.done})", flush=True)
