"""One short pure function per operator, found through one table.

A rule is given a `Call`: the operator's arguments by their schema names, every tensor as the tuple of its dimensions'
expressions. It states equations (`call.unify`), forbids what it must (`call.freeze`) and returns an `Effect`: the
expressions of the output, and which integer arguments follow from expressions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from ekgfx import axes
from ekgfx.axes import Axis, Dims, Expr

Shape = tuple[int, ...]
Products = Sequence[tuple[Expr, ...]]  # a sum of products of sizes


@dataclass(frozen=True)
class Effect:
    """What an operator does to axes.

    out: dimensions of the output tensor, or a list of them where the operator returns several tensors.
    sizes: integer arguments that are counts of expressions, by name; recomputed when the expressions are cut.
    produces: (argument name, expression): the output axes that this operator computes anew from that weight.
    carries: every output position depends on the input at the same position alone (up to statistics), so a channel's
        importance may be read behind it.
    sums: (argument, which of its tensors if it is a list, dimension) that it sums products over. Where no factor is a
        weight, what is cut of them need not be zero, and must not contribute.
    statistics: the value depends on which positions take part, as a mean does: cutting differs from zeroing.
    macs: its multiply-accumulates over the whole batch; empty where it has none, None where the rule does not know.
    summed: the dimensions that a plain sum is over; divided by their size it is a mean.
    """

    out: Dims | list[Dims]
    sizes: Mapping[str, Expr | Sequence[Expr]] = field(default_factory=dict)
    produces: tuple[str, Expr] | None = None
    carries: bool = False
    sums: Sequence[tuple[str, int | None, int]] = ()
    statistics: bool = False
    macs: Products | None = None
    summed: Dims = ()

    @property
    def outputs(self) -> list[Dims]:
        """`out`, as a list also of a single tensor."""
        return self.out if isinstance(self.out, list) else [self.out]


@dataclass(frozen=True)
class Memory:
    """How an operator uses memory, where its result is a tensor of its own (never a view, never an argument).

    overwrites: it can write its result over its first argument, whose shape and type it has (a sum only sometimes).
    derivative: what of its first argument and its result the derivative may read, `input` and `result`.
    """

    overwrites: bool = False
    derivative: tuple[str, ...] = ("input", "result")


FRESH = Memory(derivative=("input",))
"""Of an operator whose derivative does not read its result."""


@dataclass(frozen=True)
class Call:
    """One use of an operator: arguments by schema name (tensors as Dims), traced output shapes, where it stands, and
    which of its outputs anything reads."""

    op: str
    args: Mapping[str, Any]
    shapes: list[Shape]
    where: str
    read: frozenset[int] = frozenset({0})

    def __getitem__(self, name: str) -> Any:
        if name not in self.args:
            raise KeyError(f"{self.op} has no argument {name!r}, it has {', '.join(self.args)}")
        return self.args[name]

    @property
    def shape(self) -> Shape:
        """Traced shape of the (first) output."""
        return self.shapes[0]

    @property
    def label(self) -> str:
        return f"{self.op} in {self.where}" if self.where else self.op

    def tensors(self) -> list[Dims]:
        """The dimensions of every tensor argument."""
        found: list[Dims] = []
        for value in self.args.values():
            if is_dims(value):
                found.append(value)
            elif isinstance(value, list):
                found.extend(v for v in value if is_dims(v))
        return found

    def unify(self, a: Expr, b: Expr) -> None:
        axes.unify(a, b, self.label)

    def freeze(self, *exprs: Expr, why: str = "positions mix") -> None:
        for expr in exprs:
            axes.freeze(expr, f"{self.label}: {why}")

    def fresh(self, size: int) -> Axis:
        """A new free axis."""
        return Axis(size, self.label)

    def constant(self, size: int, why: str = "fixed size") -> Axis:
        """A new frozen axis."""
        return Axis(size, self.label, frozen=f"{self.label}: {why}")

    def space(self, size: int) -> Axis:
        """A new frozen axis of a size that follows from the example's, as the height of an image does."""
        return Axis(size, self.label, frozen=f"{self.label}: space", example=True)

    def open(self, size: int, why: str = "fixed size") -> Axis:
        """A new frozen axis of a size that the program gave as a number, which may be that of the batch."""
        return Axis(size, self.label, frozen=f"{self.label}: {why}", open=size > 1)

    def constants(self, shape: Iterable[int], why: str = "fixed size") -> Dims:
        return tuple(self.constant(n, why) for n in shape)


