"""What is seen of one operator at some output positions, and the moments of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ekgfx.repair.clamped import Clamp
from ekgfx.repair.moments import Moments
from ekgfx.repair.operators import LinearOperator
from ekgfx.repair.targets import Stream

EXACT = {torch.float64: 1e-24}


@dataclass(eq=False)
class Look:
    """How an operator is looked at. matrix: its weight, G×O×D; most: positions of a batch; gains: of the stream's
    operators, kept from batch to batch; known: rows of batches that were kept; room: elements of more that may be;
    basis: what inputs are told in (`ekgfx.repair.span`)."""

    operator: LinearOperator
    number: int
    stream: Stream | None
    clamp: Clamp | None
    matrix: Tensor
    most: int
    room: int
    gains: dict[Any, Tensor] = field(default_factory=dict)
    known: dict[int, "list[Rows]"] = field(default_factory=dict)
    basis: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Inputs S×G×D, lacks and targets S×G×O at some positions; an activation behind gets gain · output + rest."""

    x: Tensor
    r: Tensor
    t: Tensor
    gain: Tensor | None = None
    rest: Tensor | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing is lacking."""
        return negligible(self.r.square().sum(), self.t.square().sum(), self.r.dtype)

    @property
    def size(self) -> int:
        """Elements of all of them."""
        return sum(t.numel() for t in (self.x, self.r, self.t, self.gain, self.rest) if t is not None)


@dataclass(eq=False)
class Pair:
    """Moments to fit on and moments to judge by. stream: the target is a residual sum's; precision: the network's."""

    fit: Moments
    held: Moments
    stream: bool
    precision: torch.dtype

    @classmethod
    def empty(cls, look: Look, rows: Rows) -> "Pair":
        """For rows such as these."""
        shift, outputs, width = rows.x.mean(0), rows.r.shape[2], look.matrix.shape[2]
        fit, held = (Moments.empty(shift, outputs, width) for _ in range(2))
        return cls(fit, held, look.stream is not None, rows.x.dtype)

    @property
    def exact(self) -> bool:
        """Whether nothing is lacking."""
        return negligible(self.fit.squares.sum(), self.fit.target_squares.sum(), self.precision)


def negligible(squares: Tensor, target: Tensor, precision: torch.dtype) -> bool:
    """Whether a sum of squares is rounding in that of the target."""
    return float(squares) <= EXACT.get(precision, 1e-10) * float(target)
