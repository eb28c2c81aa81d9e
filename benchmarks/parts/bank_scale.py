"""Does a memory bank of ImageNet's size need memory, and does reading it slow training's loader down? Measured.

    python benchmarks/bank.py scale --images folder:imagenet-sample --weights resnet50-imagenet-keras-fp16.safetensors \
        --output benchmarks/results/bank_scale.json

Four parts, 1000 classes and 5 teachers throughout; parts that are in the output are not measured again.

    build      `build_bank` for growing numbers of samples, a process for each: peak resident memory, rows per second.
               The teachers are a small network on random images, so that the bank and not the network is measured.
    read       random batches from a bank of 1,281,167 samples (sparse files of the full 12.8 GB), and from the largest
               bank built with the page cache dropped: rows per second; memory that belongs to the process.
    loader     image files decoded, cropped twice and flipped, with and without the bank's rows for every batch,
               alternating in one process; medians.
    fidelity   what top-k loses (mean KL_T) on real predictions of ResNet-50, against bytes per row.

The extrapolation to 1,281,167 samples is a straight line through the builds' peak memory; disk is exact.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Sheet, apart, resident
from torch import Tensor

import ekgfx
from ekgfx.bank import Bank, build_bank
from ekgfx.bank.rows import RowFormat, infidelity
from ekgfx.bank.store import map_rows, rows_file
from ekgfx.data.base import Batch, Loader, Split, Views
from ekgfx.models import digits_cnn, source
from ekgfx.pipeline import job

IMAGENET, CLASSES, TEACHERS, TEMPERATURE = 1_281_167, 1000, 5, 10.0
BATCH = 256


@dataclass(frozen=True)
class RandomImages(Split):
    """`count` images of 1×8×8 that are made when asked for, the same every time."""

    count: int

    def __len__(self) -> int:
        return self.count

    def all_labels(self) -> None:
        return None

    def batches(self, chunks: Sequence[Tensor], views: Views) -> Iterator[Batch]:
        for chunk in chunks:
            draw = torch.Generator().manual_seed(int(chunk[0]))
            yield Batch(torch.randn(len(chunk), 1, 8, 8, generator=draw), None, chunk)

    def to(self, device: torch.device) -> "RandomImages":
        return self


def build(folder: Path, samples: int) -> dict[str, Any]:
    """A whole bank in `folder`, in this process, which does nothing else."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    traced = ekgfx.trace(digits_cnn(num_classes=CLASSES).eval(), torch.randn(2, 1, 8, 8))
    result = ekgfx.search(traced, [torch.randn(64, 1, 8, 8)], flops=0.8, step=0.1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    bank = build_bank(traced, result, Loader(RandomImages(samples), torch.arange(samples), BATCH, Views()), folder)
    seconds = time.monotonic() - start
    assert len(bank.teachers) == TEACHERS
    return {
        "samples": samples,
        "bytes": sum(rows_file(folder, k).stat().st_size for k in range(TEACHERS)),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_before_mib": before / 1024,
        "rows_per_second": round(samples * TEACHERS / seconds),
        "infidelity": max(teacher["infidelity"] for teacher in bank.teachers),
    }


def sparse(folder: Path, samples: int) -> Bank:
    """A bank of zeros that takes no disk: files with holes, of the full length."""
    row = RowFormat((CLASSES,), temperature=TEMPERATURE)
    for k in range(TEACHERS):
        with rows_file(folder, k).open("wb") as file:
            file.truncate((samples - 1) * row.dtype.itemsize)
            file.seek(0, os.SEEK_END)
            file.write(row.encode(torch.tensor([samples - 1]), torch.zeros(1, CLASSES)).tobytes())
    rows = [map_rows(rows_file(folder, k), row.dtype) for k in range(TEACHERS)]
    return Bank(row, [{}] * TEACHERS, rows)


def read(bank: Bank, batches: int) -> dict[str, Any]:
    """Random batches: rows (of all teachers) per second, and how the process's own memory grew."""
    draw = torch.Generator().manual_seed(0)
    bank.logits(torch.zeros(BATCH, dtype=torch.long))
    before, start = own_memory(), time.monotonic()
    for _ in range(batches):
        bank.logits(torch.randint(bank.samples, (BATCH,), generator=draw))
    seconds = time.monotonic() - start
    return {
        "samples": bank.samples,
        "images_per_second": round(batches * BATCH / seconds),
        "batch_ms": round(1000 * seconds / batches, 2),
        "own_memory_grew_mib": round(own_memory() - before, 1),
    }


def own_memory() -> float:
    """Memory that belongs to this process alone, in MiB. (Pages of mapped files are the system's to take back.)"""
    return resident("RssAnon") / 1024


def drop_from_cache(folder: Path) -> None:
    for k in range(TEACHERS):
        with rows_file(folder, k).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loader(asked: argparse.Namespace, bank: Bank) -> dict[str, Any]:
    """Seconds of an epoch over the image files, two views each, without and with the bank's rows."""
    built = source.parse("timm:resnet50", "none").build()
    data = job.open_data(asked.images, built, 0)
    found: dict[str, list[float]] = {"alone": [], "with bank": []}
    draw = torch.Generator().manual_seed(1)
    count = data.size("train")
    images = data.loader("train", 64, shuffle=True, augment=True, views=2, subset=range(min(count, asked.loaded)))
    for epoch in range(asked.rounds):
        for name in found if epoch % 2 else reversed(found):
            images.set_epoch(epoch)
            start = time.monotonic()
            for batch in images:
                if name == "with bank":
                    bank.logits(torch.randint(bank.samples, (len(batch.index),), generator=draw))
            found[name].append(time.monotonic() - start)
    medians = {name: statistics.median(times) for name, times in found.items()}
    return {
        "images": images.samples,
        "seconds": found,
        "images_per_second": {name: round(images.samples / median, 1) for name, median in medians.items()},
        "ratio": round(medians["with bank"] / medians["alone"], 4),
    }


def fidelity(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Loss of fidelity of top-k on the predictions of ResNet-50."""
    from ekgfx.models.weights import load_weights

    example = Path(__file__).resolve().parents[2] / "examples" / "resnet50_keras.py"
    built = source.parse(f"{example}:resnet50", "none").build()
    load_weights(built.model, Path(asked.weights))
    data = job.open_data(asked.images, built, 0)
    with torch.no_grad():
        logits = torch.cat([built.model(b.images) for b in data.loader("train", 50, subset=range(asked.predicted))])
    lines = []
    for k in (None, 200, 100, 50, 20, 10, 5):
        row = RowFormat((CLASSES,), k, TEMPERATURE)
        rows = row.encode(torch.arange(len(logits)), logits)
        lost = infidelity(row, rows, logits) / len(logits)
        size = row.dtype.itemsize
        gigabytes = round(IMAGENET * TEACHERS * size / 1e9, 2)
        lines.append({"top_k": k, "bytes_per_row": size, "imagenet_gb": gigabytes, "infidelity": lost})
    spread = torch.log_softmax(logits / TEMPERATURE, 1)
    uniform = float(TEMPERATURE * (spread.exp() * (spread + np.log(CLASSES))).sum(1).mean())
    return [*lines, {"top_k": "uniform", "bytes_per_row": 0, "imagenet_gb": 0.0, "infidelity": uniform}]


def extrapolate(builds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Peak memory as a line in the number of samples, at ImageNet's."""
    slope, base = np.polyfit([b["samples"] for b in builds], [b["peak_mib"] for b in builds], 1)
    size = RowFormat((CLASSES,)).dtype.itemsize
    return {
        "peak_mib_at_imagenet": round(base + slope * IMAGENET),
        "bytes_per_sample_in_memory": round(slope * 2**20, 2),
        "bytes_per_sample_on_disk": TEACHERS * size,
        "disk_gb_at_imagenet": round(IMAGENET * TEACHERS * size / 1e9, 2),
    }


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    found = Sheet(asked.output, builds=[])
    for samples in asked.samples:
        if samples in [b["samples"] for b in found["builds"]] and (samples != max(asked.samples) or "read" in found):
            continue
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            line = apart(build, Path(folder), samples)
            found.keep(builds=[b for b in found["builds"] if b["samples"] != samples] + [line])
            if samples == max(asked.samples):
                bank = Bank.open(folder)
                warm = read(bank, asked.batches)
                del bank
                drop_from_cache(Path(folder))
                found.keep(read={"warm": warm, "cache dropped": read(Bank.open(folder, verify=False), asked.batches)})
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        full = sparse(Path(folder), IMAGENET)
        if "full size" not in found["read"]:
            found.keep(read={**found["read"], "full size": read(full, asked.batches)})
        if asked.images and "loader" not in found:
            found.keep(loader=loader(asked, full))
    if asked.images and asked.weights and "fidelity" not in found:
        found.keep(fidelity=fidelity(asked))
    found.keep(extrapolation=extrapolate(found["builds"]))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help="JSON")
    parser.add_argument("--images", help="data SPEC of image files; without it the loader is not measured")
    parser.add_argument("--weights", help="of examples/resnet50_keras.py; without it fidelity is not measured")
    parser.add_argument(
        "--samples", type=lambda text: [int(part) for part in text.split(",")], default=[10_000, 40_000, 160_000]
    )
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--loaded", type=int, default=256, help="images per epoch of the loader")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--predicted", type=int, default=200, help="images whose predictions fidelity is measured on")
    parser.add_argument("--folder", help="where to put the banks for the time being  [default: the system's]")
