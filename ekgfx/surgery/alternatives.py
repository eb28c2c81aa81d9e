"""Other ways through a module that compute what its forward does, and must go on doing so after the cut.

A library may give a module a second forward, for an exporter that cannot do what the first one does: it splits by a
width that the module keeps, say, where `forward` halves what it is given. No call of the model shows that width. So the
methods called `forward_…` that take what the forward takes are tried on the uncut model: those that agree with the
forward there must agree with it in the cut one, and the module's integers are settled by that.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.graph.axis_graph import AxisGraph, Example
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.graph.ways import undisturbed
from ekgfx.surgery.assignments import assignments, take
from ekgfx.surgery.integers import Choice

MOST = 32
"""Choices of integers that are tried for one module."""


def methods(module: nn.Module) -> list[str]:
    """The methods of a module's class that may stand for its forward, by their names and parameters."""
    kind = type(module)
    if kind.__module__.partition(".")[0] == "torch":
        return []
    wanted = list(inspect.signature(kind.forward).parameters)
    found = ((name, inspect.getattr_static(kind, name)) for name in dir(kind) if name.startswith("forward_"))
    return [name for name, f in found if inspect.isfunction(f) and list(inspect.signature(f).parameters) == wanted]


def settle_alternatives(pruned: nn.Module, source: AxisGraph, choices: Iterable[Choice]) -> None:
    """Settle integers of the cut module that only such methods read. choices: integers that may have to change."""
    uncut, own = source.model, {name: methods(module) for name, module in pruned.named_modules()}
    named = {name: found for name, found in own.items() if found}
    if uncut is pruned or not named:
        return
    agreeing = {(name, other) for name, other, agrees in _tried(uncut, named, source.example) if agrees()}
    named = {name: [other for other in found if (name, other) in agreeing] for name, found in named.items()}
    for name, _, agrees in _tried(pruned, {name: found for name, found in named.items() if found}, source.example):
        mine = [choice for choice in choices if choice.module == name]
        if mine and not agrees():
            _settle(pruned, mine, agrees)


def _settle(pruned: nn.Module, choices: list[Choice], agrees: Callable[[], bool]) -> None:
    before: Mapping[Choice, int] = {choice: choice.now(pruned) for choice in choices}
    for _, trial in zip(range(MOST), assignments(pruned, choices), strict=False):
        take(pruned, trial)
        if agrees():
            return
    take(pruned, before)  # what calls the method fails, and says where


def _tried(
    model: nn.Module, named: Mapping[str, list[str]], example: Example
) -> Iterator[tuple[str, str, Callable[[], bool]]]:
    """Every module and method, with whether that computes what the forward computed in the model's own run."""
    seen: dict[str, tuple[Any, Any]] = {}

    def note(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.setdefault(name, pytree.tree_map_only(Tensor, torch.clone, ((args, kwargs), output)))

        return keep

    args, kwargs = example
    with torch.no_grad(), evaluation_mode(model), undisturbed(model):  # which also takes the hooks away
        for name in named:
            model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
        model(*args, **kwargs)
    for name in named.keys() & seen.keys():
        for other in named[name]:
            yield name, other, _agreement(model, name, other, *seen[name])


def _agreement(model: nn.Module, name: str, other: str, given: Example, wanted: Any) -> Callable[[], bool]:
    def agrees() -> bool:
        module = model.get_submodule(name)
        outputs = [tensor for tensor in pytree.tree_leaves(wanted) if isinstance(tensor, Tensor)]
        with torch.no_grad(), evaluation_mode(module), undisturbed(module):
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, given)
            try:
                found = [
                    t for t in pytree.tree_leaves(getattr(module, other)(*args, **kwargs)) if isinstance(t, Tensor)
                ]
                again = [t for t in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor)]
            except Exception:  # noqa: BLE001  whatever the user's method raises
                return False
        return all(len(some) == len(outputs) and all(map(_equal, some, outputs)) for some in (found, again))

    return agrees


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
