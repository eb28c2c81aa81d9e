"""Sorted batches are recognized, mixed ones are not; mixed batches are made of sorted ones."""

import logging

import pytest
import torch

from ekgfx.data.mixing import Mixture, even, mixed, warn, watched


def fault(labels: torch.Tensor, size: int, known: int | None = None) -> str | None:
    mixture = Mixture()
    for batch in labels.split(size):
        mixture.see(batch)
    return mixture.fault(known)


def test_what_is_counted() -> None:
    """Two batches of one class each, 20 samples: all 90 pairs of a batch are alike; of all 190 pairs 90 are."""
    said = fault(torch.arange(20) // 10, 10)
    assert said == (
        "they come sorted by class: two samples of one batch share their class in 100% of all cases, any two in 47%"
    )


@pytest.mark.parametrize(("classes", "size", "count"), [(2, 8, 64), (10, 64, 640), (10, 256, 2000), (100, 32, 3200)])
def test_sorted_batches_are_told_from_mixed_ones(classes: int, size: int, count: int) -> None:
    labels = torch.arange(count) * classes // count
    assert fault(labels, size) is not None
    draw = torch.Generator().manual_seed(0)
    for _ in range(100):
        assert fault(labels[torch.randperm(count, generator=draw)], size) is None


def test_rare_classes_and_few_samples_are_no_fault() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(100):
        assert fault((torch.rand(512, generator=draw) < 0.02).long(), 32, known=2) is None
        assert fault(torch.randint(2, (12,), generator=draw), 4) is None
    assert fault(torch.arange(100) // 10, 1) is None  # nothing shares a batch with anything
    assert fault(torch.arange(100) // 10, 100) is None  # one batch is all there is


def test_a_beginning_of_sorted_samples_has_one_class() -> None:
    assert fault(torch.full((64,), 3), 16, known=10) == "all 64 samples are of class 3, of 10"
    assert fault(torch.full((64,), 3), 16) is None
    assert fault(torch.full((64,), 0), 16, known=1) is None


def test_soft_labels_count_by_their_largest_and_others_not() -> None:
    soft = torch.eye(10)[torch.arange(200) // 20].double()
    assert fault(soft, 20) is not None
    for other in (torch.randn(64), torch.zeros(64, 8, 8).long(), torch.zeros(64, 1)):
        assert fault(other, 16, known=10) is None
    mixture = Mixture()
    mixture.see(None)
    assert mixture.fault(10) is None


def test_it_is_said_once_with_advice(caplog: pytest.LogCaptureFixture) -> None:
    batches = [(number, torch.full((16,), number)) for number in range(6)]
    seen = []
    for batch in watched(batches, lambda batch: batch[1], "training batches"):
        seen.append(batch)
        assert len(caplog.records) == (len(seen) > 1)  # as soon as it can be known
    assert seen == batches
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "ekgfx"
    assert record.getMessage().startswith("training batches: they come sorted by class")
    assert "DataLoader(..., shuffle=True)" in record.getMessage()
    warn("others", None)
    assert len(caplog.records) == 1


def test_mixed_batches_hold_all_samples_where_they_may() -> None:
    x, y = torch.arange(50.0)[:, None], torch.arange(50.0) * 2
    sorted_batches = [(a, b, "same") for a, b in zip(x.split(16), y.split(16), strict=True)]
    found = mixed(sorted_batches, 100)
    assert [len(a) for a, _, _ in found] == [13, 13, 13, 11]
    assert all(torch.equal(2 * a[:, 0], b) and c == "same" for a, b, c in found)
    order = torch.cat([a[:, 0] for a, _, _ in found])
    assert order.sort().values.tolist() == list(range(50)) and order.tolist() != list(range(50))
    assert all(a.max() - a.min() > 25 for a, _, _ in found)
    again = mixed(iter(sorted_batches), 100)
    assert torch.equal(torch.cat([a for a, _, _ in again])[:, 0], order)


def test_a_draw_is_from_the_whole_pass_and_even() -> None:
    counts = torch.zeros(10)
    for start in range(200):  # the draw is the same every time, so other samples lie at its places
        samples = (torch.arange(1000) + start * 5) % 1000 // 100
        (found,) = zip(*mixed(((part,) for part in samples.split(10)), 100), strict=True)
        assert [len(part) for part in found] == [10] * 10
        counts += torch.cat(found).bincount(minlength=10)
    assert counts.sum() == 20000 and (counts - 2000).abs().max() < 50


def test_sequences_of_other_lengths_stay_apart() -> None:
    batches = [(torch.full((4, length), float(length)),) for length in (3, 5, 3, 7)]
    found = mixed(batches, 100)
    assert sorted(tuple(x.shape) for (x,) in found) == [(4, 3), (4, 3), (4, 5), (4, 7)]
    assert all((x == x.shape[1]).all() for (x,) in found)


def test_even_batches() -> None:
    assert [even(n, 16) for n in (1, 16, 17, 50, 1024)] == [1, 16, 9, 13, 16]
