"""The least-squares refit of a linear operator, with a ridge towards the weights that it has.

    min over Δ, b   Σ ‖Δ x + b − r‖² + λ·d·‖Δ‖²        r: what the output lacks, d: mean diagonal of the Gram matrix of x

Held-out positions choose λ: it falls from `FIRST` by factors of ten for as long as their error does, or rises.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ekgfx.repair.moments import Moments

FIRST = 1e-2
STEP = 10.0
LEAST, MOST = 1e-13, 1e3
EXACT = 1e-13
"""Share of the error that is left by rounding in the moments."""


@dataclass(frozen=True)
class Refit:
    """change: G×O×D, to be added to the weight; offset: G×O, to the output (None: there is no place for one). Errors
    are relative: what the outputs lack, squared, in the targets' variance."""

    change: Tensor
    offset: Tensor | None
    ridge: float
    before: float
    after: float
    held_before: float
    held_after: float


def refit(fit: Moments, held: Moments, offset: bool) -> Refit | None:
    """The change that lowers the held-out error most; None where none lowers it."""
    gram, cross, _ = fit.centered() if offset else fit.raw()
    if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        return None
    d = gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    nothing = torch.zeros_like(cross), (torch.zeros_like(fit.rest) if offset else None)
    start = _error(held, *nothing)
    exact = EXACT * float(held.squares.sum())
    tried: dict[float, tuple[float, Tensor, Tensor | None]] = {}

    def error_at(ridge: float) -> float:
        if ridge not in tried:
            change = _solve(gram, cross, ridge * d)
            if change is None:
                tried[ridge] = (float("inf"), *nothing)
            else:
                shift = _offset(fit, change) if offset else None
                tried[ridge] = (_error(held, change, shift), change, shift)
        return max(tried[ridge][0], exact)

    best = FIRST
    for factor in (1 / STEP, STEP):
        while LEAST < best * factor < MOST and _better(error_at(best * factor), error_at(best), exact):
            best *= factor
        if best != FIRST:
            break
    if offset:  # the means alone
        alone = nothing[0], _offset(fit, nothing[0])
        if _error(held, *alone) < error_at(best):
            best = float("inf")
            tried[best] = (_error(held, *alone), *alone)
    after, change, shift = tried[best]
    if not after < start:
        return None
    return Refit(
        change,
        shift,
        best,
        _error(fit, *nothing) / _scale(fit),
        _error(fit, change, shift) / _scale(fit),
        start / _scale(held),
        after / _scale(held),
    )


def _better(error: float, than: float, exact: float) -> bool:
    """Whether a smaller ridge is worth it: also where both errors are of rounding alone."""
    return error < than or error == than == exact


def _scale(moments: Moments) -> float:
    return moments.scale or 1.0


def _solve(gram: Tensor, cross: Tensor, ridge: Tensor) -> Tensor | None:
    """Δ of every group; None where the system has no solution in floating point."""
    damped = gram.clone()
    damped.diagonal(dim1=1, dim2=2).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        return None
    change = torch.cholesky_solve(cross.mT, factor).mT
    return change if bool(torch.isfinite(change).all()) else None


def _offset(moments: Moments, change: Tensor) -> Tensor:
    x, r = moments.means
    return r - (change @ x[:, :, None])[:, :, 0]


def _error(moments: Moments, change: Tensor, offset: Tensor | None) -> float:
    """Σ ‖Δ x + b − r‖², from the moments."""
    gram, cross, squares = moments.centered() if offset is not None else moments.raw()
    total = squares.sum() - 2 * (change * cross).sum() + ((change @ gram) * change).sum()
    if offset is not None:
        total = total + moments.count * (_offset(moments, change) - offset).square().sum()
    return max(float(total), 0.0)
