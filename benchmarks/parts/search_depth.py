"""Width alone against width and depth, at the same cost: searched, repaired, and judged on the same test images.

    python benchmarks/search.py depth digits --keep 0.6 --output benchmarks/results/depth.jsonl
    python benchmarks/search.py depth resnet20_cifar --weights resnet20-cifar10.safetensors --data cifar10:DIR \
        --keep 0.6 --target cpu:fp32:batch=1:threads=1 --output benchmarks/results/depth.jsonl
    python benchmarks/search.py depth resnet50 --weights resnet50-imagenet-keras-fp16.safetensors \
        --data folder:imagenet-sample --target cpu:fp32:batch=1:threads=1 --align 16 --accept 4 --images 250 \
        --searched 96 --output benchmarks/results/depth.jsonl

`digits` is a small residual network that is trained first, on scikit-learn's digits; `vit` is the one that
`benchmarks/repair.py gain vit --train 8` trains on CIFAR-10; `resnet50` has the halves of `benchmarks/imagenet.py
sample`; any other name is a factory of `ekgfx.models`, with its weights and its data.

Three searches: the paper's; the same with steps that minimise the reward lost for the MACs saved; and that with
residual blocks as further candidates. The second one tells what the ranking does by itself. Beside them stand random
channels, at the widths of the first and of the third, without the third's blocks. Images to search and repair on, and
to test on, are drawn by the seed, the same for all. What costs is MACs; with `--target`, milliseconds by timings that
are taken first and kept beside the output: then the first two searches are one. What is in the output is not measured
again, and what was interrupted goes on from the steps and repairs that are kept beside the output.
"""

import argparse
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import Lines, chosen, environment
from gpu.latency import layer_table
from parts import imagenet_sample, repair_gain
from torch import Tensor, nn

import ekgfx
from ekgfx import models
from ekgfx.base.files import read_lines
from ekgfx.data import load as load_data
from ekgfx.graph.plan import Plan
from ekgfx.latency.target import Target
from ekgfx.models.weights import load_weights
from ekgfx.tracing.traced import TracedModel

WAYS = ("width, by reward", "width, by loss per cost", "width and depth")
RANDOM = {WAYS[0]: "random channels", WAYS[2]: "random channels, the same blocks"}


class Block(nn.Module):
    """A residual block, as in ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x).relu()


class Digits(nn.Module):
    """Six blocks on images of 8×8."""

    def __init__(self, width: int = 12, blocks: int = 6) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3)))


@dataclass(frozen=True)
class Subject:
    """A trained network; batches to search on, to repair on and to test on."""

    model: nn.Module
    searched: list[Any]
    seen: list[Any]
    tested: list[Any]


def subject(asked: argparse.Namespace) -> Subject:
    """What is asked for."""
    if asked.network == "resnet50":
        given = {"images": asked.data, "weights": asked.weights, "seed": asked.seed}
        setting = imagenet_sample.prepare(argparse.Namespace(**given, batch=48, test_images=asked.test))
        seen = setting.seen[: asked.images]
        parts = seen[: asked.searched], seen, setting.unseen
        return Subject(setting.traced.model, *([batch[:2] for batch in setting.batches(part)] for part in parts))
    model, data = trained(asked)
    draw = torch.Generator().manual_seed(asked.seed)
    seen, held = (
        torch.randperm(data.size(split), generator=draw)[:count]
        for split, count in (("train", asked.images), ("test", asked.test))
    )
    parts = ("train", 160, seen[: asked.searched]), ("train", 160, seen), ("test", 250, held)
    return Subject(model, *([b[:2] for b in data.loader(split, size, subset=part)] for split, size, part in parts))


def trained(asked: argparse.Namespace) -> tuple[nn.Module, ekgfx.data.Data]:
    """A trained network, and its data."""
    if asked.network == "digits":
        torch.manual_seed(asked.seed)
        data = load_data(asked.data or "digits", seed=asked.seed)
        model = Digits()
        ekgfx.finetune(model, data, epochs=8, batch_size=64, lr=0.1, seed=asked.seed)
        return model.eval(), data
    if asked.network == "vit":
        model, (mean, std) = repair_gain.small_vit(), repair_gain.NORMAL
    else:
        model = getattr(models, asked.network)()
        mean, std = (model.pretrained_cfg[key] for key in ("mean", "std"))
    load_weights(model.eval(), Path(asked.weights))
    return model, load_data(asked.data, mean=mean, std=std, seed=asked.seed)


def folder(asked: argparse.Namespace) -> Path:
    """What is kept beside the output."""
    beside = Path(asked.output).with_suffix("")
    beside.mkdir(exist_ok=True)
    return beside


def searched(subject: Subject, way: str, asked: argparse.Namespace) -> Any:
    """The traced model, and the result of one of the three searches."""
    traced, beside = ekgfx.trace(subject.model, subject.tested[0][0][:2]), folder(asked)
    if way == WAYS[1]:
        vars(traced)["blocks"] = {}
    budget: dict[str, Any] = {"flops": asked.keep}
    if asked.target:
        place, file = Target.parse(asked.target), f"{asked.network}.{asked.target.replace(':', '-')}.json"
        table, _ = layer_table(traced, place, beside / file)
        budget = {"latency": asked.keep, "table": table}
    steps = beside / f"{asked.network}.{way}.history.jsonl"
    options = {"step": asked.step, "accept": asked.accept, "align": asked.align, "depth": way != WAYS[0]}
    options |= {"resume_from": read_lines(steps), "on_step": imagenet_sample.appending(steps)}
    return traced, ekgfx.search(traced, subject.searched, **options, **budget)


def of_random_channels(traced: TracedModel, plan: Plan, seed: int) -> Plan:
    """The same widths and blocks, of channels that are drawn."""
    draw = random.Random(seed)
    drawn = {name: draw.sample(range(traced.groups[name].size), len(kept)) for name, kept in plan.kept.items()}
    return replace(plan, kept={name: tuple(sorted(channels)) for name, channels in drawn.items()})


def right(network: Any, batches: Any) -> Tensor:
    """Whether each test image is classified right."""
    with torch.no_grad():
        return torch.cat([network(images).argmax(1) == labels for images, labels in batches])


def apart(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean of the paired difference, in points, and half of its 95% interval (normal)."""
    difference = 100 * (one.double() - other.double())
    return float(difference.mean()), float(1.96 * difference.std() / math.sqrt(len(difference)))