class TensorDims(tuple[Expr, ...]):
    """The dimensions of a tensor argument; a type of its own, so that no tuple of integers is mistaken for it.

    mask: it is a tensor of truth values. summed: the dimensions that it is the sum over.
    """

    mask: bool = False
    summed: Dims = ()


def is_dims(value: object) -> bool:
    return isinstance(value, TensorDims)


Rule = Callable[[Call], Effect]

_RULES: dict[str, Rule] = {}
_MEMORY: dict[str, Memory] = {}


def _key(op: OpOverload | str) -> str:
    return str(op)


def rule(*ops: OpOverload | str, replace: bool = False, memory: Memory | None = None) -> Callable[[Rule], Rule]:
    """Register the rule of one or more operators.

    Args:
        ops: overloads such as `torch.ops.aten.relu.default`, or their names (`aten.relu.default`).
        replace: they may have a rule already.
        memory: how they use memory; None where it is not known that their result is a tensor of its own.

    Returns:
        A decorator for the rule: a function of the `Call` that returns its `Effect`.

    Raises:
        ValueError: an operator already has a rule and `replace` is not given.

    Example:
        >>> from ekgfx.rules import Call, Effect
        >>> @ekgfx.rule("mylib.smooth.default")
        ... def smooth(call: Call) -> Effect:
        ...     return Effect(call["x"], carries=True)
    """

    def register(function: Rule) -> Rule:
        for op in ops:
            if _key(op) in _RULES and not replace:
                raise ValueError(
                    f"{op} already has the rule {_RULES[_key(op)].__name__}; pass replace=True to change it"
                )
            _RULES[_key(op)] = function
            if memory is not None:
                _MEMORY[_key(op)] = memory
        return function

    return register


def lookup(op: Any) -> Rule | None:
    """The rule of an operator: its own, or the pointwise rule where PyTorch itself tags the operator as pointwise."""
    found = _RULES.get(_key(op))
    if found is None and isinstance(op, OpOverload) and torch.Tag.pointwise in op.tags:
        return _RULES["pointwise"]
    return found


def memory_of(op: Any) -> Memory | None:
    """How an operator uses memory; None where its result may be a view, or one of its arguments."""
    return _MEMORY.get(_key(op))


def known() -> list[str]:
    """Names of all operators that have a rule of their own."""
    return sorted(_RULES)


def unknown(call: Call, why: str = "no rule for this operator") -> Effect:
    """Sound by default: an operator without a rule freezes every axis that touches it."""
    return opaque(call, why)


def ours(function: Rule) -> bool:
    """Whether a rule comes with ekgfx, so that the user who meets its failure cannot mend it."""
    return function.__module__.partition(".")[0] == "ekgfx"


def passing(call: Call) -> Effect:
    """A guess that tells what an unknown operator costs: an output of an input's shape has its positions, others new
    ones, and nothing is frozen."""

    def like(shape: Shape) -> Dims:
        same = (dims for dims in call.tensors() if tuple(dim.size for dim in dims) == shape)
        return next(same, None) or _same_batch(call, tuple(call.fresh(n) for n in shape))

    return Effect([like(shape) for shape in call.shapes])


def opaque(call: Call, why: str) -> Effect:
    """Nothing is known of what an operator does: all that goes in and comes out stays, but for the batch."""
    for dims in call.tensors():
        call.freeze(*dims, why=why)
    return Effect([_same_batch(call, call.constants(shape, why)) for shape in call.shapes])


def _same_batch(call: Call, out: Dims) -> Dims:
    for dims in call.tensors():
        if out and dims and dims[0].size == out[0].size and any(a.batch for a in axes.axes(dims[0])):
            return (dims[0], *out[1:])  # the leading dimension is the input's batch: its size is known only when run
    return out
