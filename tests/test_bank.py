"""The memory bank: which teachers, what is stored, interrupted and damaged files."""

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ekgfx.bank import Bank, Progress, build_bank, pick_teachers
from ekgfx.bank import build as building
from ekgfx.bank.rows import RowFormat, infidelity
from ekgfx.bank.store import map_rows
from ekgfx.data.base import Batch, Loader, Split, Views
from ekgfx.errors import DataError, RunError, TrainingError
from ekgfx.files import write_json
from ekgfx.loss import softened_kl
from ekgfx.search import SearchResult, search
from ekgfx.trace import TracedModel
from tests.search import nets


@pytest.fixture(scope="module")
def searched() -> tuple[TracedModel, SearchResult]:
    traced = nets.cnn()
    return traced, search(traced, nets.batches(), flops=0.75)


def training_batches(size: int = 16, samples: int = 50) -> list[tuple[Tensor, Tensor, Tensor]]:
    images = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    index = torch.arange(samples)
    return list(zip(images.split(size), (index % 10).split(size), index.split(size), strict=True))


def answers(traced: TracedModel, result: SearchResult, step: int, batches: list[Any]) -> Tensor:
    plan = result.plans[step]
    network = traced.subnetwork(plan, batch_stats=True, rescale=plan.rescale)
    with torch.no_grad():
        return torch.cat([network(batch[0]) for batch in batches])


def test_teachers_are_spread_over_the_losses() -> None:
    # Targets 0, 2, 4, 6, 8: nearest losses, without repetition, the best first.
    losses = [0.0, 10.0, 1.9, 2.1, 4.4, 5.9, 7.9, 3.0]
    assert pick_teachers(losses) == [0, 2, 4, 5, 6]
    assert pick_teachers([5.0, 1.0, 1.0], teachers=2) == [1, 2]  # targets 1 and 3: the lower loss where equally near
    assert pick_teachers([3.0, 1.0]) == [1, 0]
    assert pick_teachers([2.0]) == [0]
    assert pick_teachers([1.0] * 7) == [0, 1, 2, 3, 4]


def test_holds_what_the_teachers_say(searched: tuple[TracedModel, SearchResult]) -> None:
    traced, result = searched
    batches = training_batches()
    bank = build_bank(traced, result, batches, teachers=3)
    steps = [teacher["step"] for teacher in bank.teachers]
    assert steps == pick_teachers(result.losses[:-1], 3)
    assert len(result.steps) not in steps  # the final sub-network does not teach
    index = torch.tensor([49, 0, 17, 17])
    found = bank.logits(index)
    assert found.shape == (4, 3, 10)
    for k, step in enumerate(steps):
        torch.testing.assert_close(found[:, k], answers(traced, result, step, batches)[index], rtol=1e-3, atol=1e-4)
        assert bank.teachers[k]["infidelity"] < 1e-6
    resident = bank.resident("cpu")
    torch.testing.assert_close(resident.logits(index), found)


def test_single_knowledge_is_the_unpruned_network(searched: tuple[TracedModel, SearchResult]) -> None:
    traced, result = searched
    bank = build_bank(traced, result, training_batches(), knowledge="single")
    assert [teacher["step"] for teacher in bank.teachers] == [0]


def test_samples_are_numbered_where_batches_do_not_say(searched: tuple[TracedModel, SearchResult]) -> None:
    traced, result = searched
    whole = build_bank(traced, result, training_batches(), teachers=1).logits(torch.arange(50))
    for batches in ([b[:2] for b in training_batches()], [b[0] for b in training_batches()]):
        assert torch.equal(build_bank(traced, result, batches, teachers=1).logits(torch.arange(50)), whole)


def test_a_bank_on_a_part_of_the_data_knows_its_samples(searched: tuple[TracedModel, SearchResult]) -> None:
    traced, result = searched
    batches = [(images, labels, 3 * index + 1) for images, labels, index in training_batches()]
    bank = build_bank(traced, result, batches, teachers=2)
    plain = build_bank(traced, result, training_batches(), teachers=2)
    index = torch.tensor([12, 0, 49])
    assert torch.equal(bank.logits(3 * index + 1), plain.logits(index))
    assert torch.equal(bank.resident("cpu").logits(3 * index + 1), plain.logits(index))
    for unknown in (0, 2, 149, 1000):
        with pytest.raises(DataError, match=f"sample {unknown} is not among the 50"):
            bank.logits(torch.tensor([1, unknown]))
    for outside in (50, -1):
        with pytest.raises(DataError, match=f"sample {outside} "):
            plain.logits(torch.tensor([outside]))


