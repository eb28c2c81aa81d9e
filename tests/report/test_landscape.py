"""The landscape: against an analytic quadratic, the full Hessian of a small net, and directions of known norm."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ekgfx.errors import DataError, TrainingError
from ekgfx.landscape import Spectrum, Surface, filter_normalized, hessian_product, lanczos, plot, spectrum, surface
from tests.support.models import PackedAttention, example


class Quadratic(nn.Module):
    """Loss ½ θᵀAθ + bᵀθ with eigenvalues of A that are known."""

    def __init__(self, eigenvalues: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rotation = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64)).Q
        self.matrix = self.rotation @ torch.diag(eigenvalues.double()) @ self.rotation.T
        self.theta = nn.Parameter(torch.randn(len(eigenvalues), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.theta @ self.matrix @ self.theta + x.sum() * self.theta.sum()


class Small(nn.Module):
    """96 weights, tanh so that every direction curves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.a(x))).mean((2, 3)))


def small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    batches = [(torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in (8, 4)]
    return Small().double().eval(), batches


def test_a_quadratic_has_the_curvatures_it_was_made_of() -> None:
    model = Quadratic(torch.tensor([-3.0, -0.5, 0.0, 0.1, 0.2, 1.0, 2.0, 8.0, 10.0]))
    found = spectrum(model, [(torch.randn(2), None)], loss=lambda output, _: output, count=2, tolerance=1e-10)
    assert found.largest == pytest.approx((10, 8), rel=1e-8)
    assert found.smallest == pytest.approx((-3, -0.5), rel=1e-8)
    assert found.condition == pytest.approx(0.3, rel=1e-8)
    assert found.converged


def test_a_net_has_the_eigenvalues_of_its_full_hessian() -> None:
    model, batches = small()
    names = [name for name, _ in model.named_parameters()]
    images, target = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss_at(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in model.parameters()])
        weights = {n: piece.view_as(p) for n, piece, p in zip(names, pieces, model.parameters(), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (images,)), target)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(loss_at, flat)
    values = torch.linalg.eigvalsh(hessian)
    found = spectrum(model, batches, count=3, tolerance=1e-9)
    assert found.largest == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-6)
    assert found.smallest == pytest.approx(values[:3].tolist(), rel=1e-6)
    vector = torch.randn(len(flat), dtype=torch.float64)
    product = hessian_product(model, batches, list(model.parameters()), vector, F.cross_entropy)
    torch.testing.assert_close(product, hessian @ vector, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())
    model.train()
    statistics = model.b.running_mean.clone()
    assert spectrum(model, batches, count=3, tolerance=1e-9) == found  # BatchNorm by its running statistics
    assert model.training
    assert torch.equal(model.b.running_mean, statistics)


def test_weights_that_are_frozen_or_unused_have_no_curvature() -> None:
    """The spectrum is that of the block of H that belongs to the trainable weights; unused ones add zeros to it."""
    model, batches = small()
    model.a.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    weights = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in weights)
    columns = [hessian_product(model, batches, weights, unit, F.cross_entropy) for unit in torch.eye(size).double()]
    values = torch.linalg.eigvalsh(torch.stack(columns))
    found = spectrum(model, batches, tolerance=1e-9)
    assert size == 26  # norm 8, linear 15, unused 3
    assert (found.largest[0], found.smallest[0]) == pytest.approx((values[-1].item(), values[0].item()), rel=1e-6)


def test_error_bounds_hold_before_convergence() -> None:
    values = torch.linspace(-1, 1, 200, dtype=torch.float64) ** 3
    found = lanczos(lambda vector: values * vector, torch.ones(200, dtype=torch.float64), steps=12, tolerance=1e-12)
    assert found.steps == 12
    assert not found.converged
    assert abs(found.largest[0] - 1) <= found.largest_errors[0] < 0.1
    assert abs(found.smallest[0] + 1) <= found.smallest_errors[0] < 0.1


def test_bounds_are_the_residuals_of_the_ritz_vectors() -> None:
    """An isolated eigenvalue converges long before the rest: where vectors are orthogonalized against the last two
    alone, it comes again as a ghost. `product` sees every basis vector, so that Ritz pairs can be formed by hand."""
    values = torch.cat([torch.linspace(-1, 1, 199, dtype=torch.float64), torch.tensor([1000.0], dtype=torch.float64)])
    seen: list[Tensor] = []

    def product(vector: Tensor) -> Tensor:
        seen.append(vector)
        return values * vector

    start = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = lanczos(product, start, count=3, steps=60, tolerance=1e-15)
    basis = torch.stack(seen, 1)
    assert (basis.T @ basis - torch.eye(60)).abs().max() < 1e-14
    ritz, vectors = torch.linalg.eigh(basis.T @ (values[:, None] * basis))
    residuals = (values[:, None] * (basis @ vectors) - (basis @ vectors) * ritz).norm(dim=0)
    assert found.largest == pytest.approx(ritz.flip(0)[:3].tolist(), rel=1e-10)
    assert found.smallest == pytest.approx(ritz[:3].tolist(), rel=1e-10)
    assert found.largest_errors == pytest.approx(residuals.flip(0)[:3].tolist(), rel=1e-6, abs=1e-12)
    assert found.smallest_errors == pytest.approx(residuals[:3].tolist(), rel=1e-6)
    for value, error in zip(found.largest + found.smallest, found.largest_errors + found.smallest_errors, strict=True):
        assert (values - value).abs().min() <= error + 1e-9


