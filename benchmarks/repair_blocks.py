"""Does a label-free distillation, block by block, find more right answers after the repair? On small networks.

    python benchmarks/repair_blocks.py resnet20 --images cifar10:DIR --weights resnet20-cifar10.safetensors \
        --output benchmarks/results/repair_blocks.jsonl

Each network is cut by L1 magnitude at uniform widths, and repaired twice on the same images, without the distillation
(`epochs=0`) and with it. Accuracy and loss are those of test images. A line of the output is one plan and one draw of
images; one that is there is not measured again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import ranking
import torch
from common import Lines, chosen, environment

import ekgfx
from ekgfx import data as datasets
from ekgfx.models import resnet20_cifar, resnet56_cifar_projection
from ekgfx.models.weights import load_weights
from ekgfx.training.evaluation import evaluate

NETWORKS = {"resnet20": resnet20_cifar, "resnet56": resnet56_cifar_projection}


def measure(asked: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The network before and after the repair, and after one with a distillation."""
    model = NETWORKS[asked.network]().eval()
    load_weights(model, Path(asked.weights))
    normal: Any = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (normal["mean"], normal["std"]) if asked.network == "resnet56" else ranking.NORMAL[asked.network]
    data = datasets.load(asked.images, mean=mean, std=std, seed=seed)
    traced = ekgfx.trace(model, torch.zeros(2, 3, 32, 32))
    plan = ekgfx.search(traced, flops=asked.keep, strategy="uniform", importance="magnitude").plan
    order = torch.randperm(data.size("train"), generator=torch.Generator().manual_seed(seed))[: asked.count]
    images = torch.cat([batch.images for batch in data.loader("train", 500, subset=order)])
    found: dict[str, Any] = {}
    for name, epochs in (("repaired", 0), ("distilled", asked.epochs)):
        pruned = ekgfx.prune(model, plan, traced).eval()
        clock = time.process_time()
        told = ekgfx.repair(pruned, traced, plan, images, most=asked.count, epochs=epochs)
        seconds = time.process_time() - clock
        score = evaluate(pruned, data.loader("test", 500, subset=torch.arange(asked.test_images)))
        found[name] = {"accuracy": score.accuracy, "loss": score.loss, "kl": told.after.error}
        found[name] |= {"cpu_seconds": round(seconds, 1), "blocks": [block.epoch for block in told.blocks]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("network", choices=[*NETWORKS])
    parser.add_argument("--images", required=True, help="data SPEC")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--count", type=int, default=300, help="images to repair and to distil on")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20, help="of each block")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the images that are drawn")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines(asked.output)
    for seed in asked.seeds:
        row = {**chosen(asked, "network", "keep", "count", "test_images", "epochs"), "seed": seed}
        if row not in lines:
            lines.add({**row, **measure(asked, seed), **environment()})


if __name__ == "__main__":
    main()
