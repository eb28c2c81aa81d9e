"""The settings of a search as one value, and criteria, rewards and strategies of the user's own."""

import math
import typing
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ekgfx.base.schema import hints
from ekgfx.errors import RecipeError
from ekgfx.graph.plan import Plan
from ekgfx.search import SearchSettings, of_weights, search
from ekgfx.search.settings import SearchOptions
from ekgfx.settings import recipe
from tests.search import nets
from tests.search.test_importance import problem_of
from tests.search.test_search import untimed


def test_keywords_are_the_fields_of_the_settings_and_recipes_know_them() -> None:
    assert typing.get_type_hints(SearchOptions) == hints(SearchSettings)
    only_python = {"details", "seed"}  # the seed is the whole recipe's
    assert {field.name for field in fields(SearchSettings)} - {f.name for f in fields(recipe.Search)} == only_python


def test_a_value_and_keywords_are_the_same_and_keywords_come_last() -> None:
    traced, asked = nets.cnn(), SearchSettings(flops=0.8, importance="magnitude", accept=2, align=2)
    whole = search(traced, nets.batches(), asked)
    apart = search(traced, nets.batches(), flops=0.8, importance="magnitude", accept=2, align=2)
    assert (whole.plan, untimed(whole), whole.settings) == (apart.plan, untimed(apart), apart.settings)
    assert search(traced, nets.batches(), asked, flops=0.9).settings["budget"]["keep"] == 0.9


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"importence": "lamp"}, "the search has no setting 'importence'; did you mean 'importance'"),
        ({"importance": "taylr"}, "unknown importance 'taylr'; did you mean 'taylor'"),
        ({"strategy": "random"}, "unknown strategy 'random'; use one of ekg, global, uniform"),
        ({"knowledge": None}, "unknown knowledge None; did you mean 'none'"),
        ({"amp": "int8"}, "unknown amp 'int8'; use one of bf16, fp16"),
        ({"accept": 0}, "accept 0: use at least 1"),
    ],
)
def test_what_does_not_exist_is_refused(option: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        search(nets.cnn(), nets.batches(), flops=0.8, **option)


@pytest.mark.parametrize("cut", [False, True])
def test_a_criterion_of_weights_sums_what_every_parameter_says(cut: bool) -> None:
    """By hand: the rows of a channel are its entries in each parameter of the group."""
    traced = nets.cnn()
    group = next(iter(traced.groups.values()))
    kept = {group.name: (0, 2)} if cut else {}
    scores = of_weights(lambda rows: rows.square().sum(1))(problem_of(traced, nets.batches()), Plan(kept), None)
    left = list(kept.get(group.name, range(group.size)))
    expected = torch.zeros(group.size, dtype=torch.float64)
    state = dict(traced.model.named_parameters())
    for place in group.places:
        weight = state[place.parameter].detach().double().movedim(place.dim, 0)
        expected[left] += weight.flatten(1).square().sum(1)[left] if weight.dim() > 1 else weight.square()[left]
    assert set(scores) == set(traced.groups)
    torch.testing.assert_close(scores[group.name], expected)


def test_channels_go_as_the_own_criterion_says() -> None:
    traced = nets.cnn()

    def later_first(problem: Any, plan: Plan, knowledge: Any) -> dict[str, Tensor]:
        return {name: torch.arange(rule.size, dtype=torch.float64) for name, rule in problem.rules.items()}

    for strategy in ("ekg", "global", "uniform"):
        found = search(traced, nets.batches(), flops=0.6, strategy=strategy, importance=later_first)
        for name, kept in found.plan.kept.items():
            assert list(kept) == list(range(traced.groups[name].size))[-len(kept) :]
        assert found.settings["importance"].endswith("later_first")
    assert (
        search(traced, flops=0.6, strategy="uniform", importance=later_first).final.loss is None
    )  # it asks for no data


def test_the_papers_reward_as_ones_own_is_the_same_search() -> None:
    """Eq. 4 written again: the same importance, the same choices; but nothing is known of its least value."""
    traced = nets.cnn()

    def paper(logits: Tensor, target: Tensor, knowledge: Tensor) -> Tensor:
        return -F.cross_entropy(logits, target) - F.cross_entropy(logits, knowledge.softmax(1))

    own = search(traced, nets.batches(), flops=0.7, reward=paper)
    named = search(traced, nets.batches(), flops=0.7, early_stop=False)
    assert own.plan == named.plan
    for mine, theirs in zip(own.steps, named.steps, strict=True):
        assert mine.measure.reward == pytest.approx(theirs.measure.reward, rel=1e-9)
        assert [c.at_least for c in mine.candidates] == [None] * len(theirs.candidates)


def test_the_own_reward_chooses() -> None:
    """Of a step's candidates the one whose logits are nearest to the unpruned network's."""
    traced = nets.cnn()
    found = search(traced, nets.batches(), flops=0.9, reward=lambda x, y, t: -F.mse_loss(x, t), knowledge="single")
    batches = [images for images, _ in nets.batches()]
    full = traced.subnetwork(batch_stats=True)
    first, *_ = found.steps
    best = max(first.candidates, key=lambda candidate: candidate.measure.reward)
    assert [best.group] == list(first.removed)
    for strategy in ("global", "uniform"):
        assert search(traced, nets.batches(), flops=0.9, strategy=strategy, reward=lambda x, y, t: -F.mse_loss(x, t))
    with torch.no_grad():
        network = traced.subnetwork(found.plans[1], batch_stats=True, rescale=True)
        gaps = [(float(F.mse_loss(network(x), full(x))), len(x)) for x in batches]
    mean = sum(gap * count for gap, count in gaps) / sum(count for _, count in gaps)
    assert first.measure.reward == pytest.approx(-mean, rel=1e-5)


class Halve:
    """A strategy as an object: halves the widest group until the budget holds."""

    def __call__(self, problem: Any, criterion: Any, recorder: Any) -> None:
        while not problem.budget.met(recorder.plan):
            kept = {group: problem.kept(recorder.plan, group) for group in problem.rules}
            widest = max(kept, key=lambda group: len(kept[group]))
            recorder.go(recorder.plan.with_kept(widest, kept[widest][: len(kept[widest]) // 2]))


@pytest.mark.parametrize("data", [nets.batches(), ()])
def test_a_strategy_of_ones_own_is_recorded_and_resumed(data: Iterable[Any]) -> None:
    traced = nets.cnn()
    found = search(traced, data, flops=0.5, strategy=Halve(), importance="magnitude")
    assert traced.cost(found.plan).macs <= 0.5 * traced.cost().macs < traced.cost(found.plans[-2]).macs
    assert found.settings["strategy"] == "Halve"
    assert all(sum(map(bool, step.removed.values())) == 1 for step in found.steps)
    assert all((step.measure.loss is None) == (not data) for step in found.steps)
    again = search(
        traced, data, flops=0.5, strategy=Halve(), importance="magnitude", resume_from=found.to_json()["steps"][:1]
    )
    assert (again.plan, untimed(again)) == (found.plan, untimed(found))


def tens(problem, plan, knowledge):
    return {name: [1.0] * problem.traced.groups[name].size for name in problem.groups}


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (
            {"importance": lambda traced, group: 1},
            r"importance .*takes \(traced, group\), and is called with \(",
        ),
        (
            {"importance": lambda *_: "high"},
            r"importance .* returned str: return a mapping, each group's",
        ),
        ({"importance": lambda *_: {}}, "has no values for the group '.*': give [0-9]+ numbers"),
        (
            {"importance": lambda p, *_: {n: [1.0] for n in p.groups}},
            r"gave \(1,\) values for the group",
        ),
        ({"importance": lambda *a: {n: [math.nan] * len(v) for n, v in tens(*a).items()}}, "gave nan for the group"),
        (
            {"reward": lambda logits, target: 1},
            r"reward .* takes \(logits, target\), and is called with \(logits, ta",
        ),
        ({"reward": lambda x, y, t: None}, "returned NoneType: return one number"),
        ({"reward": lambda x, y, t: x.mean(1)}, r"returned \([0-9]+,\) values: return their mean over the batch"),
        (
            {"reward": lambda x, y, t: (x.argmax(1) == y).float().mean()},
            "has none: write it without argmax",
        ),
        (
            {"strategy": lambda problem: None},
            r"strategy .* takes \(problem\), and is called with \(problem, c",
        ),
    ],
)
def test_functions_of_ones_own_that_cannot_be_used_are_told_of(option: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        search(nets.cnn(), nets.batches(), flops=0.7, **option)


def test_plain_numbers_will_do() -> None:
    """Scores as lists, and a reward as a float: the accuracy, which no gradient can follow."""
    found = search(
        nets.cnn(),
        nets.batches(),
        flops=0.7,
        importance=tens,
        reward=lambda logits, labels, knowledge: float((logits.argmax(1) == labels).float().mean()),
    )
    assert found.kept_fraction <= 0.7
    assert all(0 <= step.measure.reward <= 1 for step in found.steps)
