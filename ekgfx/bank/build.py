"""Building a memory bank: every teacher answers for every training sample, one pass each, resumable."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import torch

from ekgfx.bank.norms import noted
from ekgfx.bank.rows import RowFormat, Rows, infidelity
from ekgfx.bank.store import FORMAT, MANIFEST, Bank, read_manifest, rows_file
from ekgfx.bank.teachers import STATISTICS, Teacher, drawn, onto, pick_teachers
from ekgfx.base.files import checksum, read_json, write_json
from ekgfx.base.schema import read
from ekgfx.data import Loader
from ekgfx.data.numbered import numbered
from ekgfx.distributed.team import ALONE, Team, team
from ekgfx.errors import DataError, PlanError, RunError
from ekgfx.search.result import SearchResult
from ekgfx.tracing.traced import TracedModel, check_traced
from ekgfx.training.loss import default_temperature
from ekgfx.training.outputs import Logits, finder, logits_of

SAVE_EVERY = 5.0
"""Seconds between two notes of how far a teacher's file has come: what a kill can cost."""


class Progress(NamedTuple):
    """Teacher `teacher` of `teachers` (from 1) has answered for `samples` so far; the whole took `seconds`."""

    teacher: int
    teachers: int
    samples: int
    seconds: float


def build_bank(
    traced: TracedModel,
    result: SearchResult,
    batches: Iterable[Any],
    path: str | Path | None = None,
    teachers: int = 5,
    *,
    knowledge: Literal["ensemble", "single"] = "ensemble",
    top_k: int | None = None,
    logits: Logits = logits_of,
    on_progress: Callable[[Progress], None] | None = None,
    parallel: bool = False,
) -> Bank:
    """Ask the interim sub-networks about every training image: ℳ = { M_k = O(D_train; T_k) } (eq. 10).

    Args:
        traced: the model that was searched, with the same weights.
        result: the search's result; its history gives the teachers.
        batches: un-augmented training batches in index order, iterated once per teacher: `(images, labels, index)`, or
            `(images, labels)` or images, numbered from 0, or mappings (`ekgfx.data.batches`). (A loader of `ekgfx.data`
            may have any order.) They may be sorted by class: a teacher's BatchNorms keep the unpruned network's
            running averages, corrected once by what the cut changed on 1,024 samples drawn from all of them; where
            there are BatchNorms, batches that are no loader of `ekgfx.data` are read once more for that.
        path: folder for the bank; None keeps it in memory. A bank that was interrupted goes on where it stopped.
        teachers: K.
        knowledge: "ensemble" takes K sub-networks of the history, "single" the unpruned network alone.
        top_k: keep only the k largest logits of each sample. What any storage loses is recorded for every teacher:
            `infidelity`, the mean KL_T of the stored from the full prediction.
        logits: where the logits B × C × … are in a model's output, as in `search`.
        on_progress: called after every batch.
        parallel: all processes of torchrun call this together and share the batches out; the first writes the bank, the
            same bytes as if it had been alone, and all open it (so its folder must be one that they all see).

    Returns:
        The bank, memory-mapped where it has a folder.

    Raises:
        RunError: the folder holds the bank of another search, or cannot be written.
        DataError: the batches are missing, or not in index order.
        PlanError: `result` is no result of a search.

    Example:
        >>> bank = ekgfx.build_bank(traced, result, data.loader("train", 256), teachers=3)
        >>> ekgfx.finetune(pruned, data, bank=bank, epochs=1, batch_size=64, lr=0.01)
    """
    check_traced(traced, "build_bank")
    if not isinstance(result, SearchResult):
        raise PlanError(
            f"the bank is built of a search's result, whose steps are the teachers, not of a {type(result).__name__}: "
            "result = ekgfx.search(…)"
        )
    if isinstance(batches, Iterator):
        raise DataError("the bank reads the batches once per teacher; give a list or a DataLoader, not an iterator")
    picked = pick_teachers(result.losses[:-1] or result.losses, teachers) if knowledge == "ensemble" else [0]
    batches = batches.in_order() if isinstance(batches, Loader) else numbered(batches, in_order=True)
    networks = [Teacher(traced, result, step, finder(logits)) for step in picked]
    row = _row_format(networks[0], batches, top_k)
    sample = cache(lambda: drawn(traced, batches))
    uncut = cache(lambda: noted(traced, onto(traced, sample())))
    mates = team() if parallel else ALONE
    start = time.monotonic()

    def progress(number: int, samples: int) -> None:
        if on_progress is not None:
            on_progress(Progress(number + 1, len(picked), samples, time.monotonic() - start))

    with tempfile.TemporaryDirectory() as temporary:
        folder = mates.broadcast_object(Path(temporary if path is None else path).resolve())
        record = _begin(folder, row, result, picked, _fingerprint(traced, result, picked)) if mates.first else None
        record = mates.broadcast_object(record)
        for number, network in enumerate(networks):
            if "file" in record["teachers"][number]:
                continue
            known = mates.broadcast_object(network.statistics(sample(), uncut()) if mates.first else None)
            teacher = replace(network, known=known)
            if mates.first:
                record["teachers"][number] |= _write_rows(folder, number, row, teacher, batches, progress, mates)
                write_json(folder / MANIFEST, record)
            else:
                for _ in encoded(row, teacher, batches, mates.broadcast_object(0), mates):
                    pass  # the first one writes it
        record = mates.broadcast_object(record)
        if path is None:
            rows = [np.fromfile(rows_file(folder, number), row.dtype) for number in range(len(picked))]
            mates.all_gather_object("read")  # before the first one's folder goes
            return Bank(row, record["teachers"], rows)
    return Bank.open(folder, verify=False)


