"""What a forward computes that nobody reads, where the trace does not say how wide it is after a cut.

A trace leaves out what has no effect on the outputs (averaged attention maps that the caller drops); a recorded call
still has it, with sizes of before.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx

from ekgfx.graph.nodes import bind
from ekgfx.rewriting.calls import ModuleCall
from ekgfx.rewriting.steps import Step
from ekgfx.rewriting.terms import SIZES, Widths


def lost(call: ModuleCall, steps: Sequence[Step], widths: Widths) -> frozenset[fx.Node]:
    """The values in a call that cannot be written and need not be; none where somebody reads one of them."""
    found: set[Any] = set()
    for kind, place, what in steps:
        if kind == "op":
            reads = any(node in found for node in what.all_input_nodes)
            if reads and not widths.lost(what):
                return frozenset()
            if reads or (_sized(what) and widths.lost(what)):
                found.add(what)
        elif kind == "is":
            found |= {place} if what in found else set()
        elif any(leaf in found for leaf in what.passed.flat if isinstance(leaf, fx.Node)):
            return frozenset()
    assert call.returned is not None and call.results is not None
    for old, new in zip(call.returned.flat, call.results.flat, strict=True):
        if isinstance(old, fx.Node) and old in found and isinstance(new, fx.Node) and new.users:
            return frozenset()
    return frozenset(found)


def _sized(node: fx.Node) -> bool:
    """Whether an operator is given a size that the user's Python knows."""
    given = (value for name, value in bind(node).items() if name in SIZES)
    numbers = (n for value in given for n in (value if isinstance(value, list | tuple) else [value]))
    return any(type(n) is int and n > 1 for n in numbers)
