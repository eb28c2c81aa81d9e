"""Second moments of what an operator reads and of what it lacks: all that a least-squares refit needs to know."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

PRECISION = torch.float64


@dataclass(eq=False)
class Moments:
    """Sums over positions, for G products of D inputs and O outputs; in double precision.

    width: inputs of the operator, of which the D may be fewer combinations. x: inputs less `shift`; r: what the outputs
    lack; t: what the outputs should be. gram: G×D×D, Σ x xᵀ; cross: G×O×D, Σ r xᵀ; inputs: G×D, Σ x; rest: G×O, Σ r;
    squares: G×O, Σ r²; target: G×O, Σ t; target_squares: G×O, Σ t².
    """

    shift: Tensor
    gram: Tensor
    cross: Tensor
    inputs: Tensor
    rest: Tensor
    squares: Tensor
    target: Tensor
    target_squares: Tensor
    width: int
    count: int = 0

    @classmethod
    def empty(cls, shift: Tensor, outputs: int, width: int | None = None) -> Self:
        """Moments of nothing. shift: G×D, about the inputs' mean, so that the sums lose no digits to it; width: None
        for D."""
        groups, inputs = shift.shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=PRECISION, device=shift.device)

        return cls(
            shift.to(PRECISION),
            zeros(inputs, inputs),
            zeros(outputs, inputs),
            zeros(inputs),
            zeros(outputs),
            zeros(outputs),
            zeros(outputs),
            zeros(outputs),
            inputs if width is None else width,
        )

    def add(self, x: Tensor, r: Tensor, t: Tensor) -> None:
        """S more positions: inputs S×G×D, lacks and targets S×G×O. Products are taken in the precision of the tensors,
        sums in double."""
        x = x - self.shift.to(x.dtype)
        by_group = x.permute(1, 2, 0)  # G × D × S
        self.gram += by_group @ by_group.mT
        self.cross += r.permute(1, 2, 0) @ by_group.mT
        self.inputs += x.sum(0)
        self.rest += r.sum(0)
        self.squares += r.square().sum(0)
        self.target += t.sum(0)
        self.target_squares += t.square().sum(0)
        self.count += len(x)

    def lacking_otherwise(self) -> "Moments":
        """Of the same inputs and targets, to add up something else that is lacking."""
        return replace(
            self,
            cross=torch.zeros_like(self.cross),
            rest=torch.zeros_like(self.rest),
            squares=torch.zeros_like(self.squares),
        )

    def add_lack(self, x: Tensor, r: Tensor) -> None:
        """What is lacking at S positions: inputs S×G×D, lacks S×G×O."""
        self.cross += r.permute(1, 2, 0) @ (x - self.shift.to(x.dtype)).permute(1, 0, 2)
        self.rest += r.sum(0)
        self.squares += r.square().sum(0)

    def in_share(self, share: Tensor) -> None:
        """What is lacking of each output, G×O, becomes as much larger as its share is small; its squares do not."""
        self.cross /= share[:, :, None]
        self.rest /= share

    def shift_rest(self, change: Tensor, offset: Tensor | None) -> None:
        """What is lacking after the weight has changed by `change` and the output by `offset`."""
        step = (change @ self.shift[:, :, None])[:, :, 0] + (0 if offset is None else offset)
        moved = (change @ self.inputs[:, :, None])[:, :, 0]
        changed = change @ self.gram
        self.squares += (change * (changed - 2 * self.cross)).sum(2)
        self.squares += step * (self.count * step + 2 * moved - 2 * self.rest)
        self.cross -= changed + step[:, :, None] * self.inputs[:, None, :]
        self.rest -= moved + self.count * step

    def centered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gram matrix, cross moments and squares about the means."""
        n = max(self.count, 1)
        gram = self.gram - self.inputs[:, :, None] * self.inputs[:, None, :] / n
        cross = self.cross - self.rest[:, :, None] * self.inputs[:, None, :] / n
        return gram, cross, self.squares - self.rest.square() / n

    def raw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gram matrix, cross moments and squares about zero."""
        s, n = self.shift, self.count
        gram = self.gram + s[:, :, None] * self.inputs[:, None, :] + self.inputs[:, :, None] * s[:, None, :]
        gram = gram + n * s[:, :, None] * s[:, None, :]
        return gram, self.cross + self.rest[:, :, None] * s[:, None, :], self.squares

    def ridge(self, gram: Tensor, factor: float) -> Tensor:
        """G×1: `factor` times the mean diagonal of a Gram matrix, over all inputs of the operator."""
        return factor * gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / self.width

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of the inputs (G×D) and of what is lacking (G×O)."""
        n = max(self.count, 1)
        return self.inputs / n + self.shift, self.rest / n

    @property
    def scale(self) -> float:
        """The targets' sum of squares about their mean (about zero where they do not vary)."""
        about_mean = self.target_squares - self.target.square() / max(self.count, 1)
        total = float(about_mean.sum())
        return total if total > 1e-12 * float(self.target_squares.sum()) else float(self.target_squares.sum())
