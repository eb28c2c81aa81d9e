"""Checks of values that a forward makes on its way: `assert lengths.max() <= n`, `if x.isnan().any(): raise …`.

A graph knows no values, but such a check decides nothing else: where it does not hold, the forward raises. So while a
model is exported it holds, and the user's Python goes on making it.
"""

import contextlib
import dis
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from ekgfx.base.lines import asking, shown

BEFORE_BRANCH = ("COMPARE_OP", "TO_BOOL", "CACHE", "EXTENDED_ARG", "NOT_TAKEN")
"""Where the code may be as it asks, and what may stand between that and the branch: up to Python 3.12 the branch itself
asks, later TO_BOOL before it, or the comparison that it is about."""


@contextlib.contextmanager
def checks_hold(answered: list[str]) -> Iterator[None]:
    """While this is open, a truth value that is not known is the one with which the code that asks does not raise.

    answered: grows with every such answer, by the line that asks.
    """
    own: Any = torch.SymBool.__bool__

    def truth(value: Any) -> bool:
        try:
            return bool(own(value))
        except GuardOnDataDependentSymNode:
            return _answer(answered)

    torch.SymBool.__bool__ = truth  # type: ignore[method-assign,assignment]
    try:
        with _Tensors(answered):
            yield
    finally:
        torch.SymBool.__bool__ = own  # type: ignore[method-assign]


class _Tensors(TorchFunctionMode):
    """Answers for tensors that are asked for their truth themselves."""

    def __init__(self, answered: list[str]) -> None:
        super().__init__()
        self.answered = answered

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except GuardOnDataDependentSymNode:
            if func is not Tensor.__bool__:
                raise
            return _answer(self.answered)


def _answer(answered: list[str]) -> bool:
    """The answer that keeps the asking code from raising; raises again where there is none."""
    frame = asking()
    truth = None if frame is None else _harmless(frame)
    if frame is None or truth is None:
        raise
    answered.append(shown(frame.f_code.co_filename, frame.f_lineno))
    return truth


def _harmless(frame: FrameType) -> bool | None:
    """The truth value with which a branch does not raise, None where both or none of its ways do."""
    code = list(dis.get_instructions(frame.f_code))
    places = {step.offset: i for i, step in enumerate(code)}
    here = places[frame.f_lasti]
    while code[here].opname in BEFORE_BRANCH:
        here += 1
    branch = code[here]
    if not branch.opname.startswith("POP_JUMP") or not branch.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    caught = _caught(frame.f_code)
    stays, jumps = (_raises(code, places, start, caught) for start in (here + 1, places[branch.argval]))
    return None if stays == jumps else branch.opname.endswith("IF_TRUE") == stays


def _raises(code: Sequence[dis.Instruction], places: Mapping[int, int], start: int, caught: Collection[int]) -> bool:
    """Whether all that can follow a place in the code is a `raise` that nothing there catches."""
    seen, waiting, found = set[int](), [start], False
    while waiting:
        i = waiting.pop()
        if i in seen:
            continue
        seen.add(i)
        step = code[i]
        if step.opname == "RAISE_VARARGS":
            if step.offset in caught:
                return False
            found = True
        elif step.opname.startswith(("RETURN", "YIELD", "RERAISE")):
            return False
        else:
            if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
                waiting.append(places[step.argval])
            if not step.opname.startswith(("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE")):
                waiting.append(i + 1)
    return found


def _caught(code: CodeType) -> frozenset[int]:
    """The places in the code that a `try` is around."""
    steps = list(dis.get_instructions(code))
    places = {step.offset: i for i, step in enumerate(steps)}
    found: set[int] = set()
    for entry in getattr(dis.Bytecode(code), "exception_entries", ()):
        handler = [step.opname for step in steps[places[entry.target] :][:2]]
        if handler != ["PUSH_EXC_INFO", "WITH_EXCEPT_START"]:
            found.update(range(entry.start, entry.end))
    return frozenset(found)
