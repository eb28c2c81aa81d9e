"""Time and memory of the repair on large networks. One thread; Linux.

    python benchmarks/repair.py scale vit_base_patch16_224 convnext_base --images folder:imagenet-sample \\
        --output benchmarks/results/repair_scale.json

A process for every network, with random weights: what the repair costs does not depend on them, what it gains does, and
that is not measured here. Every group is cut evenly until 55% of the MACs are left. "peak": the highest resident memory
of the process while repairing, with the network, its copy and the images in it.
"""

import argparse
import time
from typing import Any

import timm
import torch
from common import Sheet, apart, chosen, resident, with_memory
from parts.coverage_timm import even_plan

import ekgfx
from ekgfx import data as datasets
from ekgfx.base.memory import keep_freed_memory


def repaired(name: str, images: str, count: int) -> dict[str, Any]:
    """Operators, CPU seconds, seconds, and GiB at the most."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    model = timm.create_model(name).eval()
    normal: Any = model.pretrained_cfg
    data = datasets.load(images, mean=normal["mean"], std=normal["std"], image_size=normal["input_size"][-1], seed=0)
    shown = [batch.images for batch in data.loader("train", 50, subset=torch.arange(count))]
    traced = ekgfx.trace(model, shown[0][:2])
    plan = even_plan(traced, 0.55)
    pruned = ekgfx.prune(model, plan, traced)
    before = resident("VmRSS")
    started, clock = time.process_time(), time.monotonic()
    found, added = with_memory(lambda: ekgfx.repair(pruned, traced, plan, shown, most=count, on_layer=told))
    return {
        "macs_kept": traced.cost(plan).macs / traced.cost().macs,
        "operators": len(found.layers),
        "images": found.images,
        "error": [found.before.error, found.after.error],
        "cpu_seconds": round(time.process_time() - started, 1),
        "seconds": round(time.monotonic() - clock, 1),
        "peak_gb": round((before + (added << 10)) * 1024 / 1e9, 2),
    }


def told(layer: Any, number: int, count: int) -> None:
    print(f"{number}/{count} {layer.name}: {layer.before:.3g} → {layer.after:.3g} ({layer.done})", flush=True)


def main(asked: argparse.Namespace) -> None:
    sheet = Sheet(asked.output, chosen(asked, "count"), networks={})
    for name in asked.models:
        if name not in sheet["networks"]:
            sheet.keep(networks={**sheet["networks"], name: apart(repaired, name, asked.images, asked.count)})
            print(name, sheet["networks"][name])


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", help="timm names")
    parser.add_argument("--images", required=True, help="data SPEC")
    parser.add_argument("--count", type=int, default=250, help="images to repair on")
    parser.add_argument("--output", required=True, help="JSON")
