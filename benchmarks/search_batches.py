"""What validation batches do to a search's result and time: the paper's, smaller ones, and the hardest images first.

    python benchmarks/search_batches.py --data cifar10:DIR --weights resnet56-cifar10.safetensors --output FOLDER

CIFAR's ResNet-56 after step 0 (of seed 0) is searched to `--keep` of its MACs with each kind of batches, on the images
that each of `--seeds` draws. Then: test accuracy with BatchNorm estimated anew, and after one epoch on `--images`
training images. One thread, CPU seconds. Searches go on from FOLDER, and what is in its results is not done again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ekgfx
from ekgfx import data as datasets
from ekgfx.evaluation import evaluate, reestimate_batch_norm
from ekgfx.files import append_line, read_lines
from ekgfx.finetune import finetune
from ekgfx.models import resnet56_cifar
from ekgfx.prepare import hardness_order, prepare
from ekgfx.search import SearchResult, Step
from ekgfx.trace import TracedModel
from ekgfx.weights import load_weights

KINDS = {"256": (256, False), "64": (64, False), "64 hardest first": (64, True)}
"""Samples in a batch, and whether the hardest come first."""


def main() -> None:
    asked = arguments()
    torch.set_num_threads(1)
    folder = Path(asked.output)
    folder.mkdir(parents=True, exist_ok=True)
    normal = resnet56_cifar().pretrained_cfg
    data = datasets.load(asked.data, mean=normal["mean"], std=normal["std"])
    results = folder / "results.jsonl"
    for seed in asked.seeds:
        for kind in asked.kinds:
            if any((line["seed"], line["kind"]) == (seed, kind) for line in read_lines(results)):
                continue
            model = after_step_0(data, asked.weights, folder)
            history = folder / f"search-{kind.replace(' ', '-')}-{seed}.jsonl"
            traced, found = searched(model, batches(model, data, kind, seed), asked.keep, history)
            pruned = ekgfx.prune(model, found.plan, traced)
            reestimate_batch_norm(pruned, data.loader("train", 256, shuffle=True, seed=0), 16)
            test = data.loader("test", 256)
            line: dict[str, Any] = {"seed": seed, "kind": kind, "keep": asked.keep, "steps": len(found.steps)}
            line |= {"seconds": sum(step["cpu"] for step in read_lines(history.with_suffix(".seconds")))}
            line |= {"params": traced.cost(found.plan).params / traced.cost().params}
            line |= {"before": evaluate(pruned, test).accuracy}
            subset = torch.randperm(data.size("train"), generator=torch.Generator().manual_seed(0))[: asked.images]
            finetune(pruned, data, subset=subset, epochs=1, lr=0.01, batch_size=128, schedule="constant")
            line |= {"after": evaluate(pruned, test).accuracy}
            append_line(results, line)
            print(line, flush=True)


def after_step_0(data: datasets.Data, weights: str, folder: Path) -> nn.Module:
    """ResNet-56 with its weights after step 0, which is done once."""
    model, file = resnet56_cifar(), folder / "prepared.pt"
    if file.exists():
        model.load_state_dict(torch.load(file))
    else:
        load_weights(model, Path(weights))
        prepare(model, data)
        torch.save(model.state_dict(), file)
    return model.eval()


def batches(model: nn.Module, data: datasets.Data, kind: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The validation batches of a kind, of the images that `seed` draws."""
    size, hardest_first = KINDS[kind]
    _, val = data.search_subset(256, 32, seed)
    if hardest_first:
        val = val[hardness_order(model, data.loader("train", size, subset=val))]
    return [(batch.images, batch.labels) for batch in data.loader("train", size, subset=val)]


def searched(model: nn.Module, batches: Any, keep: float, history: Path) -> tuple[TracedModel, SearchResult]:
    """The search, resumed from its history; the CPU seconds of each step are noted beside."""
    traced, last = ekgfx.trace(model, batches[0][0][:2]), [time.process_time()]

    def note(step: Step) -> None:
        now = time.process_time()
        append_line(history, step.to_json())
        append_line(history.with_suffix(".seconds"), {"step": step.number, "cpu": now - last[0]})
        last[0] = now

    return traced, ekgfx.search(traced, batches, flops=keep, on_step=note, resume_from=read_lines(history))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="cifar10:data/cifar10")
    parser.add_argument("--weights", default="data/weights/resnet56-cifar10.safetensors")
    parser.add_argument("--output", required=True)
    parser.add_argument("--keep", type=float, default=0.45)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--images", type=int, default=12_800)
    return parser.parse_args()


if __name__ == "__main__":
    main()