def test_files_are_memory_mapped_and_checked(searched: tuple[TracedModel, SearchResult], tmp_path: Path) -> None:
    traced, result = searched
    seen: list[Progress] = []
    bank = build_bank(traced, result, training_batches(), tmp_path / "bank", teachers=2, on_progress=seen.append)
    assert [(p.teacher, p.teachers, p.samples) for p in seen] == [(t, 2, n) for t in (1, 2) for n in (16, 32, 48, 50)]
    assert all(isinstance(rows.base.obj, mmap.mmap) for rows in bank._rows)
    again = Bank.open(tmp_path / "bank")
    assert torch.equal(again.logits(torch.arange(50)), bank.logits(torch.arange(50)))
    file = tmp_path / "bank" / "teacher-1.rows"
    assert sorted(path.name for path in file.parent.iterdir()) == ["bank.json", "teacher-0.rows", "teacher-1.rows"]
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"teacher-1.rows was changed"):
        Bank.open(tmp_path / "bank")
    file.write_bytes(content[:-1])
    with pytest.raises(RunError, match=r"cut short"):
        Bank.open(tmp_path / "bank", verify=False)


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


@pytest.mark.parametrize("after", [1, 2, 4, 5, 6, 8])
def test_goes_on_where_it_was_interrupted(
    searched: tuple[TracedModel, SearchResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Cut anywhere; a torn last row (bytes after the last note) is dropped."""
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
        build_bank(traced, result, Stopping(training_batches(), 4), tmp_path, teachers=1)
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


class Opened(Split):
    """Samples in memory that note which batches were asked for."""

    def __init__(self, batches: list[Any]) -> None:
        self.images, self.labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
        self.asked: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.images)

    def all_labels(self) -> Tensor:
        return self.labels

    def batches(self, chunks: Sequence[Tensor], views: Views) -> Iterator[Batch]:
        for chunk in chunks:
            self.asked.append(chunk)
            yield Batch(self.images[chunk], self.labels[chunk], chunk)

    def to(self, device: torch.device) -> "Opened":
        return self


def test_going_on_opens_only_what_is_missing(
    searched: tuple[TracedModel, SearchResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loader of ours; images that a teacher has answered for are not decoded again."""
    traced, result = searched
    monkeypatch.setattr(building, "SAVE_EVERY", 0.0)
    split = Opened(training_batches())

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
    assert [chunk.tolist() for chunk in split.asked] == [
        list(range(16)),  # what a row looks like
        list(range(16, 32)),  # the last note was written before the interruption came
        list(range(32, 48)),
        [48, 49],
    ]
    whole = build_bank(traced, result, training_batches(), teachers=1)
    assert torch.equal(bank.logits(torch.arange(50)), whole.logits(torch.arange(50)))


def test_a_bank_is_aligned_with_any_augmentation(searched: tuple[TracedModel, SearchResult]) -> None:
    """Shuffled, flipped, cropped views carry their sample's index, and so find the row of the un-augmented image."""
    from ekgfx import data

    traced, result = searched
    digits = data.load("digits")
    bank = build_bank(traced, result, digits.loader("train", 128, subset=range(400)), teachers=1)
    plain = torch.cat([batch.images for batch in digits.loader("train", 128, subset=range(400))])
    loader = digits.loader("train", 50, shuffle=True, augment=True, views=2, subset=range(400))
    loader.set_epoch(3)
    network = traced.subnetwork(result.plans[bank.teachers[0]["step"]], batch_stats=True, rescale=True)
    with torch.no_grad():
        answers = torch.cat([network(images) for images in plain.split(128)])
    moved = 0
    for batch in loader:
        moved += int((batch.images[0] != plain[batch.index]).any())
        torch.testing.assert_close(bank.logits(batch.index)[:, 0], answers[batch.index], rtol=1e-3, atol=1e-3)
    assert moved == 8


def test_a_finished_bank_is_not_built_again(searched: tuple[TracedModel, SearchResult], tmp_path: Path) -> None:
    traced, result = searched
    build_bank(traced, result, training_batches(), tmp_path, teachers=2)
    before = os.stat(tmp_path / "teacher-0.rows").st_mtime_ns
    build_bank(traced, result, training_batches(), tmp_path, teachers=2)
    assert os.stat(tmp_path / "teacher-0.rows").st_mtime_ns == before


def test_top_k_keeps_the_largest_and_the_mass_of_the_rest() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(64, 100)
    row = RowFormat((100,), top_k=10, temperature=4.0)
    rows = row.encode(torch.arange(64), logits)
    assert rows.dtype.itemsize == 4 + 2 * 11 + 2 * 10
    stored = row.decode(rows)
    top = logits.topk(10, dim=1)
    torch.testing.assert_close(stored.gather(1, top.indices), top.values, rtol=1e-3, atol=1e-3)
    mass = (logits / 4).softmax(1).gather(1, top.indices).sum(1)
    torch.testing.assert_close((stored / 4).softmax(1).gather(1, top.indices).sum(1), mass, rtol=1e-3, atol=1e-3)
    lost = infidelity(row, rows, logits)
    assert lost == pytest.approx(softened_kl(logits, stored, 4.0).sum().item(), rel=1e-5)
    narrower = RowFormat((100,), top_k=3, temperature=4.0)
    assert infidelity(narrower, narrower.encode(torch.arange(64), logits), logits) > 1.5 * lost


def test_many_classes_are_told_apart() -> None:
    """Also where there are more of them than 16 bits count."""
    logits = torch.zeros(2, 70_000)
    logits[0, 69_999], logits[1, 65_535] = 5.0, 6.0
    row = RowFormat((70_000,), top_k=1, temperature=1.0)
    assert row.decode(row.encode(torch.arange(2), logits)).argmax(1).tolist() == [69_999, 65_535]
    edge = RowFormat((65_536,), top_k=1, temperature=1.0)
    assert edge.decode(edge.encode(torch.arange(1), logits[1:, :65_536])).argmax(1).tolist() == [65_535]


def test_infidelity_of_top_k_is_recorded(searched: tuple[TracedModel, SearchResult], tmp_path: Path) -> None:
    traced, result = searched
    bank = build_bank(traced, result, training_batches(), tmp_path, teachers=1, top_k=3)
    full = answers(traced, result, bank.teachers[0]["step"], training_batches())
    expected = softened_kl(full, bank.logits(torch.arange(50))[:, 0], 4.0).mean().item()
    assert json.loads((tmp_path / "bank.json").read_text())["teachers"][0]["infidelity"] == pytest.approx(expected)


def test_infidelity_of_dense_logits_is_the_mean_over_their_places() -> None:
    """B × C × H × W: KL over classes at every place, summed over samples alone. Rounding to half moves 300 by 0.1."""
    torch.manual_seed(0)
    logits = 300 + torch.rand(4, 3, 2, 5)
    row = RowFormat((3, 2, 5), temperature=2.0)
    stored = logits.half().float()
    by_place = [
        softened_kl(logits[b, :, i, j], stored[b, :, i, j], 2.0) for b in range(4) for i in range(2) for j in range(5)
    ]
    lost = infidelity(row, row.encode(torch.arange(4), logits), logits)
    assert lost == pytest.approx(torch.stack(by_place).sum().item() / 10, rel=1e-4)
    assert lost > 1e-3


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell")
def test_the_system_knows_that_rows_are_read_in_random_order(tmp_path: Path) -> None:
    """It would read 128 KB around every row otherwise; VmFlags `rr` is what MADV_RANDOM leaves (proc(5))."""
    row = RowFormat((4,))
    file = tmp_path / "teacher-0.rows"
    file.write_bytes(row.encode(torch.arange(3), torch.ones(3, 4)).tobytes())
    rows = map_rows(file, row.dtype)
    assert len(rows) == 3
    _, _, of_file = Path("/proc/self/smaps").read_text().partition(str(file))
    flags = next(line for line in of_file.splitlines() if line.startswith("VmFlags:"))
    assert "rr" in flags.split()


def test_reading_needs_no_memory_for_the_whole(tmp_path: Path) -> None:
    """A sparse file of 100,000 samples × 1000 classes (200 MB): a batch is read without loading it."""
    row = RowFormat((1000,), temperature=10.0)
    with (tmp_path / "teacher-0.rows").open("wb") as file:
        file.truncate(100_000 * row.dtype.itemsize)
        file.seek(99_999 * row.dtype.itemsize)
        file.write(row.encode(torch.tensor([99_999]), torch.ones(1, 1000)).tobytes())
    rows = map_rows(tmp_path / "teacher-0.rows", row.dtype)
    bank = Bank(row, [{}], [rows])
    assert bank.logits(torch.tensor([5, 99_999])).sum(2).flatten().tolist() == [0.0, 1000.0]
    assert bank.samples == 100_000


def test_errors(searched: tuple[TracedModel, SearchResult], tmp_path: Path) -> None:
    traced, result = searched
    batches = training_batches()
    with pytest.raises(DataError, match="not an iterator"):
        build_bank(traced, result, iter(batches))
    with pytest.raises(DataError, match="no batches"):
        build_bank(traced, result, [])
    with pytest.raises(DataError, match="turn shuffling off"):
        build_bank(traced, result, [batches[1], batches[0]])
    images, labels, index = batches[0]
    with pytest.raises(DataError, match="turn shuffling off"):
        build_bank(traced, result, [(images, labels, torch.cat([index[:1], index[1:].flip(0)]))])
    with pytest.raises(DataError, match="top 10 "):
        build_bank(traced, result, batches, top_k=10)
    build_bank(traced, result, batches, tmp_path, teachers=2)
    with pytest.raises(RunError, match="another model, search or top_k"):
        build_bank(traced, result, batches, tmp_path, teachers=3)
    with pytest.raises(RunError, match="another model, search or top_k"):
        build_bank(traced, result, batches, tmp_path, teachers=2, top_k=3)
    weight = traced.model.get_parameter(next(name for name, _ in traced.model.named_parameters()))
    before = weight.detach().clone()
    weight.data += 1
    with pytest.raises(RunError, match="another model, search or top_k"):
        build_bank(traced, result, batches, tmp_path, teachers=2)
    weight.data = before
    with pytest.raises(RunError, match="cannot make the folder"):
        build_bank(traced, result, batches, tmp_path / "bank.json" / "inside")
    with pytest.raises(TrainingError, match="half precision"):
        RowFormat((2,)).encode(torch.arange(1), torch.tensor([[1e6, 0.0]]))
    manifest = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(RunError, match="upgrade"):
        Bank.open(tmp_path)
