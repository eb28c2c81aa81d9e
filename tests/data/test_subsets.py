"""Parts of a data set: so many of each class, disjoint, the same for the same seed."""

import pytest
import torch

from ekgfx import data
from ekgfx.data.base import by_class, generator, holdout, spread
from ekgfx.errors import DataError


def test_search_subset_takes_so_many_of_each_class(cifar: data.Data) -> None:
    train, val = cifar.search_subset(256, 32, seed=5)
    labels = cifar.labels("train")
    assert labels[train].bincount().tolist() == [256] * 10 and labels[val].bincount().tolist() == [32] * 10
    assert len({*train.tolist(), *val.tolist()}) == 2880
    assert labels[val][:64].unique().numel() == 10  # shuffled: the first batch has every class
    again, other = cifar.search_subset(256, 32, seed=5), cifar.search_subset(256, 32, seed=6)
    assert torch.equal(train, again[0]) and torch.equal(val, again[1]) and not torch.equal(val, other[1])


def test_search_subset_divides_small_classes_in_proportion() -> None:
    digits = data.load("digits")
    train, val = digits.search_subset(256, 32)  # about 144 of each class
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(digits.size("train")))
    counts = digits.labels("train")[val].bincount(minlength=10)
    assert counts.min() >= 15 and counts.max() <= 17 and abs(len(val) - digits.size("train") / 9) <= 1


def test_spread_takes_an_even_share_of_classes_with_one_member() -> None:
    rest, chosen = spread(torch.arange(500), 0.2, generator(0))
    assert len(chosen) == 100 and set(chosen.diff().tolist()) == {5}
    assert sorted([*rest.tolist(), *chosen.tolist()]) == list(range(500))


def test_by_class_lists_every_index_under_its_label() -> None:
    labels = torch.tensor([4, 0, 4, 7, 0, 4])
    assert [sorted(members.tolist()) for members in by_class(labels, 6, generator(0))] == [[1, 4], [0, 2, 5], [3]]


def test_holdout_is_stratified_and_repeatable() -> None:
    labels = torch.arange(100) % 10
    train, test = holdout(labels, 100, 0.2)
    assert labels[test].bincount().tolist() == [2] * 10 and len(train) == 80
    assert torch.equal(test, holdout(labels, 100, 0.2)[1])
    assert set(test.diff().tolist()) != {test.diff()[0]}  # drawn, not every fifth
    with pytest.raises(DataError, match="1 samples are too few"):
        holdout(None, 1, 0.2)
