"""What the repair gives back, with the plan and the images held fixed: ResNet-50 on a few ImageNet images, ResNet-56 on
CIFAR-10, a small ViT on CIFAR-10. One thread, no labels, no training.

    python benchmarks/repair.py gain resnet50 --images folder:imagenet-sample \
        --weights resnet50-imagenet-keras-fp16.safetensors --history benchmarks/results/imagenet_sample.history.jsonl \
        --output benchmarks/results/repair.jsonl
    python benchmarks/repair.py gain resnet56 --images cifar10:DIR --weights weights_pretrained.npz \
        --history benchmarks/results/repair_resnet56.history.jsonl --keep 0.45 --output benchmarks/results/repair.jsonl
    python benchmarks/repair.py gain vit --train 8 --images cifar10:DIR --weights vit-cifar10.pt
    python benchmarks/repair.py gain vit --images cifar10:DIR --weights vit-cifar10.pt \
        --plans "L1, uniform;random, uniform" --output benchmarks/results/repair.jsonl

ResNet-50: the halves of the sample are those of `benchmarks/imagenet.py sample`; the repair sees the first, accuracy is
measured on the second. ResNet-56 and the ViT: the repair sees 500 training images, accuracy is that of the test split.
The ViT (depth 4, width 96, 6 heads, patches of 4 pixels) is trained here; its heads and its MLPs are cut, its width is
not.

Plans: EKG, from the history of a search (its steps as JSON lines; the first plan within `--keep`); L1 magnitude at
uniform widths; random channels, at EKG's widths and at uniform ones. On request also "EKG, multiples of 16" and
"random, multiples of 16, EKG's widths": its widths rounded as `benchmarks/imagenet.py int8` does it. A line of the
output is one network; one that is there is not measured again.
"""

import argparse
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Lines, chosen, environment
from parts import imagenet_sample
from plans import aligned, at_random, from_history
from timm.models import VisionTransformer
from torch import Tensor, nn

import ekgfx
from ekgfx import data as datasets
from ekgfx.data import Data
from ekgfx.graph.plan import Plan
from ekgfx.models import resnet56_cifar_projection
from ekgfx.models.weights import load_weights
from ekgfx.repair import walk
from ekgfx.surgery.calibrate import calibrate
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.evaluation import evaluate

NORMAL = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PLANS = ("EKG", "L1, uniform", "random, EKG's widths", "random, uniform")
TILES = "multiples of 16"


@dataclass(frozen=True)
class Subject:
    """A network, the images to repair it on, and what it is judged by."""

    traced: TracedModel
    data: Data
    seen: list[tuple[Tensor, Tensor]]
    asked: argparse.Namespace
    test: Any

    @property
    def images(self) -> list[Tensor]:
        """Those to repair on, without their labels."""
        return [images for images, _ in self.seen]

    def score(self, network: nn.Module) -> dict[str, float | None]:
        """Accuracy and loss on unseen images."""
        metrics = evaluate(network, self.test())
        return {"accuracy": metrics.accuracy, "loss": metrics.loss}

    def plan(self, name: str) -> Plan:
        """The plan of that name, at the budget."""
        if name.startswith("EKG") or name.endswith("EKG's widths"):
            found = from_history(self.traced, Path(self.asked.history), self.asked.keep)
            found = aligned(self.traced, found, self.asked.keep) if TILES in name else found
            return at_random(self.traced, found, self.asked.seed) if name.startswith("random") else found
        ignore = ["patch_embed.proj"] if self.asked.network == "vit" else []
        result = ekgfx.search(
            self.traced, flops=self.asked.keep, strategy="uniform", importance="magnitude", ignore=ignore
        )
        return result.plan if name == "L1, uniform" else at_random(self.traced, result.plan, self.asked.seed)


def resnet50(asked: argparse.Namespace) -> Subject:
    setting = imagenet_sample.prepare(asked)
    seen = [(batch.images, batch.labels) for batch in setting.batches(setting.seen[: asked.count])]
    return Subject(setting.traced, setting.data, seen, asked, lambda: setting.batches(setting.unseen))


def resnet56(asked: argparse.Namespace) -> Subject:
    model = resnet56_cifar_projection()
    normal: Any = model.pretrained_cfg
    return on_cifar10(asked, model, normal["mean"], normal["std"])


