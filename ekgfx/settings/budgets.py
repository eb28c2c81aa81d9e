"""Budgets as they are asked for: one, several that must all hold, or a list of which each gets a network of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from ekgfx.base.units import budget_of
from ekgfx.errors import BudgetError, RecipeError

BUDGETS = {"flops": "MACs", "params": "parameters", "latency": "latency"}
"""The settings that a budget can be given by, and what each is about."""


Amounts = Sequence[float | str] | float | str | None
"""A budget: the fraction to keep, or an amount; or several, each of which gets a network of its own."""

Point = Mapping[str, float | str]
"""The budget of one network, by its keys."""


def several(given: Mapping[str, Amounts]) -> str | None:
    """The key whose budget is a list; None where none is. RecipeError where two are."""
    lists = [key for key, asked in given.items() if isinstance(asked, tuple | list)]
    if len(lists) > 1:
        raise RecipeError(
            f"{' and '.join(lists)} each name several budgets; give several of one, and of the others at most one"
        )
    return lists[0] if lists else None


def _plain(asked: Any) -> Amounts:
    """A budget that is NumPy's or a tensor as Python's numbers."""
    found: Amounts = asked.tolist() if hasattr(asked, "tolist") else asked
    return found


def points_of(given: Mapping[str, Amounts]) -> tuple[Point, ...]:
    """The budget of each network, the loosest first; all of them hold the budgets that are no list.

    Raises RecipeError for what is no budget, and for a list that has no order.
    """
    given = {key: _plain(asked) for key, asked in given.items()}
    key = several(given)
    single: dict[str, float | str] = {}
    for other, asked in given.items():
        if asked is not None and not isinstance(asked, tuple | list):
            budget_of(other, asked)  # type: ignore[arg-type]  # refuses what is neither
            single[other] = asked  # type: ignore[assignment]
    if key is None:
        return (single,)
    amounts = given[key]
    assert isinstance(amounts, Sequence)
    sizes = [budget_of(key, amount) for amount in amounts]
    if not sizes or len({amount for _, amount in sizes}) > 1 or len(set(sizes)) < len(sizes):
        raise RecipeError(f"{key} {', '.join(map(str, amounts))}: give several fractions or several amounts, each once")
    loosest_first = sorted(zip(sizes, amounts, strict=True), key=lambda pair: -pair[0][0])
    return tuple({**single, key: amount} for _, amount in loosest_first)


def label_of(asked: Mapping[str, float | str]) -> str:
    """The name of a budget: `flops=0.75`, or `flops=0.75,params=5M`."""
    return ",".join(f"{key}={value}" for key, value in asked.items())


def which(points: Sequence[Mapping[str, float | str]], wanted: Mapping[str, float | str]) -> int:
    """The position of the budget `wanted` among those that were asked for, however it is written.

    Raises BudgetError when it is not there; says which are.
    """
    unknown = [key for key in wanted if key not in BUDGETS]
    if unknown or not wanted:
        raise BudgetError(f"{unknown[0] if unknown else 'nothing'} names no budget: give one of {', '.join(BUDGETS)}")
    goal = {key: budget_of(key, value) for key, value in wanted.items()}
    for number, asked in enumerate(points):
        if all(key in asked and budget_of(key, asked[key]) == size for key, size in goal.items()):
            return number
    if not points:
        raise BudgetError(f"the run has one network, that of its own budget: leave {label_of(wanted)} out")
    raise BudgetError(f"no budget {label_of(wanted)} was asked for; there is {'; '.join(map(label_of, points))}")
