"""The axis algebra: what every dimension of every tensor is made of.

A dimension is an *expression* over axes. An `Axis` is a run of positions that nothing has told apart yet; a `Sum` is a
concatenation (positions of the first term, then of the second, …); a `Prod` is a row-major product (the first factor
varies slowest). Operators state equations between expressions with `unify`, the only operation that changes anything:
it joins axes, or *refines* an axis into a Sum or a Prod of smaller ones. Everybody who holds a refined axis sees the
refinement, because expressions are read through `resolve`.

What is still free at the end can be pruned. Where an equation has no exact solution in the algebra, both sides are
frozen with the reason: that prunes less, never wrongly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ekgfx.errors import RuleError


@dataclass(eq=False, slots=True)
class Axis:
    """`size` positions that stand or fall one by one (free) or not at all (frozen, with the reason).

    A `batch` axis is frozen too, but its size is that of the input at hand, not the one seen while tracing. An `open`
    axis is frozen, and of a size that the program gave as a number: it may yet turn out to be the batch's, as in
    `arange(len(x))`. An `example` axis is frozen, and another input may have another size of it, as images and
    sequences have.
    """

    size: int
    origin: str = ""
    frozen: str | None = None
    batch: bool = False
    open: bool = False
    example: bool = False
    bound: "Expr | None" = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Sum:
    """Concatenation: the positions of each term, one term after the other."""

    terms: tuple["Expr", ...]
    size: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sum([term.size for term in self.terms]))


@dataclass(frozen=True, slots=True)
class Prod:
    """Row-major product: position = i₁·|e₂|·|e₃|… + i₂·|e₃|… + …; the empty product has one position."""

    factors: tuple["Expr", ...]
    size: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", prod([factor.size for factor in self.factors]))


Expr = Axis | Sum | Prod
Dims = tuple[Expr, ...]

ONE = Prod(())
SINGLE = "a single position"  # the reason why it stays: no group loses its last one


def resolve(expr: Expr) -> Expr:
    """The normal form of an expression: refinements followed, Sums and Prods flat, trivial parts dropped.

    A Prod with a leading Sum distributes, Prod(Sum(a, b), x) = Sum(Prod(a, x), Prod(b, x)); so the leading factor of a
    resolved Prod is an Axis, and its other factors are Axes or Sums.
    """
    match expr:
        case Axis() if expr.bound is None:
            return expr
        case Axis():
            assert expr.bound is not None
            expr.bound = resolve(expr.bound)  # path compression
            return expr.bound
        case Sum(parts) if len(parts) > 1 and _normal(parts, 1):
            return expr  # as most are
        case Prod(parts) if len(parts) > 1 and _normal(parts, 2):
            return expr
        case Sum(terms):
            flat = [t for term in map(resolve, terms) for t in (term.terms if isinstance(term, Sum) else (term,))]
            flat = [t for t in flat if t.size] or flat[:1]
            return flat[0] if len(flat) == 1 else Sum(tuple(flat))
        case Prod(factors):
            flat = [
                f
                for factor in map(resolve, factors)
                for f in (factor.factors if isinstance(factor, Prod) else (factor,))
            ]
            flat = [f for f in flat if f.size != 1]
            if len(flat) == 1:
                return flat[0]
            if flat and isinstance(flat[0], Sum):
                return resolve(Sum(tuple(Prod((term, *flat[1:])) for term in flat[0].terms)))
            return Prod(tuple(flat))


def _normal(parts: tuple[Expr, ...], least: int) -> bool:
    """Whether all are unrefined axes of at least so many positions."""
    for part in parts:  # noqa: SIM110  all() over a generator takes twice as long
        if type(part) is not Axis or part.bound is not None or part.size < least:
            return False
    return True


def axes(expr: Expr) -> Iterator[Axis]:
    """The unrefined axes of an expression, in order, repeated where they occur repeatedly."""
    match resolve(expr):
        case Axis() as axis:
            yield axis
        case Sum(parts) | Prod(parts):
            for part in parts:
                yield from axes(part)


def fixed(expr: Expr) -> bool:
    """Whether every position stays, whatever is pruned and whatever batch comes in."""
    match resolve(expr):
        case Axis() as axis:
            return bool(axis.frozen) and not (axis.batch or axis.open)
        case Sum(parts) | Prod(parts):
            return all(map(fixed, parts))


def freeze(expr: Expr, reason: str) -> None:
    """Forbid to prune any position of `expr`; an axis that is frozen already keeps its first reason."""
    for axis in axes(expr):
        axis.frozen = axis.frozen or reason


def unify(a: Expr, b: Expr, why: str = "") -> None:
    """State that two dimensions of equal size hold the same positions in the same order.

    `why` names the operator for the reason that is recorded if the equation cannot be solved exactly.

    Raises:
        RuleError: the sizes differ (an operator's rule is wrong).
    """
    a, b = resolve(a), resolve(b)
    if a.size != b.size:
        raise RuleError(f"cannot unify dimensions of {a.size} and {b.size} positions ({why})")
    if a is b or a.size == 0:
        return
    stays = fixed(a), fixed(b)
    if all(stays):
        return
    if any(stays) and a.size > 1:  # then all of the other stays, and need not be taken apart
        known, other = (a, b) if stays[0] else (b, a)
        if not any(axis.batch for axis in axes(other)):
            for axis in axes(other):
                axis.example = axis.example or any(part.example for part in axes(known))
            return freeze(other, next((axis.frozen for axis in axes(known) if axis.frozen), SINGLE))
    match a, b:
        case Axis(), Axis():
            _join(a, b)
        case Axis(), _:
            _bind(a, b)
        case _, Axis():
            _bind(b, a)
        case (Sum(), _) | (_, Sum()):
            _unify_sum(a, b, why)
        case Prod(), Prod():
            _unify_products(a, b, why)


def identify(axis: Axis, known: Axis) -> None:
    """State that an axis is another one, of the same size, though both stay: it has as many positions as that has in
    whatever is computed."""
    axis.bound = known


def _join(a: Axis, b: Axis) -> None:
    if _knows(b) > _knows(a):
        a, b = b, a
    b.bound = a


def _knows(axis: Axis) -> int:
    """How much is known of an axis: that it is the batch, that it stays, that it stays or is the batch, nothing."""
    return 3 if axis.batch else 0 if not axis.frozen else 1 if axis.open else 2


def _bind(axis: Axis, expr: Expr) -> None:
    # Sizes are equal and trivial factors are gone, so `expr` cannot contain `axis` (the occurs check holds by size).
    if axis.frozen:
        for part in axes(expr):
            part.open = axis.open and (part.open or not part.frozen)
        freeze(expr, axis.frozen)
    if not axis.batch:
        axis.bound = expr


def _unify_sum(a: Expr, b: Expr, why: str) -> None:
    left, right = [a], [b]  # what is left to align, the next piece on top
    while left:
        # A piece may have been refined by an equation before it, into a Sum whose terms are the pieces.
        x, y = resolve(left.pop()), resolve(right.pop())
        if isinstance(x, Sum) or isinstance(y, Sum):
            left += reversed(x.terms) if isinstance(x, Sum) else [x]
            right += reversed(y.terms) if isinstance(y, Sum) else [y]
        elif x.size == y.size:
            unify(x, y, why)
        elif x.size < y.size:
            head, tail = split(y, x.size)
            right.append(tail)
            unify(x, head, why)
        else:
            head, tail = split(x, y.size)
            left.append(tail)
            unify(head, y, why)


def _unify_products(a: Prod, b: Prod, why: str) -> None:
    first, second = a.factors[0], b.factors[0]
    if first.size < second.size:
        a, b, first, second = b, a, second, first
    if first.size == second.size:
        unify(first, second, why)
        # Joining the leading factors may have refined the others: start again from what they are now.
        unify(Prod(a.factors[1:]), Prod(b.factors[1:]), why)
    elif first.size % second.size == 0:
        _refine(first, Prod((_part(first, second.size), _part(first, first.size // second.size))))
        unify(a, b, why)
    else:
        reason = f"{why}: {first.size} positions do not divide into groups of {second.size}"
        freeze(a, reason)
        freeze(b, reason)


def split(expr: Expr, position: int) -> tuple[Expr, Expr]:
    """Cut a dimension in two: its first `position` positions (0 < position < size) and the rest."""
    match resolve(expr):
        case Axis() as axis:
            halves = Sum((_part(axis, position), _part(axis, axis.size - position)))
            _refine(axis, halves)
            return halves.terms[0], halves.terms[1]
        case Sum(terms):
            before = 0
            for i, term in enumerate(terms):
                if before == position:
                    return Sum(terms[:i]), Sum(terms[i:])
                if position < before + term.size:
                    head, tail = split(term, position - before)
                    return Sum((*terms[:i], head)), Sum((tail, *terms[i + 1 :]))
                before += term.size
        case Prod(factors):
            # Cut the leading factor beside the boundary; where the boundary falls inside one of its positions, that
            # position alone becomes a copy of the remaining factors, which is then cut in turn.
            split(factors[0], position // Prod(factors[1:]).size or 1)
            return split(Prod(factors), position)
    raise ValueError(f"no position {position} in a dimension of {expr.size}")


def _part(axis: Expr, positions: int) -> Axis:
    assert isinstance(axis, Axis)  # the leading factor of a resolved Prod
    frozen = axis.frozen or (SINGLE if positions == 1 else None)
    return Axis(positions, axis.origin, frozen, open=axis.open and positions > 1, example=axis.example)


def _refine(axis: Expr, expr: Sum | Prod) -> None:
    """Replace an unbound axis by its parts (which inherit its freezing)."""
    assert isinstance(axis, Axis) and axis.bound is None
    if axis.batch:
        for part in axes(expr):
            part.frozen = axis.frozen
    axis.bound = expr


def count(expr: Expr, counts: Mapping[Axis, int]) -> int:
    """Number of positions left when each axis keeps `counts[axis]` (all, where it is not named)."""
    match resolve(expr):
        case Axis() as axis:
            return counts.get(axis, axis.size)
        case Sum(terms):
            return sum(count(term, counts) for term in terms)
        case Prod(factors):
            return prod(count(factor, counts) for factor in factors)


def counted(exprs: Expr | Sequence[Expr], counts: Mapping[Axis, int]) -> int | list[int]:
    """`count` of one expression, or of each in a sequence: the integers of an operator's argument."""
    return count(exprs, counts) if isinstance(exprs, Expr) else [count(expr, counts) for expr in exprs]


def positions(expr: Expr, kept: Mapping[Axis, Tensor]) -> Tensor:
    """Positions left, ascending, when each axis keeps the indices `kept[axis]` (all, where it is not named)."""
    match resolve(expr):
        case Axis() as axis:
            return kept[axis] if axis in kept else torch.arange(axis.size)
        case Sum(terms):
            starts = [0]
            for term in terms:
                starts.append(starts[-1] + term.size)
            return torch.cat([start + positions(term, kept) for start, term in zip(starts, terms, strict=False)])
        case Prod(factors):
            index = torch.zeros(1, dtype=torch.long)
            for factor in factors:
                index = (index[:, None] * factor.size + positions(factor, kept)).flatten()
            return index


def membership(expr: Expr, axis: Axis) -> Tensor:
    """For every position of the dimension the position of `axis` it stands for, or -1 (first occurrence counts)."""
    match resolve(expr):
        case Axis() as own:
            return torch.arange(own.size) if own is axis else torch.full((own.size,), -1)
        case Sum(terms):
            return torch.cat([membership(term, axis) for term in terms])
        case Prod(factors):
            index = torch.full((1,), -1)
            for factor in factors:
                inner = membership(factor, axis)
                index = torch.where(index[:, None] >= 0, index[:, None], inner).flatten()
            return index


def show(expr: Expr) -> str:
    """Readable form of an expression: `64`, `12·64`, `64 + 32`; frozen parts in brackets."""
    match resolve(expr):
        case Axis() as axis:
            return "batch" if axis.batch else f"[{axis.size}]" if axis.frozen else str(axis.size)
        case Sum(terms):
            return "(" + " + ".join(map(show, terms)) + ")"
        case Prod(factors):
            return "·".join(map(show, factors)) or "1"
