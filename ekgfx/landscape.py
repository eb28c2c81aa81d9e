"""The loss landscape around a network's weights: extreme curvatures, condition number, and a two-dimensional picture.

The paper judges the potential of a sub-network by the fluctuation of its landscape. Its measure, exactly: the condition
number |λ_min / λ_max|, where λ_max is the largest and λ_min the smallest (as a rule the most negative) eigenvalue of
the Hessian of the mean loss over the given samples in all trainable weights, the network in evaluation mode. Lower is
smoother: near 0 where no direction curves downwards.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ekgfx.data.batches import Inputs, device_of, each_batch, to_device, unpacked
from ekgfx.errors import DataError, TrainingError
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.training.loss import cross_entropy

MatVec = Callable[[Tensor], Tensor]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """The extreme eigenvalues of a symmetric operator.

    largest and smallest: the most positive first, the most negative first; each with an error bound (there is an
    eigenvalue that near). steps: products with the operator that it took. converged: whether the first of each are
    within the tolerance asked for.
    """

    largest: tuple[float, ...]
    smallest: tuple[float, ...]
    largest_errors: tuple[float, ...]
    smallest_errors: tuple[float, ...]
    steps: int
    converged: bool

    @property
    def condition(self) -> float:
        """|λ_min / λ_max|; infinite where nothing curves upwards, 0 where nothing curves at all."""
        if not self.largest[0]:
            return math.inf if self.smallest[0] else 0.0
        return abs(self.smallest[0] / self.largest[0])

    @property
    def condition_error(self) -> float:
        """How far `condition` may be off by the two error bounds, to first order."""
        if not self.largest[0]:
            return 0.0
        return (self.smallest_errors[0] + self.condition * self.largest_errors[0]) / abs(self.largest[0])


@dataclass(frozen=True)
class Surface:
    """losses[i][j]: the loss at weights θ + offsets[i]·δ + offsets[j]·η, for filter-normalized directions δ and η."""

    offsets: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]


def spectrum(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    count: int = 1,
    steps: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    on_product: Callable[[int], None] | None = None,
) -> Spectrum:
    """The `count` largest and smallest eigenvalues of the Hessian of the mean loss in all trainable weights.

    Args:
        model: taken in evaluation mode (BatchNorm by its running statistics); not changed.
        batches: `(images, target, …)`, read once and held.
        loss: `loss(output, target)`, mean over the batch.
        count: eigenvalues wanted at either end.
        steps: at most this many Hessian-vector products; each takes about three backward passes over the data, and one
            vector as large as the weights stays in memory per step.
        tolerance: stop when the error bounds are below this part of the largest magnitude.
        seed: of the start vector.
        on_product: called after every Hessian-vector product with their number.

    Raises:
        DataError: there is no batch.
        TrainingError: the loss is not finite.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = _held(batches, model)
    size = sum(weight.numel() for weight in weights)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator, dtype=weights[0].dtype).to(weights[0].device)
    products = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal products
        found = hessian_product(model, held, weights, vector, loss)
        products += 1
        if on_product is not None:
            on_product(products)
        return found

    with evaluation_mode(model):
        return lanczos(product, start, count, steps, tolerance)


def hessian_product(
    model: nn.Module, batches: Sequence[tuple[Any, Any]], weights: Sequence[Tensor], vector: Tensor, loss: Loss
) -> Tensor:
    """H·v for the Hessian of the mean loss over all samples in `weights`, by differentiating the product of gradient
    and v (Pearlmutter 1994). vector: as long as all weights together."""
    product = torch.zeros_like(vector)
    held = [(Inputs.of(images), target) for images, target in batches]
    samples = sum(images.samples for images, _ in held)
    pieces = [
        part.view_as(weight) for part, weight in zip(vector.split([w.numel() for w in weights]), weights, strict=True)
    ]
    for images, target in held:
        # Fused attention kernels cannot be differentiated twice.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            output = images.into(model)
            value = loss(output, target) * (images.samples / samples)
            if not torch.isfinite(value):
                raise TrainingError(f"the loss is {value.item()}; check the weights, and the images for NaN")
            gradients = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
            slope = sum(
                ((g * piece).sum() for g, piece in zip(gradients, pieces, strict=True) if g is not None), value * 0
            )
        curvature = torch.autograd.grad(slope, weights, allow_unused=True)
        found = [torch.zeros_like(w) if c is None else c for w, c in zip(weights, curvature, strict=True)]
        product += torch.cat([each.reshape(-1) for each in found])
    return product


