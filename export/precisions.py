"""The same networks in several precisions, side by side: what each gets right, how large it is, how long it takes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ekgfx.errors import ExportError

from .choosing import Int8, onnx_call, to_int8
from .exporter import to_fp16
from .io import with_batch
from .latency import LatencyTable, clock_of, interleave
from .noise import FEWEST_ROUNDS
from .providers import provider
from .runners import onnx_runner

HOPELESS = 1.5
"""Times that an fp16 file takes as long as the fp32 one at batch 1, from which on it is not measured any further: CPUs
without fp16 arithmetic compute it in fp32, and convert all the while."""


@dataclass(frozen=True)
class Samples:
    """Images to quantize by and to judge by.

    calibration: as `to_int8` takes them; test: batches `(images, labels, …)`, read once, labels None where there are
    none; output: name of the output that holds the logits, None where there is one output; judged: whether the unpruned
    network has the weights that it was pruned from, without which nothing is said about its answers; threads: of the
    quantization's sessions; on_note: told what is done, in one line each.
    """

    calibration: Iterable[Any]
    test: Iterable[Any] = ()
    output: str | None = None
    judged: bool = True
    threads: int = 1
    on_note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Variant:
    """One network in one precision. name: as in the latency table; score: share of test images; None where unknown."""

    name: str
    network: str
    precision: str
    file: str
    bytes: int
    score: float | None


@dataclass(frozen=True)
class Precisions:
    """All variants. quality: what their scores are, "accuracy" or, without labels, "agreement" with the first network
    in fp32; images: on how many; int8: network → what became INT8; notes: one line each."""

    variants: tuple[Variant, ...]
    quality: str
    images: int
    int8: Mapping[str, Int8]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def name_of(network: str, precision: str) -> str:
    """A variant's name: "dense", "dense int8"."""
    return network if precision == "fp32" else f"{network} {precision}"


def write_variants(
    files: Mapping[str, str], directory: Path, inputs: Sequence[Tensor], samples: Samples, *, fp16: bool
) -> tuple[dict[str, tuple[str, str, str]], dict[str, Int8], tuple[str, ...]]:
    """Writes each fp32 file again in INT8 and, if asked, in fp16, beside it.

    Returns variants as name → (network, precision, file), the quantizations by network, and notes.
    """
    calibration = list(samples.calibration)
    found: dict[str, tuple[str, str, str]] = {network: (network, "fp32", file) for network, file in files.items()}
    made: dict[str, Int8] = {}
    notes: list[str] = []
    for network, file in files.items():
        if fp16:
            half = f"{Path(file).stem}-fp16.onnx"
            try:
                to_fp16(directory / file, directory / half, inputs)
                ratio = slower(directory / half, directory / file, with_batch(inputs, 1), samples.threads)
            except ExportError as error:
                notes.append(f"{name_of(network, 'fp16')} left out: {error}")
            else:
                if ratio < HOPELESS:
                    found[name_of(network, "fp16")] = network, "fp16", half
                else:
                    (directory / half).unlink()
                    notes.append(f"{name_of(network, 'fp16')} left out: {ratio:.1f} times as slow as fp32 at batch 1")
        samples.on_note(f"quantizing the {network} network")
        small = f"{Path(file).stem}-int8.onnx"
        made[network] = to_int8(
            directory / file, directory / small, calibration, threads=samples.threads, output=samples.output
        )
        found[name_of(network, "int8")] = network, "int8", small
        samples.on_note(f"{network}: {made[network]}")
    notes += dict.fromkeys(note for each in made.values() for note in each.notes)
    return found, made, tuple(notes)


def slower(file: Path, than: Path, inputs: tuple[Tensor, ...], threads: int) -> float:
    """How many times as long an fp16 file takes as an fp32 one, in ten runs each."""
    place, kinds = provider("cpu"), {"fp16": file, "fp32": than}
    runners = {
        kind: onnx_runner(path, place, kind, inputs, threads=threads, cpu_fallback=False)
        for kind, path in kinds.items()
    }
    times = interleave(runners, runs=FEWEST_ROUNDS, seconds=0, warmup=1, clock=clock_of(threads, on_cpu=True))
    return float(np.median(times["fp16"]) / np.median(times["fp32"]))


def judge(
    variants: Mapping[str, tuple[str, str, str]], directory: Path, samples: Samples
) -> tuple[dict[str, float], str, int]:
    """The share of right answers of each variant, or of answers that are those of the first one where the test images
    have no labels; what it is, and the number of images. Nothing where the outputs are no classes."""
    names = [name for name, (network, *_) in variants.items() if samples.judged or network != "dense"]
    calls = {name: onnx_call(directory / variants[name][2], samples.threads, samples.output) for name in names}
    right, count, quality = dict.fromkeys(names, 0), 0, "agreement"
    for batch in samples.test:
        images, labels = batch[0], batch[1] if len(batch) > 1 else None
        args = tuple(images) if isinstance(images, tuple | list) else (images,)
        said = {name: call(*args) for name, call in calls.items()}
        if any(len(found) != 1 or found[0].ndim != 2 or found[0].shape[1] < 2 for found in said.values()):
            return {}, "", 0
        answers = {name: found[0].argmax(1) for name, found in said.items()}
        if labels is not None:
            quality = "accuracy"
        truth = answers[names[0]] if labels is None else torch.as_tensor(labels)
        for name in names:
            right[name] += int((answers[name] == truth).sum())
        count += len(truth)
    return ({name: hits / count for name, hits in right.items()}, quality, count) if count else ({}, "", 0)


def faster_fp16(table: LatencyTable) -> LatencyTable:
    """The table without the timings of fp16 that are no shorter than those of the same network in fp32."""
    fp32 = {(t.provider, t.batch, t.network): t.median_ms for t in table.timings if t.precision == "fp32"}

    def slow(provider: str, batch: int, name: str) -> bool:
        network = name.removesuffix(" fp16")
        return network != name and median[provider, batch, name] >= fp32[provider, batch, network]

    median = {(t.provider, t.batch, t.network): t.median_ms for t in table.timings}
    return replace(
        table,
        timings=tuple(t for t in table.timings if not slow(t.provider, t.batch, t.network)),
        speedups=tuple(s for s in table.speedups if not slow(s.provider, s.batch, s.network)),
    )


def summary(
    variants: Mapping[str, tuple[str, str, str]],
    directory: Path,
    samples: Samples,
    made: Mapping[str, Int8],
    notes: Sequence[str],
) -> Precisions:
    """The variants with their scores and the sizes of their files."""
    scores, quality, images = judge(variants, directory, samples)
    rows = tuple(
        Variant(name, network, precision, file, _bytes(directory / file), scores.get(name))
        for name, (network, precision, file) in variants.items()
    )
    return Precisions(rows, quality, images, made, tuple(notes))


def _bytes(file: Path) -> int:
    beside = file.with_name(f"{file.name}.data")
    return file.stat().st_size + (beside.stat().st_size if beside.exists() else 0)