def encoded(
    row: RowFormat, teacher: Teacher, batches: Iterable[Any], skip: int, mates: Team
) -> Iterator[tuple[Rows, float]]:
    """A teacher's rows and their infidelity, batch by batch in order, whoever computed them."""
    mine = (
        (rows, infidelity(row, rows, logits))
        for index, logits in teacher.answers(batches, skip, mates)
        for rows in [row.encode(index, logits)]
    )
    if mates.size == 1:
        yield from mine
        return
    while any(said := mates.all_gather_object(next(mine, None))):
        yield from (each for each in said if each is not None)


def _row_format(teacher: Teacher, batches: Iterable[Any], top_k: int | None) -> RowFormat:
    _, logits = next(teacher.answers(batches))
    shape = tuple(logits.shape[1:])
    if top_k is not None and not (len(shape) == 1 and 0 < top_k < shape[0]):
        raise DataError(f"cannot keep the top {top_k} of logits of shape {shape}; give a number below the class count")
    return RowFormat(shape, top_k, default_temperature(shape[0]))


def _write_rows(
    folder: Path,
    number: int,
    row: RowFormat,
    teacher: Teacher,
    batches: Iterable[Any],
    progress: Callable[[int, int], None],
    mates: Team,
) -> dict[str, Any]:
    """Write one teacher's file, going on after the rows that an interrupted run has noted. Returns its description."""
    partial, note, whole = (
        folder / f"teacher-{number}.part",
        folder / f"teacher-{number}.json",
        rows_file(folder, number),
    )
    done: dict[str, Any] = {"samples": 0, "infidelity": 0.0}
    if note.is_file() and partial.is_file():
        done = asdict(read(_Note, read_json(note), str(note), RunError))
    try:
        with partial.open("r+b" if done["samples"] else "wb") as file:
            file.truncate(done["samples"] * row.dtype.itemsize)
            file.seek(0, os.SEEK_END)
            saved = time.monotonic()
            for rows, lost in encoded(row, teacher, batches, mates.broadcast_object(done["samples"]), mates):
                file.write(rows.tobytes())
                done["samples"] += len(rows)
                done["infidelity"] += lost
                progress(number, done["samples"])
                if time.monotonic() - saved >= SAVE_EVERY:
                    _flush(file)
                    write_json(note, done)
                    saved = time.monotonic()
            _flush(file)
        os.replace(partial, whole)
    except OSError as error:
        raise RunError(
            f"cannot write the memory bank at {folder}: {error.strerror or error}; free some space, or choose another "
            "folder, and build it again: it goes on where it stopped"
        ) from error
    note.unlink(missing_ok=True)
    return {"infidelity": done["infidelity"] / done["samples"], "file": checksum(whole)}


@dataclass(frozen=True)
class _Note:
    """How far an unfinished file has come."""

    samples: int
    infidelity: float


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _begin(
    folder: Path, row: RowFormat, result: SearchResult, picked: Sequence[int], fingerprint: str
) -> dict[str, Any]:
    """The manifest of a new bank, or of the one that this call goes on with."""
    fresh = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "shape": list(row.shape),
        "top_k": row.top_k,
        "temperature": row.temperature,
        "teachers": [{"step": step, "loss": result.losses[step]} for step in picked],
    }
    if (folder / MANIFEST).is_file():
        read_manifest(folder)  # refuses a damaged one
        record: dict[str, Any] = read_json(folder / MANIFEST)
        if any(record.get(key) != fresh[key] for key in ("format", "fingerprint", "shape", "top_k")):
            raise RunError(f"{folder} holds the memory bank of another model, search or top_k; choose another folder")
        return record
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    write_json(folder / MANIFEST, fresh)
    return fresh


def _fingerprint(traced: TracedModel, result: SearchResult, picked: Sequence[int]) -> str:
    """What a bank depends on: the weights, the teachers' plans, and how their statistics are taken."""
    digest = hashlib.sha256(f"averages corrected on {STATISTICS} samples".encode())
    for name, value in sorted(traced.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    for step in picked:
        digest.update(result.plans[step].to_json().encode())
    return digest.hexdigest()