def main(asked: argparse.Namespace) -> None:
    lines = Lines(asked.output)
    same = chosen(asked, "network", "keep", "target", "step", "accept", "images", "test", "seed")
    same |= {name: value for name, value in chosen(asked, "align", "searched").items() if value not in (1, None)}
    if {**same, "way": RANDOM[WAYS[-1]]} in lines:
        return
    torch.set_num_threads(1)
    given = subject(asked)
    found, rows = {"unpruned": right(given.model, given.tested)}, []

    def add(way: str, traced: TracedModel, plan: Plan, facts: dict[str, Any]) -> None:
        pruned = ekgfx.prune(given.model, plan, traced, calibrate=given.seen).eval()
        cut = right(pruned, given.tested)
        kept = folder(asked) / f"{asked.network}.{way}.repair.safetensors"
        repair = ekgfx.repair(pruned, traced, plan, given.seen, most=asked.images, seed=asked.seed, checkpoint=kept)
        print(way, repair, flush=True)
        found[way] = right(pruned, given.tested)
        rows.append(
            {
                **same,
                "tested": len(found[way]),
                "way": way,
                "macs": traced.cost(plan).macs / traced.cost().macs,
                "params": traced.cost(plan).params / traced.cost().params,
                "dropped": list(plan.dropped),
                "unpruned": float(found["unpruned"].double().mean()),
                "cut": float(cut.double().mean()),
                "repaired": float(found[way].double().mean()),
                "against_width": apart(found[way], found[WAYS[0]]),
                **facts,
                **environment(),
            }
        )

    for way in WAYS if not asked.target else WAYS[::2]:
        began = time.process_time()
        traced, result = searched(given, way, asked)
        facts = {
            "kept": result.kept_fraction,
            "steps": len(result.steps),
            "cpu_seconds": round(time.process_time() - began, 1),
        }
        add(way, traced, result.plan, facts)
        if way in RANDOM:
            add(RANDOM[way], traced, of_random_channels(traced, result.plan, asked.seed), {})
    for row in rows:  # of one run, or none: the ways are compared image by image
        lines.add(row)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", help="digits, vit, resnet50, or a factory of ekgfx.models")
    parser.add_argument("--weights")
    parser.add_argument("--data", metavar="SPEC")
    parser.add_argument("--keep", type=float, default=0.6, help="fraction of the MACs, or of the milliseconds")
    parser.add_argument("--target", help="where milliseconds are measured, such as cpu:fp32:batch=1:threads=1")
    parser.add_argument("--step", type=float, default=0.2)
    parser.add_argument("--accept", type=int, default=1)
    parser.add_argument("--align", type=int, default=1, help="widths in multiples of this")
    parser.add_argument("--images", type=int, default=320, help="to search and to repair on")
    parser.add_argument("--searched", type=int, help="of these, to search on; all by default")
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="JSON lines")
