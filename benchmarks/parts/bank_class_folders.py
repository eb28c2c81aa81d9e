"""What the memory bank knows of images that lie in class folders, and what that does to fine-tuning.

    EKGFX_DATA=DIR python benchmarks/bank.py class-folders --output benchmarks/results/class_folders.json

DIR holds `cifar10/` (the data set, as `cifar10:DIR/cifar10` reads it) and `weights/resnet20-cifar10.safetensors`. Some
of CIFAR-10's training images are written as PNG files into a folder for each class; ResNet-20 is searched on them, and
its teachers fill three banks:

    folder order      BatchNorm by the statistics of each batch, in the order of the files (ekgfx before 2026-11-29)
    mixed             the same, in a random order
    corrected         by its running averages, corrected by what the cut changed on 1,024 images (`build_bank`)

Then the pruned network is fine-tuned with some of the banks, and with labels alone. Test images are CIFAR-10's own. One
thread, CPU seconds.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment
from PIL import Image
from torch import Tensor

import ekgfx
from ekgfx import data as datasets
from ekgfx.bank import Bank, build_bank
from ekgfx.bank.rows import RowFormat
from ekgfx.base.files import write_json
from ekgfx.models import resnet20_cifar
from ekgfx.runs.checkpoint import load_tensors
from ekgfx.training.evaluation import evaluate

BATCH = 256
WAYS = ["folder order", "corrected", "labels alone", "mixed"]


def class_folders(root: Path, folder: Path, samples: int, tests: int) -> datasets.Data:
    """The first images of CIFAR-10's splits as PNG files, one folder for each class."""
    source = datasets.load(f"cifar10:{root / 'cifar10'}")
    for split, name, count in (("train", "train", samples), ("test", "val", tests)):
        opened = source.split(split)
        assert isinstance(opened, datasets.arrays.ArraySplit) and opened.labels is not None
        for number in range(count):
            place = folder / name / f"class{int(opened.labels[number])}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = opened.images[number].movedim(0, 2).numpy()
            Image.fromarray(pixels).save(place / f"{number:05}.png")
    return datasets.load(f"folder:{folder}", classes=10, image_size=32)


def by_batches(traced: ekgfx.TracedModel, result: Any, steps: Sequence[int], batches: datasets.Loader) -> Bank:
    """A bank whose teachers took the statistics of each batch."""
    row, parts = RowFormat((10,)), []
    for step in steps:
        plan = result.plans[step]
        network = traced.subnetwork(plan, batch_stats=True, rescale=plan.rescale)
        with torch.no_grad():
            rows = [row.encode(batch.index, network(batch.images)) for batch in batches]
        whole = np.concatenate(rows)
        parts.append(whole[np.argsort(whole["sample"])])
    return Bank(row, [{}] * len(steps), parts)


def right(bank: Bank, labels: Tensor) -> list[float]:
    """The accuracy of each teacher on the training images, as recorded."""
    said = bank.logits(torch.arange(len(labels))).argmax(2)
    return (said == labels[:, None]).double().mean(0).tolist()


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    root, start = Path(os.environ["EKGFX_DATA"]), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(asked, root, Path(folder))
    found |= {
        "settings": {key: value for key, value in vars(asked).items() if key != "output"},
        "cpu_seconds": round(time.process_time() - start),
        **environment(),
    }
    print(json.dumps(found, indent=1))
    if asked.output is not None:
        write_json(asked.output, found)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--tests", type=int, default=1000)
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--accept", type=int, default=4, help="candidates that a step of the search takes together")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS, help="what is fine-tuned with")
    parser.add_argument("--output", type=Path)


def measure(asked: argparse.Namespace, root: Path, folder: Path) -> dict[str, Any]:
    data = class_folders(root, folder, asked.samples, asked.tests)
    labels, test = data.labels("train"), data.loader("test", BATCH)
    assert labels is not None
    model = resnet20_cifar()
    load_tensors(model, root / "weights" / "resnet20-cifar10.safetensors")
    traced = ekgfx.trace(model.eval(), torch.zeros(2, 3, 32, 32))
    _, chosen = data.search_subset(0, 16, seed=0)
    result = ekgfx.search(
        traced, list(data.loader("train", BATCH, subset=chosen)), flops=asked.flops, accept=asked.accept
    )
    corrected = build_bank(traced, result, data.loader("train", BATCH))
    steps = [teacher["step"] for teacher in corrected.teachers]
    files = data.loader("train", BATCH, subset=range(asked.samples))
    banks = {
        "folder order": by_batches(traced, result, steps, files),
        "mixed": by_batches(traced, result, steps, files.mixed()),
        "corrected": corrected,
    }
    found: dict[str, Any] = {
        "unpruned, evaluation mode": evaluate(model, files).accuracy,
        "teachers": {name: right(bank, labels) for name, bank in banks.items()},
        "finetuned": {},
    }
    print(json.dumps(found), flush=True)
    for name in asked.ways:
        bank, scores = banks.get(name), []
        for seed in range(asked.seeds):
            pruned = ekgfx.prune(model, result.plan, traced, calibrate=data.loader("train", BATCH).mixed(1024))
            found["searched"] = evaluate(pruned, test).accuracy
            ekgfx.finetune(pruned, data, bank=bank, epochs=asked.epochs, seed=seed, channels_last=True, val_fraction=0)
            scores.append(evaluate(pruned, test).accuracy)
            print(name, seed, scores[-1], flush=True)
        found["finetuned"][name] = {"accuracy": scores, "mean": statistics.mean(scores)}
    return found
