"""The arguments of a call in the order in which a model was traced, however the call gives them."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ekgfx.errors import DataError, PlanError
from ekgfx.graph.axis_graph import AxisGraph

_CONSTANT = (bool, int, float, str, type(None))


def arranged(graph: AxisGraph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The leaves of a call's arguments in the places of the example's: by position or by name, in any order, with
    defaults left out or not.

    Raises PlanError for a tensor more or less than was traced, and for another value of what is no tensor: the graph
    holds the example's.
    """
    example, traced = pytree.tree_flatten(graph.example)
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    if spec != traced:
        leaves = pytree.tree_leaves(_like_the_example(graph, args, kwargs))
    if len(leaves) != len(example):
        raise PlanError(
            f"the model was traced with {len(example)} inputs, it was called with {len(leaves)} ({spec}); trace it as "
            "it is called"
        )
    for old, new in zip(example, leaves, strict=True):
        if isinstance(old, Tensor) != isinstance(new, Tensor) or (isinstance(old, _CONSTANT) and old != new):
            raise PlanError(
                f"the model was traced with {_brief(old)}, it was called with {_brief(new)} in its place; trace it as "
                "it is called"
            )
    return leaves


def check_inputs(graph: AxisGraph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """DataError for inputs of another number of dimensions, or another kind of numbers, than the example's; PlanError
    as `arranged`."""
    for old, new in zip(pytree.tree_leaves(graph.example), arranged(graph, args, kwargs), strict=True):
        if isinstance(old, Tensor) and _kind(new) != _kind(old):
            raise DataError(
                f"a batch has {_brief(new)} ({new.dtype}), the model was traced with {_brief(old)} ({old.dtype}); give "
                "batches of such inputs, in a list or a DataLoader: [(images, labels), …]"
            )


def _kind(tensor: Tensor) -> tuple[int, bool, bool]:
    """What batches share with the example; float64 is apart, since arrays of NumPy come in it, and layers refuse it."""
    return tensor.ndim, tensor.is_floating_point(), tensor.dtype == torch.float64


def _like_the_example(graph: AxisGraph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The call's values for what the example gave, in its order."""
    signature = inspect.signature(graph.model.forward)
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    try:
        given, called = _by_name(signature, *graph.example), _by_name(signature, args, kwargs)
    except TypeError as error:
        raise PlanError(f"{type(graph.model).__name__}.forward cannot be called so: {error}") from error
    for name, value in called.items():
        if name not in given and not (name in defaults and value is defaults[name]):
            raise PlanError(f"the model was traced without {name}, it was called with it; trace it as it is called")
    missing = [name for name in given if name not in called and name not in defaults]
    if missing:
        raise PlanError(f"the model was traced with {missing[0]}, it was called without; trace it as it is called")
    return [called.get(name, defaults.get(name)) for name in given]


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Parameter → value: those by position in the order of forward, then those by name in the order of the call."""
    found: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found.update((f"*{name} {i}", each) for i, each in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = value
    return {name: found[name] for name in (*(n for n in found if n not in kwargs), *kwargs)}


def _brief(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]
