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
    operators, kept from batch to batch; known: rows of batches that were kept; room: elements of more that may be."""

    operator: LinearOperator
    number: int
    stream: Stream | None
    clamp: Clamp | None
    matrix: Tensor
    most: int
    room: int
    gains: dict[Any, Tensor] = field(default_factory=dict)
    known: dict[int, "list[Rows]"] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Inputs S×G×D, lacks and targets S×G×O at some positions; an activation behind gets gain · output + rest."""

    x: Tensor
    r: Tensor
    t: Tensor
    gain: Tensor | None = None
    rest: Tensor | None = None

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
    def empty(cls, x: Tensor, r: Tensor, stream: bool) -> "Pair":
        """For rows such as these."""
        shift, outputs = x.mean(0), r.shape[2]
        return cls(Moments.empty(shift, outputs), Moments.empty(shift, outputs), stream, x.dtype)

    @property
    def exact(self) -> bool:
        """Whether nothing is lacking."""
        return float(self.fit.squares.sum()) <= EXACT.get(self.precision, 1e-10) * float(self.fit.target_squares.sum())
