"""The ways to settle integers that may be widths, the likeliest first."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ekgfx.surgery.integers import Choice


def take(pruned: nn.Module, trial: Mapping[Choice, Any]) -> None:
    for choice, value in trial.items():
        choice.take(pruned, value)


def kind_of(pruned: nn.Module, choice: Choice) -> tuple:
    return type(pruned.get_submodule(choice.module)), choice.place


def assignments(pruned: nn.Module, choices: list[Choice], apart: bool = False) -> Iterator[dict[Choice, int]]:
    """Every way to settle the choices, those closest to 'all likely ones changed' first; modules of one class share
    theirs, where the same number may become as many others."""
    kinds: dict[tuple, list[Choice]] = {}
    for choice in choices:
        alike = (*kind_of(pruned, choice), choice.old, len(choice.values))
        kinds.setdefault((choice.module, choice.place) if apart else alike, []).append(choice)
    ranks = [max(len(c.options) for c in members) for members in kinds.values()]
    for ways in nearest_first(ranks):
        yield {
            c: c.options[min(way, len(c.options) - 1)]
            for way, members in zip(ways, kinds.values(), strict=True)
            for c in members
        }


def nearest_first(counts: list[int]) -> Iterator[tuple[int, ...]]:
    """All tuples of numbers below `counts`, by their sum.

    >>> list(nearest_first([2, 2]))
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """

    def summing(total: int, counts: list[int]) -> Iterator[tuple[int, ...]]:
        if not counts:
            yield from [()] if total == 0 else []
            return
        most = sum(counts[1:]) - len(counts[1:])
        for first in range(max(0, total - most), min(counts[0] - 1, total) + 1):
            yield from ((first, *rest) for rest in summing(total - first, counts[1:]))

    for total in range(sum(counts) - len(counts) + 1):
        yield from summing(total, counts)
