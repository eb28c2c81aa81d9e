"""Where there are fewer positions than inputs, the refit is looked for in as many dimensions as there are positions.

With a ridge towards the weight as it is, the change of a least-squares refit is a combination of what was read at the
positions to fit on. So inputs are told in an orthonormal basis of these, N numbers instead of D. Moments are then N×N:
the first linear layer of a VGG has 25,088 inputs, and a Gram matrix of them would have 5 GB.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FEW = 0.5
"""Positions in the inputs, below which it is worth it."""


def spanning(rows: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis, G×D×N, of rows S×G×D, N in all."""
    columns = torch.cat(list(rows)).permute(1, 2, 0)
    return torch.linalg.qr(columns.double()).Q.to(columns.dtype)


def reduced(x: Tensor, basis: Tensor | None) -> Tensor:
    """Inputs S×G×D in the basis, S×G×N."""
    return x if basis is None else (x.movedim(1, 0) @ basis).movedim(0, 1)


def restored(change: Tensor, basis: Tensor | None) -> Tensor:
    """A change of the weight in the basis, G×O×N, as one of the weight, G×O×D."""
    return change if basis is None else change @ basis.mT.to(change)