def test_both_ends_must_converge_and_all_that_was_asked_for_is_given() -> None:
    values = torch.cat([torch.linspace(-1, 0, 199, dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)])
    found = lanczos(lambda vector: values * vector, torch.ones(200, dtype=torch.float64), tolerance=1e-4)
    assert found.converged
    assert max(found.largest_errors[0], found.smallest_errors[0]) <= 1e-4
    assert found.largest_errors[0] < 1e-3 * found.smallest_errors[0]  # the isolated end was there long before
    rough = lanczos(lambda vector: values * vector, torch.ones(200, dtype=torch.float64), count=3, tolerance=1e9)
    assert (len(rough.largest), len(rough.smallest), rough.steps) == (3, 3, 6)


def test_the_condition_number_says_how_sure_it_is() -> None:
    by_hand = Spectrum((10.0,), (-1.0,), (0.5,), (0.2,), 5, True)
    assert by_hand.condition_error == pytest.approx(0.2 / 10 + 0.1 * 0.5 / 10)
    values = torch.linspace(-1, 1, 200, dtype=torch.float64) ** 3
    values[0] = -0.9
    found = lanczos(lambda vector: values * vector, torch.ones(200, dtype=torch.float64), steps=14, tolerance=1e-12)
    least = max(0.9, (197 / 199) ** 3)
    assert abs(found.condition - least) <= found.condition_error < 0.2
    flat = lanczos(lambda vector: 0 * vector, torch.ones(5, dtype=torch.float64))
    assert (flat.condition, flat.condition_error) == (0.0, 0.0)


def test_an_operator_of_low_rank_ends_early() -> None:
    direction = torch.nn.functional.normalize(torch.randn(50, dtype=torch.float64), dim=0)
    found = lanczos(lambda v: 4 * (direction @ v) * direction, torch.ones(50, dtype=torch.float64))
    assert found.steps <= 3
    assert found.largest[0] == pytest.approx(4)


def test_attention_can_be_differentiated_twice() -> None:
    model = PackedAttention().double()
    found = spectrum(model, [(example(PackedAttention, 4)[0], torch.arange(4) % 2)], steps=5)
    assert found.largest[0] > 0


def test_directions_have_the_norms_of_the_filters() -> None:
    model, _ = small()
    weights = [p.detach() for p in model.parameters()]
    direction = filter_normalized(weights, torch.Generator().manual_seed(0))
    for weight, along in zip(weights, direction, strict=True):
        if weight.dim() > 1:
            torch.testing.assert_close(along.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
            assert not torch.allclose(along, weight)
        else:
            assert not along.any()


def test_a_surface_is_the_loss_around_the_weights(tmp_path: Path) -> None:
    model, batches = small()
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    found = surface(model, batches, points=5, span=0.5)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model.eval()
    output = torch.cat([model(images) for images, _ in batches]).detach()
    centre = F.cross_entropy(output, torch.cat([target for _, target in batches])).item()
    assert found.offsets == pytest.approx((-0.5, -0.25, 0, 0.25, 0.5))
    assert found.losses[2][2] == pytest.approx(centre, rel=1e-9)
    assert len({loss for row in found.losses for loss in row}) == 25
    draw = torch.Generator().manual_seed(0)
    along, across = (filter_normalized(before, draw) for _ in range(2))
    for i, j in ((0, 2), (2, 0), (1, 4)):
        moved = small()[0]
        for weight, middle, u, v in zip(moved.parameters(), before, along, across, strict=True):
            weight.data = middle + found.offsets[i] * u + found.offsets[j] * v
        parts = [F.cross_entropy(moved(images), target, reduction="sum") for images, target in batches]
        assert found.losses[i][j] == pytest.approx(sum(parts).item() / 12, rel=1e-9)
    plot(found, tmp_path / "surface.png", "small")
    assert (tmp_path / "surface.png").read_bytes().startswith(b"\x89PNG")
    plot(Surface((-1.0, 0.0, 1.0), ((1.0,) * 3,) * 3), tmp_path / "flat.png")  # a flat surface has no levels of its own
    holes = Surface((-1.0, 0.0, 1.0), ((1.0, float("nan"), 2.0), (float("inf"),) * 3, (1.0,) * 3))
    plot(holes, tmp_path / "picture", format="svg")
    assert b"<svg" in (tmp_path / "picture").read_bytes()


def test_the_first_direction_is_drawn_from_left_to_right(tmp_path: Path) -> None:
    from matplotlib.image import imread

    plot(Surface((-1.0, 0.0, 1.0), ((1.0,) * 3, (2.0,) * 3, (9.0,) * 3)), tmp_path / "slope.png")
    picture = imread(tmp_path / "slope.png")[..., :3]
    height, width = picture.shape[:2]
    left, right, above, below = (
        picture[int(y * height), int(x * width)] for y, x in ((0.4, 0.25), (0.4, 0.65), (0.3, 0.3), (0.7, 0.3))
    )
    assert abs(left - right).max() > 0.2
    assert abs(above - below).max() < 0.02


def test_errors() -> None:
    model, batches = small()
    with pytest.raises(DataError, match="no batch"):
        spectrum(model, [])
    with pytest.raises(TrainingError, match="loss is nan"):
        spectrum(model, [(batches[0][0] * float("nan"), batches[0][1])])
