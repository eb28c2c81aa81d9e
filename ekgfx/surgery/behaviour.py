"""How a model behaves: what it computes on the example, on other sizes, and in training mode."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.graph.axis_graph import Example
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.graph.ways import Way, seeded, undisturbed


def behaviour(model: nn.Module, example: Example) -> list[Any]:
    """What a model computes on the example, on other sizes, and in training mode; an error's name where it fails."""
    with evaluation_mode(model):
        found = [_outcome(model, *inputs) for inputs in _others(example)]
    with Way(training=True).entered(model):
        found.append(_outcome(model, *example))
    return found


def shapes_taken(model: nn.Module, example: Example) -> list[list[torch.Size] | str]:
    """The shapes of what a model computes on a larger batch and on other larger sizes; the error's type where it
    fails."""
    with evaluation_mode(model):
        _, *found = [_outcome(model, *inputs) for inputs in _others(example)]
    return [outcome if isinstance(outcome, str) else [tensor.shape for tensor in outcome] for outcome in found]


def _others(example: Example) -> Iterator[Example]:
    """The example, and others whose batch is larger, and whose other sizes are."""
    yield example

    def stretched(dims: slice) -> Any:
        def stretch(tensor: Tensor) -> Tensor:
            for d in range(tensor.ndim)[dims]:
                tensor = torch.cat([tensor, tensor], d)
            return tensor

        return pytree.tree_map_only(Tensor, stretch, example)

    yield stretched(slice(0, 1))
    yield stretched(slice(1, 2))
    yield stretched(slice(2, None))


def _outcome(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    with torch.no_grad(), seeded(model), undisturbed(model):
        try:
            return [t.clone() for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
        except Exception as error:  # noqa: BLE001  the model's own
            return type(error).__name__


def as_good(found: list[Any], wanted: list[Any]) -> bool:
    """Whether a model behaves as well: where it failed before, it may do anything."""
    return all(
        isinstance(b, str) or (isinstance(a, list) and len(a) == len(b) and all(map(_equal, a, b)))
        for a, b in zip(found, wanted, strict=True)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
