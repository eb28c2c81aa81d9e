"""What a module's own Python decides by the sizes of its inputs while it is recorded.

The recording holds the one way that was taken: a forward that is written from it is right where the same is decided.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ekgfx.rewriting.told import by_pytorch


@dataclass(frozen=True)
class Branch:
    """One decision. relation: of symbolic sizes, a sympy expression; holds: whether it does for the example."""

    relation: Any
    holds: bool


@contextlib.contextmanager
def branching(noticed: Callable[[Branch], None]) -> Iterator[None]:
    """While this is open, `noticed` gets every truth value of symbolic sizes that code outside of PyTorch asks for."""

    def asking(kind: Any) -> Callable[[Any], bool]:
        own = kind.__bool__

        def truth(value: Any) -> bool:
            relation = (value if kind is torch.SymBool else value != 0).node.expr
            holds: bool = own(value)
            if relation.free_symbols and not by_pytorch():
                noticed(Branch(relation, holds))
            return holds

        return truth

    with contextlib.ExitStack() as stack:
        for kind in (torch.SymBool, torch.SymInt):
            stack.callback(setattr, kind, "__bool__", kind.__bool__)
            setattr(kind, "__bool__", asking(kind))  # noqa: B010  mypy knows no assignment to a method
        yield