def vit(asked: argparse.Namespace) -> Subject:
    return on_cifar10(asked, small_vit(), *NORMAL)


def small_vit() -> nn.Module:
    how = {"class_token": False, "global_pool": "avg"}
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=6, num_classes=10, **how)


def train_vit(asked: argparse.Namespace) -> None:
    torch.manual_seed(asked.seed)
    model, data = small_vit(), datasets.load(asked.images, mean=NORMAL[0], std=NORMAL[1], seed=asked.seed)
    how = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "schedule": "cosine", "warmup": 1, "batch_size": 128}
    ekgfx.finetune(model, data, epochs=asked.train, seed=asked.seed, val_fraction=0, on_epoch=print, **how)
    torch.save(model.state_dict(), asked.weights)


def on_cifar10(asked: argparse.Namespace, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Subject:
    load_weights(model.eval(), Path(asked.weights))
    data = datasets.load(asked.images, mean=mean, std=std, seed=asked.seed)
    traced = ekgfx.trace(model, torch.randn(2, 3, 32, 32))
    order = torch.randperm(data.size("train"), generator=torch.Generator().manual_seed(asked.seed))[: asked.count]
    seen = [(batch.images, batch.labels) for batch in data.loader("train", asked.batch, subset=order)]
    return Subject(traced, data, seen, asked, lambda: data.loader("test", 500))


def measure(subject: Subject, name: str) -> dict[str, Any]:
    """One network: cut, with BatchNorm re-estimated, and repaired."""
    traced, asked = subject.traced, subject.asked
    plan = subject.plan(name)
    cost, full = traced.cost(plan), traced.cost()
    plain = ekgfx.prune(traced.model, plan, traced).eval()
    calibrate(plain, subject.images)
    pruned = ekgfx.prune(traced.model, plan, traced).eval()
    started, clock = time.process_time(), time.monotonic()
    how = {"most": asked.count, "seed": asked.seed}
    found = ekgfx.repair(pruned, traced, plan, subject.images, **how, on_layer=told)
    seconds, wall = time.process_time() - started, time.monotonic() - clock
    return {
        "macs_kept": cost.macs / full.macs,
        "reestimated": subject.score(plain),
        "repaired": subject.score(pruned),
        "kl": [found.before.error, found.after.error],
        "agreement": [found.before.agreement, found.after.agreement],
        "batch_norm": found.batch_norm,
        "operators": len(found.layers),
        "images": found.images,
        "held_out": found.held_out,
        "cpu_seconds": round(seconds, 1),
        "seconds": round(wall, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


NETWORKS = {"resnet50": resnet50, "resnet56": resnet56, "vit": vit}


def told(layer: Any, number: int, count: int) -> None:
    print(f"{number}/{count} {layer.name}: {layer.before:.3g} → {layer.after:.3g} ({layer.done})", flush=True)


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    asked.count = asked.count or (250 if asked.network == "resnet50" else 500)
    if asked.train:
        train_vit(asked)
        return
    if asked.blind:
        walk.find_clamp = lambda *_: None
    subject = NETWORKS[asked.network](asked)
    lines = Lines(asked.output)
    for name in asked.plans:
        row = {"plan": name, **chosen(asked, "network", "keep", "count", "seed")}
        row |= {"blind": True} if asked.blind else {}
        if row in lines:
            continue
        if not any("before" in line and line["network"] == asked.network for line in lines):
            row["before"] = subject.score(subject.traced.model)
        lines.add({**row, **measure(subject, name), **environment()})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--images", required=True, help="data SPEC")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--train", type=int, default=0, help="epochs of the ViT, whose weights are written then")
    parser.add_argument("--history", help="steps of EKG's search, as JSON lines")
    parser.add_argument("--output", help="JSON lines")
    parser.add_argument("--keep", type=float, default=0.55)
    parser.add_argument("--count", type=int, help="images to repair on")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--blind", action="store_true", help="do not look at what activations pass on")
    parser.add_argument("--test-images", type=int, default=250)
    parser.add_argument("--plans", type=lambda text: text.split(";"), default=list(PLANS))
    parser.add_argument("--seed", type=int, default=0)
