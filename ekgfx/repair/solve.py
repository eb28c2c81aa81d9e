"""The least-squares refit of a linear operator, with a ridge towards the weights that it has.

    min over Δ, b   Σ ‖Δ x + b − r‖² + λ·d·‖Δ‖²

with r what the output lacks, and d the mean diagonal of the Gram matrix of x.

Held-out positions choose λ: it falls by factors of ten for as long as their error does, or rises. It starts where the
inputs' number, in that of the positions, lets expect it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ekgfx.repair.moments import Moments

Change = tuple[Tensor, Tensor | None]
"""Of an operator: G×O×D, added to its weight; G×O, to its output."""
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
    judge = _Errors(held, offset)
    nothing = torch.zeros_like(cross), (torch.zeros_like(fit.rest) if offset else None)
    start, exact = judge(*nothing), EXACT * float(held.squares.sum())
    tried: dict[float, tuple[float, Tensor, Tensor | None]] = {}

    def error_at(ridge: float) -> float:
        if ridge not in tried:
            change = _solve(gram, cross, fit.ridge(gram, ridge))
            if change is None:
                tried[ridge] = (math.inf, *nothing)
            else:
                shift = _offset(fit, change) if offset else None
                tried[ridge] = (judge(change, shift), change, shift)
        return max(tried[ridge][0], exact)

    best = first = _first(fit)
    for factor in (1 / STEP, STEP):
        while LEAST < best * factor < MOST and _better(error_at(best * factor), error_at(best), exact):
            best *= factor
        if best != first:
            break
    if offset:  # the means alone
        alone = nothing[0], _offset(fit, nothing[0])
        tried[math.inf] = (judge(*alone), *alone)
        best = math.inf if tried[math.inf][0] < error_at(best) else best
    after, change, shift = tried[best]
    if not after < start:
        return None
    fitted = _Errors(fit, offset)
    return Refit(
        change,
        shift,
        best,
        fitted(*nothing) / (fit.scale or 1),
        fitted(change, shift) / (fit.scale or 1),
        start / (held.scale or 1),
        after / (held.scale or 1),
    )


def step(moments: Moments, ridge: float, offset: bool, change: Tensor | None = None) -> Change | None:
    """What is best added to a weight that was changed by `change`, and to the output, for what is lacking then; the
    ridge holds to the weight of before. None: there is no solution in floating point.

    ridge: λ; infinite for the offset alone.
    """
    if ridge == math.inf:
        nothing = torch.zeros_like(moments.cross)
        return nothing, _offset(moments, nothing)
    gram, cross, _ = moments.centered() if offset else moments.raw()
    ridges = moments.ridge(gram, ridge)
    found = _solve(gram, cross if change is None else cross - ridges[:, :, None] * change, ridges)
    return None if found is None else (found, _offset(moments, found) if offset else None)


def _first(moments: Moments) -> float:
    ratio = 10 * moments.width / max(moments.count, 1)
    return float(10.0 ** min(max(round(math.log10(ratio)), -3), 0))


def _better(error: float, than: float, exact: float) -> bool:
    """Whether a smaller ridge is worth it: also where both errors are of rounding alone."""
    return error < than or error == than == exact


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


class _Errors:
    """Σ ‖Δ x + b − r‖² of some positions, from their moments."""

    def __init__(self, moments: Moments, offset: bool) -> None:
        self.moments = moments
        self.gram, self.cross, self.squares = moments.centered() if offset else moments.raw()

    def __call__(self, change: Tensor, offset: Tensor | None) -> float:
        total = self.squares.sum() + (change * (change @ self.gram - 2 * self.cross)).sum()
        if offset is not None:
            total = total + self.moments.count * (_offset(self.moments, change) - offset).square().sum()
        return max(float(total), 0.0)
