"""Does INT8 work on every kind of network? One model of each timm module, with random weights, on small random images.

    python benchmarks/coverage.py int8 --output benchmarks/results/int8_sweep.jsonl --minutes 60
    python benchmarks/coverage.py int8 --output benchmarks/results/int8_sweep.jsonl --table

Each model is exported, quantized (min-max ranges, products with weights) from 16 images and run on 16 others, in a
process of its own; a row says the agreement with fp32 and the squared difference of the outputs in their own squares,
or why there is no file. Random weights give answers that are near to each other: the agreement is a lower bound. A
model that is in the output is not measured again; they come in the order of their sizes.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import Ended, Lines, apart, listed

TIMEOUT = 900.0
SIDE = 96
"""Of the images, where a model takes any size."""


def one_per_module(names: list[str]) -> list[str]:
    """The first model of each timm module."""
    import timm

    found: dict[str, str] = {}
    for name in names:
        if timm.is_model(name):
            found.setdefault(timm.model_entrypoint(name).__module__, name)
    return list(found.values())


def measure(name: str) -> dict[str, Any]:
    """One row."""
    import timm
    import torch
    from ekgfx.export import to_int8, to_onnx

    from ekgfx.errors import EkgfxError

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    channels, *size = model.pretrained_cfg["input_size"]
    for side in (SIDE, None):
        images = torch.randn(32, channels, *((side, side) if side else size))
        try:
            with torch.no_grad():
                model(images[:1])
        except (RuntimeError, AssertionError, ValueError):
            continue  # a model of one size only
        break
    row: dict[str, Any] = {"model": name, "module": timm.model_entrypoint(name).__module__, "side": images.shape[-1]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        try:
            to_onnx(model, images[:2], file)
            made = to_int8(file, Path(folder) / "int8.onnx", images, methods=["min-max"], scopes=["products"])
        except EkgfxError as error:
            return row | {"status": "failed", "message": str(error).replace(folder, "")[:400]}
        size_int8 = (Path(folder) / "int8.onnx").stat().st_size
        return row | {
            "status": "ok",
            "agreement": made.agreement,
            "error": made.error,
            "kept": len(made.kept),
            "bytes": [file.stat().st_size, size_int8],
        }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The counts, and a line for each model that failed or whose answers are far from those of fp32."""
    ok = [row for row in rows if row["status"] == "ok"]
    lines = [f"{len(ok)} of {len(rows)} modules quantize and run"]
    near = Counter(row["agreement"] is not None and row["agreement"] >= 0.9 for row in ok)
    lines.append(f"{near[True]} give at least 90% of the answers of fp32 (random weights)")
    lines += [f"| {row['model']} | {row['message']} |" for row in rows if row["status"] != "ok"]
    return lines


def main(asked: argparse.Namespace) -> None:
    found, end = Lines(asked.output), time.monotonic() + 60 * asked.minutes
    for name in () if asked.table else asked.models or one_per_module(listed()):
        if time.monotonic() < end and {"model": name} not in found:
            try:
                found.add(apart(measure, name, timeout=TIMEOUT))
            except Ended as ended:
                found.add({"model": name, "status": "failed", "message": str(ended)[:400]})
    print(*table(list(found)), sep="\n")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--models", type=lambda text: text.split(","))
    parser.add_argument("--table", action="store_true", help="show what is in the output; measures nothing")
