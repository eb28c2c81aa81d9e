"""A bank that was interrupted goes on where it was, and asks nobody twice."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ekgfx.bank import Bank, Progress, build_bank
from ekgfx.bank import build as building
from ekgfx.bank.rows import RowFormat
from ekgfx.base.files import write_json
from ekgfx.data.base import Loader, Views
from ekgfx.errors import RunError
from ekgfx.search import SearchResult
from ekgfx.tracing.traced import TracedModel
from tests.bank.asked import Known, training_batches


class Interrupted(Exception):
    """Stands for a kill."""


class Stopping:
    """Batches that stop with an error after a number of them; counts what it gave."""

    def __init__(self, batches: list[Any], after: int) -> None:
        self.batches, self.left = batches, after

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if not self.left:
                raise Interrupted
            self.left -= 1
            yield batch


@pytest.mark.parametrize("after", [1, 3, 5, 6, 8, 9, 10, 12])
def test_goes_on_where_it_was_interrupted(
    searched: tuple[TracedModel, SearchResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Cut anywhere: a batch is read to see what a row looks like, four for the statistics, and four for each teacher. A
    torn last row (bytes after the last note) is dropped."""
    traced, result = searched
    monkeypatch.setattr(building, "SAVE_EVERY", 0.0)
    whole = build_bank(traced, result, training_batches(), teachers=2)
    with pytest.raises(Interrupted):
        build_bank(traced, result, Stopping(training_batches(), after), tmp_path, teachers=2)
    for partial in tmp_path.glob("*.part"):
        with partial.open("ab") as file:
            file.write(b"torn")
    with pytest.raises(RunError, match="unfinished"):
        Bank.open(tmp_path)
    again = build_bank(traced, result, training_batches(), tmp_path, teachers=2)
    assert torch.equal(again.logits(torch.arange(50)), whole.logits(torch.arange(50)))
    assert [t["infidelity"] for t in again.teachers] == pytest.approx([t["infidelity"] for t in whole.teachers])


def test_going_on_with_batches_of_another_size_is_refused(
    searched: tuple[TracedModel, SearchResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows would come twice, and later ones at the wrong places."""
    traced, result = searched
    monkeypatch.setattr(building, "SAVE_EVERY", 0.0)
    with pytest.raises(Interrupted):
        build_bank(traced, result, Stopping(training_batches(), 7), tmp_path, teachers=1)
    with pytest.raises(RunError, match="another size"):
        build_bank(traced, result, training_batches(size=9), tmp_path, teachers=1)


def test_what_is_noted_is_on_disk(
    searched: tuple[TracedModel, SearchResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill right after a note must not leave fewer rows than it tells of: going on would fill the gap with zeros."""
    traced, result = searched
    monkeypatch.setattr(building, "SAVE_EVERY", 0.0)
    noted = []

    def look(path: Path, value: Any) -> None:
        if path.name == "teacher-0.json":
            rows = (tmp_path / "teacher-0.part").stat().st_size / RowFormat((10,)).dtype.itemsize
            noted.append((value["samples"], rows))
        write_json(path, value)

    monkeypatch.setattr(building, "write_json", look)
    build_bank(traced, result, training_batches(), tmp_path, teachers=1)
    assert noted == [(16, 16), (32, 32), (48, 48), (50, 50)]


def test_going_on_opens_only_what_is_missing(
    searched: tuple[TracedModel, SearchResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loader of ours; images that a teacher has answered for are not decoded again."""
    traced, result = searched
    monkeypatch.setattr(building, "SAVE_EVERY", 0.0)
    split = Known(*(torch.cat([batch[i] for batch in training_batches()]) for i in (0, 1)))

    def stop(progress: Progress) -> None:
        if progress.samples == 32:
            raise Interrupted

    with pytest.raises(Interrupted):
        build_bank(traced, result, Loader(split, torch.arange(50), 16, Views()), tmp_path, 1, on_progress=stop)
    split.asked.clear()
    with pytest.raises(RunError, match="another size"):
        build_bank(traced, result, Loader(split, torch.arange(50), 12, Views()), tmp_path, 1)
    split.asked.clear()
    bank = build_bank(traced, result, Loader(split, torch.arange(50), 16, Views()), tmp_path, 1)
    shape, *samples = split.asked[:9]
    assert shape.tolist() == list(range(16))  # what a row looks like
    for sample in (samples[:4], samples[4:]):  # what a cut changes in mixed batches: the uncut network, and it
        assert torch.cat(sample).sort().values.tolist() == list(range(50))
    assert [chunk.tolist() for chunk in split.asked[9:]] == [
        list(range(16, 32)),  # the last note was written before the interruption came
        list(range(32, 48)),
        [48, 49],
    ]
    whole = build_bank(traced, result, Loader(split, torch.arange(50), 16, Views()), teachers=1)
    assert torch.equal(bank.logits(torch.arange(50)), whole.logits(torch.arange(50)))


def test_a_finished_bank_is_not_built_again(searched: tuple[TracedModel, SearchResult], tmp_path: Path) -> None:
    traced, result = searched
    build_bank(traced, result, training_batches(), tmp_path, teachers=2)
    before = os.stat(tmp_path / "teacher-0.rows").st_mtime_ns
    build_bank(traced, result, training_batches(), tmp_path, teachers=2)
    assert os.stat(tmp_path / "teacher-0.rows").st_mtime_ns == before
