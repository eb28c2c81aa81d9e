"""How a row is stored, what that loses, and how rows are read."""

import json
from pathlib import Path

import pytest
import torch

from ekgfx.bank import Bank, build_bank
from ekgfx.bank.rows import RowFormat, infidelity
from ekgfx.bank.store import map_rows
from ekgfx.search import SearchResult
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.loss import softened_kl
from tests.bank.asked import answers, training_batches


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
