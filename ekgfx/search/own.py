"""Functions of the user's own: what they are called with and what they return is looked at, and said by the argument's
name, instead of failing somewhere inside the search."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ekgfx.errors import RecipeError


def name_of(chosen: Any) -> str:
    """A choice as the record names it: by its name, or by that of the user's function or class."""
    return chosen if isinstance(chosen, str) else getattr(chosen, "__qualname__", type(chosen).__qualname__)


def check_takes(function: Any, argument: str, *given: str) -> None:
    """RecipeError for a function that cannot be called as it will be, with `given` by position."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of something built in
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        raise RecipeError(
            f"{argument} {name_of(function)} takes {signature}, and is called with ({', '.join(given)})"
        ) from error


def checked_criterion(criterion: Callable[..., Any]) -> Callable[..., dict[str, Tensor]]:
    """An importance whose scores are looked at: a value for each channel of each group. RecipeError where not."""
    who = f"importance {name_of(criterion)}"
    check_takes(criterion, "importance", "problem", "plan", "knowledge")

    @wraps(criterion)
    def checked(problem: Any, plan: Any, knowledge: Any, *more: Any) -> dict[str, Tensor]:
        scores = criterion(problem, plan, knowledge, *more)
        if not isinstance(scores, Mapping):
            kind = type(scores).__name__
            raise RecipeError(f"{who} returned {kind}: return a mapping, each group's name to a value for each channel")
        found = {}
        for name in problem.groups:
            size = problem.traced.groups[name].size
            try:
                values = torch.as_tensor(scores[name]).detach().double().cpu()
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise RecipeError(f"{who} has no values for the group {name!r}: give {size} numbers") from error
            if values.shape != (size,) or bool(values.isnan().any()):
                what = "nan" if values.shape == (size,) else f"{tuple(values.shape)} values"
                raise RecipeError(
                    f"{who} gave {what} for the group {name!r}: give a number for each of its {size} channels"
                )
            found[name] = values
        return found

    return checked


def mean_of(reward: Callable[..., Any], *given: Any) -> Tensor:
    """What a reward says of a batch. RecipeError where it is not one number."""
    said = reward(*given)
    try:
        value = torch.as_tensor(said, device=given[0].device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RecipeError(f"reward {name_of(reward)} returned {type(said).__name__}: return one number") from error
    if value.ndim:
        shape = tuple(value.shape)
        raise RecipeError(f"reward {name_of(reward)} returned {shape} values: return their mean over the batch")
    return value


def check_gradient(negative: Tensor) -> None:
    """RecipeError for a reward or a loss without a gradient."""
    if not negative.requires_grad:
        raise RecipeError(
            "this importance is of the reward's gradient, and the reward has none: write it without argmax, item() or "
            'no_grad(), or take another importance, such as importance="magnitude"'
        )
