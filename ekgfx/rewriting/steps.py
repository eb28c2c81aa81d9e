"""What a call of a module runs itself, step by step, where some of the modules in it are written out."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from ekgfx.graph.nodes import bind
from ekgfx.rewriting.calls import Calls, ModuleCall, whole
from ekgfx.rewriting.spelling import plain
from ekgfx.rewriting.terms import Widths

Step = tuple[str, Any, Any]
"""("op", None, node), ("call", name of the module in the one that calls it, call) or ("is", node, node)."""


def steps_of(
    call: ModuleCall, model: nn.Module, modules: Mapping[int, str], inline: Collection[str], widths: Widths
) -> list[Step]:
    """The steps of a call, in order. modules: id → the name of a submodule in the one that is called; inline: those
    whose own steps stand in place of their call."""
    steps: list[Step] = []
    for step in call.steps:
        if isinstance(step, fx.Node):
            steps.append(("is", step, step.args[0]) if whole(step) else ("op", None, step))
            continue
        if not _matters(step, widths):
            continue
        name = modules.get(id(model.get_submodule(step.path)))
        if name and step.path not in inline and plain(step.passed.spec):
            steps.append(("call", name, step))
            continue
        assert step.results is not None and step.returned is not None
        steps += [("is", new, old) for new, old in zip(step.given.flat, step.passed.flat, strict=True)]
        steps += steps_of(step, model, modules, inline, widths)
        steps += [("is", new, old) for new, old in zip(step.results.flat, step.returned.flat, strict=True)]
    return steps


def _matters(call: ModuleCall, widths: Widths) -> bool:
    """Whether somebody reads what a call returns, or the trace knows it."""
    assert call.results is not None
    read = any(isinstance(leaf, fx.Node) and leaf.users for leaf in call.results.flat)
    return read or not any(True for _ in call.operators()) or widths.knows(call)


def signs(call: ModuleCall, steps: list[Step], calls: Calls) -> list[Any]:
    """What the steps of a call do, in words that are the same for another recording of the same module."""
    known: dict[Any, Any] = {leaf: f"given {i}" for i, leaf in enumerate(call.given.flat) if isinstance(leaf, fx.Node)}
    found: list[Any] = []

    def sign(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(sign, value))
        if isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), torch.SymInt | torch.SymFloat):
            return known.get(value, calls.weights.get(value.name, "a constant"))
        return "a number" if isinstance(value, bool | float | int | fx.Node) else type(value).__name__

    for kind, place, what in steps:
        if kind == "is":
            known[place] = sign(what)
        elif kind == "call":
            known |= {leaf: (len(found), i) for i, leaf in enumerate(what.results.flat) if isinstance(leaf, fx.Node)}
            found.append((place, [sign(leaf) for leaf in what.passed.flat]))
        else:
            known[what] = len(found)
            found.append((what.target, {name: sign(value) for name, value in bind(what).items()}))
    return found