def lanczos(product: MatVec, start: Tensor, count: int = 1, steps: int = 100, tolerance: float = 1e-3) -> Spectrum:
    """Extreme eigenvalues of a symmetric operator by the Lanczos iteration with full re-orthogonalization.

    product: multiplies a vector with the operator. start: any vector that is not orthogonal to what is looked for.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        for _ in range(2):  # twice is enough (Giraud et al. 2005)
            for vector in basis:
                image = image - (image @ vector) * vector
        beside.append(float(image.norm()))
        values, errors = _ritz(diagonal, beside)
        scale = max(abs(values[0]), abs(values[-1]))
        wanted = min(count, len(values))
        closed = beside[-1] <= 1e-10 * scale  # the vectors so far span everything that the operator reaches
        bounds = [*errors[:wanted], *errors[-wanted:]]
        converged = closed or (len(values) >= 2 * count and max(bounds) <= tolerance * scale)
        if converged or len(basis) >= min(steps, start.numel()):
            return Spectrum(
                tuple(reversed(values[-wanted:])),
                tuple(values[:wanted]),
                tuple(reversed(errors[-wanted:])),
                tuple(errors[:wanted]),
                len(basis),
                converged,
            )
        basis.append(image / beside[-1])


def surface(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    points: int = 21,
    span: float = 1.0,
    seed: int = 0,
    on_row: Callable[[int], None] | None = None,
) -> Surface:
    """The mean loss on a square of `points` × `points` weights around the model's own, in two random directions.

    Directions are filter-normalized (Li et al. 2018): every filter of a direction has the norm of the model's filter;
    biases and the parameters of norms stay. span: largest offset either way. on_row: called after every row of points
    with its number. Evaluation mode; the model's weights are put back. A loss may be infinite or NaN far out.

    Raises DataError when there is no batch.
    """
    held = _held(batches, model)
    generator = torch.Generator().manual_seed(seed)
    centre = [parameter.detach().clone() for parameter in model.parameters()]
    first, second = (filter_normalized(centre, generator) for _ in range(2))
    offsets = torch.linspace(-span, span, points).tolist()
    rows = []
    with evaluation_mode(model), _weights_put_back(model, centre), torch.no_grad():
        for a in offsets:
            row = []
            for b in offsets:
                for weight, middle, u, v in zip(model.parameters(), centre, first, second, strict=True):
                    weight.copy_(middle + a * u + b * v)
                row.append(_mean_loss(model, held, loss))
            rows.append(tuple(row))
            if on_row is not None:
                on_row(len(rows))
    return Surface(tuple(offsets), tuple(rows))


def filter_normalized(weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A random direction in which every filter (slice of dimension 0 of a kernel or matrix) has the norm of the one in
    `weights`; 0 for vectors."""
    direction = []
    for weight in weights:
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
        if weight.dim() < 2:
            direction.append(torch.zeros_like(weight))
            continue
        shape = (-1, *[1] * (weight.dim() - 1))
        scale = weight.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1).clamp_min(1e-12)
        direction.append(noise * scale.view(shape))
    return direction


def plot(found: Surface, path: str | Path, title: str = "", format: str | None = None) -> None:
    """Draw a surface as filled contours of the loss (on a logarithmic scale), to a PNG, SVG or PDF file.

    format: "png", "svg" or "pdf"; by default what the file's name ends in. Losses that are not finite are left blank.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    losses = torch.tensor(found.losses).clamp_min(1e-6)
    shown = losses.where(losses.isfinite(), torch.nan)
    levels = _levels(losses)
    drawn = axes.contourf(found.offsets, found.offsets, shown.T, levels=levels, norm=LogNorm(levels[0], levels[-1]))
    figure.colorbar(drawn, label="loss", format="%.3g")
    axes.plot(0, 0, "+", color="white")
    axes.set(xlabel="first direction", ylabel="second direction", title=title)
    figure.savefig(path, dpi=150, format=format)


def _levels(losses: Tensor, count: int = 24) -> list[float]:
    finite = losses[losses.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (1.0, 1.0)
    high = max(high, low * 1.001)
    return torch.logspace(0, 1, count, base=high / low).mul(low).tolist()


def _ritz(diagonal: Sequence[float], beside: Sequence[float]) -> tuple[list[float], list[float]]:
    """Eigenvalues of the tridiagonal matrix, ascending, and the bound on their distance from the operator's."""
    size = len(diagonal)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i in range(size - 1):
        matrix[i, i + 1] = matrix[i + 1, i] = beside[i]
    values, vectors = torch.linalg.eigh(matrix)
    return values.tolist(), (vectors[-1].abs() * beside[-1]).tolist()


def _held(batches: Iterable[Any], model: nn.Module) -> list[tuple[Inputs, Any]]:
    held = []
    for images, labels, _ in map(unpacked, each_batch(batches)):
        held.append((Inputs.of(images).onto(model), to_device(labels, device_of(model))))
    if not held:
        raise DataError("there is no batch to look at the loss on")
    return held


def _mean_loss(model: nn.Module, batches: Sequence[tuple[Inputs, Any]], loss: Loss) -> float:
    total = 0.0
    for images, target in batches:
        output = images.into(model)
        total += float(loss(output, target)) * images.samples
    return total / sum(images.samples for images, _ in batches)


@contextmanager
def _weights_put_back(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)
