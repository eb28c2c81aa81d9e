"""One search to several budgets: for each what a search to it alone finds, in little more time than the tightest."""

import json
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from ekgfx.errors import BudgetError, PlanError, RecipeError
from ekgfx.search import SearchResult, Step, find_budget, race, search
from ekgfx.search.problem import Budget
from tests.search import nets
from tests.search.test_race import batches, sure

KEEP = (0.9, 0.75, 0.6)


def way(result: SearchResult) -> list[Any]:
    """The accepted steps, without the candidates that they were chosen from and the time that they took."""
    return [replace(step, seconds=0.0, eta=0.0, candidates=(), threshold=None) for step in result.steps]


CASES: list[dict[str, Any]] = [
    {},
    {"accept": 3},
    {"knowledge": "none", "cache": 0, "early_stop": False},
    {"importance": "magnitude", "align": 2},
    {"strategy": "uniform", "importance": "magnitude"},
    {"strategy": "global"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_budget_gets_what_its_search_alone_finds(case: dict[str, Any]) -> None:
    traced = sure(nets.cnn)
    data = batches(traced)
    found = search(traced, data, flops=KEEP, **case)
    for keep in KEEP:
        alone, here = search(traced, data, flops=keep, **case), found.at(flops=keep)
        assert here.plan == alone.plan
        assert way(here) == way(alone)
        assert {**here.settings, "flops": keep} == {**alone.settings, "flops": keep}
    assert found.plan == found.at(flops="60%").plan


def test_where_savings_count() -> None:
    """Under a weighed budget a budget's last step is another one, too: nothing is gained by going beyond."""
    traced = sure(nets.cnn)
    data = batches(traced)

    def limit(*_: Any, flops: float, **__: Any) -> Budget:
        return Budget.of(lambda plan: traced.cost(plan).macs, flops, "MACs", weighed=True)

    with patch("ekgfx.search.find_budget", limit):
        for keeps, step in (((0.8, 0.6), 0.2), ((0.847, 0.836, 0.759), 0.01)):  # and by single channels
            found = search(traced, data, flops=keeps, step=step)
            for keep in keeps:
                assert found.at(flops=keep).plan == search(traced, data, flops=keep, step=step).plan


def test_another_budget_holds_at_every_point() -> None:
    traced = sure(nets.vit)
    found = search(traced, batches(traced), flops=(0.9, 0.7), params=0.85)
    for keep in (0.9, 0.7):
        alone = search(traced, batches(traced), flops=keep, params=0.85)
        assert found.at(flops=keep).plan == alone.plan
        assert find_budget(traced, flops=keep, params=0.85).met(alone.plan)


def test_little_is_computed_twice(monkeypatch) -> None:
    """A candidate on a batch is computed once, for however many budgets it is weighed."""
    traced = sure(nets.cnn)
    data, went = batches(traced), race.Branch.go_on
    seen: list[int] = []
    monkeypatch.setattr(race.Branch, "go_on", lambda *arguments: (seen.append(0), went(*arguments))[1])
    count = {}
    for keep in (KEEP[-1], KEEP):
        seen.clear()
        search(traced, data, flops=keep)
        count[keep] = len(seen)
    apart = 0
    for keep in KEEP:
        seen.clear()
        search(traced, data, flops=keep)
        apart += len(seen)
    assert count[KEEP[-1]] < count[KEEP] < 1.6 * count[KEEP[-1]] < apart


@pytest.mark.parametrize("case", [{}, {"strategy": "uniform"}], ids=str)
def test_an_interrupted_search_goes_on_wherever_it_was(case: dict[str, Any]) -> None:
    traced = sure(nets.cnn)
    data = batches(traced)
    told: list[Step] = []
    whole = search(traced, data, flops=KEEP, on_step=told.append, **case)
    assert {step.towards for step in told} >= {None, "flops=0.75"}
    lines = json.loads(json.dumps([step.to_json() for step in told]))
    for cut in range(0, len(lines), 1 if case else 3):
        new: list[Step] = []
        again = search(traced, data, flops=KEEP, resume_from=lines[:cut], on_step=new.append, **case)
        assert len(new) == len(lines) - cut
        for keep in KEEP:
            assert way(again.at(flops=keep)) == way(whole.at(flops=keep))
    assert SearchResult.from_json(json.loads(json.dumps(whole.to_json()))).at(flops=0.75).plan == (
        whole.at(flops=0.75).plan
    )


def test_what_cannot_be_asked() -> None:
    traced = nets.cnn()

    def asked(**budgets: Any) -> SearchResult:
        return search(traced, strategy="uniform", importance="magnitude", **budgets)

    found = asked(flops=(0.9, 0.7))
    assert asked(params=["6k", "5k"]).at(params="5.0k").final.params <= 5000
    for wrong, says in (
        ({"flops": 0.8}, "no budget flops=0.8 was asked for; there is flops=0.9; flops=0.7"),
        ({"params": 0.9}, "no budget params=0.9"),
        ({}, "nothing names no budget"),
        ({"macs": 0.9}, "macs names no budget: give one of flops, params, latency"),
    ):
        with pytest.raises(BudgetError, match=says):
            found.at(**wrong)
    with pytest.raises(BudgetError, match="the run has one network, that of its own budget: leave "):
        asked(flops=0.9).at(flops=0.9)
    for budgets, says in (
        ({"flops": (0.9, 0.7), "params": (0.9, 0.7)}, "flops and params each name several budgets"),
        ({"flops": (0.9, "5k")}, "flops 0.9, 5k: give several fractions or several amounts, each once"),
        ({"flops": (0.9, "90%")}, "each once"),
        ({"flops": ()}, "give several"),
        ({"flops": (0.9, 55)}, "did you mean 55%"),
    ):
        with pytest.raises(RecipeError, match=says):
            asked(**budgets)
    with pytest.raises(PlanError, match="damaged"):
        SearchResult.from_json({**found.to_json(), "points": [{"asked": {}, "unit": "", "keep": 1.0, "along": 9}]})
