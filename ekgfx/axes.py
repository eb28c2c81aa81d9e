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
from functools import reduce
from operator import mul

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Axis:
    """`size` positions that stand or fall one by one (free) or not at all (frozen, with the reason).

    A `batch` axis is frozen too, but its size is that of the input at hand, not the one seen while tracing.
    """

    size: int
    origin: str = ""
    frozen: str | None = None
    batch: bool = False
    bound: "Expr | None" = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Sum:
    """Concatenation: the positions of each term, one term after the other."""

    terms: tuple["Expr", ...]


@dataclass(frozen=True, slots=True)
class Prod:
    """Row-major product: position = i₁·|e₂|·|e₃|… + i₂·|e₃|… + …; the empty product has one position."""

    factors: tuple["Expr", ...]


Expr = Axis | Sum | Prod
Dims = tuple[Expr, ...]

ONE = Prod(())


def size(expr: Expr) -> int:
    """Number of positions of the uncut dimension."""
    match expr:
        case Axis():
            return expr.size
        case Sum(terms):
            return sum(map(size, terms))
        case Prod(factors):
            return reduce(mul, map(size, factors), 1)


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
        case Sum(parts) | Prod(parts) if len(parts) > 1 and all(map(_indivisible, parts)):
            return expr  # as most are
        case Sum(terms):
            flat = [t for term in map(resolve, terms) for t in (term.terms if isinstance(term, Sum) else (term,))]
            flat = [t for t in flat if size(t)] or flat[:1]
            return flat[0] if len(flat) == 1 else Sum(tuple(flat))
        case Prod(factors):
            flat = [
                f
                for factor in map(resolve, factors)
                for f in (factor.factors if isinstance(factor, Prod) else (factor,))
            ]
            flat = [f for f in flat if size(f) != 1]
            if len(flat) == 1:
                return flat[0]
            if flat and isinstance(flat[0], Sum):
                return resolve(Sum(tuple(Prod((term, *flat[1:])) for term in flat[0].terms)))
            return Prod(tuple(flat))


def _indivisible(expr: Expr) -> bool:
    return isinstance(expr, Axis) and expr.bound is None and expr.size > 1


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
    return all(axis.frozen and not axis.batch for axis in axes(expr))


def freeze(expr: Expr, reason: str) -> None:
    """Forbid to prune any position of `expr`; an axis that is frozen already keeps its first reason."""
    for axis in axes(expr):
        axis.frozen = axis.frozen or reason


def unify(a: Expr, b: Expr, why: str = "") -> None:
    """State that two dimensions of equal size hold the same positions in the same order.

    `why` names the operator for the reason that is recorded if the equation cannot be solved exactly.

    Raises:
        ValueError: the sizes differ (an operator's rule is wrong).
    """
    a, b = resolve(a), resolve(b)
    if size(a) != size(b):
        raise ValueError(f"cannot unify dimensions of {size(a)} and {size(b)} positions ({why})")
    if a is b or size(a) == 0 or (fixed(a) and fixed(b)):
        return
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


def _join(a: Axis, b: Axis) -> None:
    if b.batch or (b.frozen and not a.batch):
        a, b = b, a  # the survivor is the one that knows more
    b.bound = a


def _bind(axis: Axis, expr: Expr) -> None:
    # Sizes are equal and trivial factors are gone, so `expr` cannot contain `axis` (the occurs check holds by size).
    if axis.frozen:
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
        elif size(x) == size(y):
            unify(x, y, why)
        elif size(x) < size(y):
            head, tail = split(y, size(x))
            right.append(tail)
            unify(x, head, why)
        else:
            head, tail = split(x, size(y))
            left.append(tail)
            unify(head, y, why)


def _unify_products(a: Prod, b: Prod, why: str) -> None:
    first, second = a.factors[0], b.factors[0]
    if size(first) < size(second):
        a, b, first, second = b, a, second, first
    if size(first) == size(second):
        unify(first, second, why)
        # Joining the leading factors may have refined the others: start again from what they are now.
        unify(Prod(a.factors[1:]), Prod(b.factors[1:]), why)
    elif size(first) % size(second) == 0:
        _refine(first, Prod((_part(first, size(second)), _part(first, size(first) // size(second)))))
        unify(a, b, why)
    else:
        reason = f"{why}: {size(first)} positions do not divide into groups of {size(second)}"
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
                if position < before + size(term):
                    head, tail = split(term, position - before)
                    return Sum((*terms[:i], head)), Sum((tail, *terms[i + 1 :]))
                before += size(term)
        case Prod(factors):
            # Cut the leading factor beside the boundary; where the boundary falls inside one of its positions, that
            # position alone becomes a copy of the remaining factors, which is then cut in turn.
            inner = size(Prod(factors[1:]))
            row, offset = divmod(position, inner)
            edge = row or 1
            split(factors[0], edge)
            if offset and row and size(factors[0]) - row > 1:
                split(factors[0], row + 1)
            return split(Prod(factors), position)
    raise ValueError(f"no position {position} in a dimension of {size(expr)}")


def _part(axis: Expr, positions: int) -> Axis:
    assert isinstance(axis, Axis)  # the leading factor of a resolved Prod
    return Axis(positions, axis.origin, axis.frozen)


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
            return reduce(mul, (count(factor, counts) for factor in factors), 1)


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
                starts.append(starts[-1] + size(term))
            return torch.cat([start + positions(term, kept) for start, term in zip(starts, terms, strict=False)])
        case Prod(factors):
            index = torch.zeros(1, dtype=torch.long)
            for factor in factors:
                index = (index[:, None] * size(factor) + positions(factor, kept)).flatten()
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
