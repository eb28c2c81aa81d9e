"""Which candidates are best: by reward, by what a saving costs, and where rounding cannot tell."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ekgfx
from ekgfx.search import ranking, search
from ekgfx.search.details import Details
from ekgfx.search.ranking import Ranking, by_reward, ranking_of
from tests.search import nets
from tests.search.test_race import batches, sure


@pytest.mark.parametrize(
    ("negatives", "saved", "count", "best"),
    [
        ([0.3, 0.1, 0.2], [1, 1, 9], 3, [1, 2, 0]),
        ([0.3, 0.1, 0.2], [1, 1, 9], 5, [1, 2, 0]),
        ([0.1, 0.1, 0.1], [1, 3, 3], 3, [1, 2, 0]),  # equals: most is saved by 1 and 2, of which 1 is first
        ([0.1 + 9e-7, 0.1, 0.1 + 2e-6], [9, 1, 99], 2, [0, 1]),  # 1e-6 above the best is a tie, 2e-6 is none
        ([0.1 + 9e-7, 0.1 + 1.8e-6, 0.1], [1, 9, 1], 2, [0, 2]),  # 1 ties with 0, but never with the best
        ([-5.0, -5.0 + 4e-5], [1, 2], 1, [1]),  # relative to what is compared, whatever its sign
        ([math.inf, 0.2, math.inf], [9, 1, 9], 1, [1]),
    ],
)
def test_who_is_best(negatives: list[float], saved: list[float], count: int, best: list[int]) -> None:
    """By hand, with a tie of 1e-5."""
    plans: Any = range(len(saved))
    assert Ranking(by_reward, saved.__getitem__).best(plans, negatives, count) == best  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rewards", "saved", "order"),
    [
        ([-2.0, -4.0], [1.0, 6.0], [1, 0]),  # 1 per ms against 0.5 per ms, though the first loses less
        ([-2.0, -1.5], [4.0, 1.0], [0, 1]),
        ([-0.5, -3.0], [0.1, 9.0], [0, 1]),  # a gain comes before any loss
        ([-0.5, -0.6], [1.0, 5.0], [1, 0]),  # of two gains, 0.5 × 1 and 0.4 × 5, the larger product
        ([-1.0 + 1e-7, -1.0 - 1e-7], [1.0, 5.0], [1, 0]),  # neither is a gain or a loss that counts
    ],
)
def test_reward_per_millisecond(
    monkeypatch: pytest.MonkeyPatch, rewards: list[float], saved: list[float], order: list[int]
) -> None:
    """The network at hand has reward −1 and takes 10 ms."""
    costs = {"now": 10.0, **{f"candidate {i}": 10.0 - ms for i, ms in enumerate(saved)}}
    monkeypatch.setattr(ranking, "assess", lambda *_: (SimpleNamespace(reward=-1.0), None))
    budget = SimpleNamespace(weighed=True, cost=costs.__getitem__, keep=0.0, full=10.0)
    problem: Any = SimpleNamespace(budget=budget, network=lambda _: None, batches=(), objective=None)
    plans: Any = [f"candidate {i}" for i in range(len(saved))]

    def ranked() -> list[int]:
        ranking = ranking_of(problem, "now", None)  # type: ignore[arg-type]
        return ranking.best(plans, [-reward for reward in rewards], len(plans))

    assert ranked() == order
    budget.weighed = False
    if abs(rewards[0] - rewards[1]) > 1e-5:
        assert ranked() == sorted(range(len(saved)), key=lambda i: -rewards[i])


def with_dead_channels(seed: int = 0) -> ekgfx.TracedModel:
    """A network in single precision, of whose hidden channels one half says nothing."""
    model = sure(nets.cnn, torch.float32).model
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                module.weight[: module.num_features // 2] = 0
                module.bias[: module.num_features // 2] = 0
    return ekgfx.trace(model, torch.randn(2, 1, 8, 8))


def test_where_channels_do_nothing_the_largest_cut_comes_first() -> None:
    """In each step, of those that are as good as the best; which often is not the one of the highest reward."""
    traced, differ = with_dead_channels(), 0
    for step in search(traced, batches(traced), flops=0.5, early_stop=False).steps:
        rewards = {c.group: c.measure.reward or 0 for c in step.candidates}
        best = max(rewards.values())
        equal = {c.group: c.measure.macs for c in step.candidates if best - rewards[c.group] <= 1e-5 * abs(best)}
        assert list(step.removed) == [min(equal, key=equal.__getitem__)]
        differ += rewards[next(iter(step.removed))] < best
    assert differ > 1


SEEDS = (0, 3, 4)
"""Of networks in which rounding decides where any difference counts; at least one of them everywhere."""


def removed_in(channels_last: bool, seed: int, strict: bool) -> list[Any]:
    """What is removed, step by step."""
    traced = with_dead_channels(seed)
    details = Details(strict_best=strict)
    found = search(traced, batches(traced), flops=0.5, channels_last=channels_last, details=details)
    return [step.removed for step in found.steps]


@pytest.mark.parametrize("seed", SEEDS)
def test_rounding_does_not_choose(seed: int) -> None:
    """The same steps in both memory formats, which round differently."""
    assert removed_in(True, seed, strict=False) == removed_in(False, seed, strict=False)


def test_rounding_chooses_where_any_difference_counts() -> None:
    assert any(removed_in(True, seed, strict=True) != removed_in(False, seed, strict=True) for seed in SEEDS)
