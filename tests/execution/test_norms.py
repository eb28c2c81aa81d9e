"""The statistics of a sub-network's norms, against PyTorch's own evaluation and against what is computed by hand."""

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.bank.norms import Settled, noted, statistics
from ekgfx.data.batches import Inputs


class Twice(nn.Module):
    """One norm that is called twice, one that keeps no running averages, one on vectors."""

    def __init__(self, averages: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(6), nn.BatchNorm2d(6, track_running_stats=averages)
        self.head, self.flat = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu()
        x = self.norm(self.b(x)).relu()
        return self.flat(self.head(self.last(x).mean((2, 3))))


def twice(averages: bool = True) -> nn.Module:
    """Its averages are those of images that are brighter than `images`."""
    torch.manual_seed(0)
    return ekgfx.calibrate(Twice(averages).double(), [1.3 * images() + 0.4]).eval()


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double() * 2 + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_nothing_is_cut_they_are_the_running_averages(dtype: torch.dtype) -> None:
    model, x = twice().to(dtype), images().to(dtype)
    traced, shown = ekgfx.trace(model, x[:2]), [Inputs.of(part) for part in x.split([5, 5, 14])]
    known = statistics(traced, {}, shown, noted(traced, shown))
    expected = [model.norm, model.norm, model.last, model.flat]
    for (mean, var), norm in zip(known.values(), expected, strict=True):
        assert torch.equal(mean.to(dtype), norm.running_mean) and torch.equal(var.to(dtype), norm.running_var)
    with torch.no_grad():
        assert torch.equal(Settled(traced, {}, known)(x), traced.subnetwork()(x))
        torch.testing.assert_close(Settled(traced, {}, known)(x), model(x))


def test_of_a_cut_network_by_hand() -> None:
    """One batch: each norm gets what the corrected ones before it make of it, and is corrected in turn."""
    model, x = twice(), images()
    traced, shown = ekgfx.trace(model, x[:2]), [Inputs.of(x)]
    (name,) = traced.groups
    kept = traced.groups.kept(ekgfx.Plan({name: (0, 2, 3)}))
    known = statistics(traced, kept, shown, noted(traced, shown))
    left, found = torch.tensor([0, 2, 3]), list(known.values())

    def correct(norm: nn.Module, full: Tensor, cut: Tensor, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        dims = [d for d in range(full.ndim) if d != 1]
        ratio = (cut.var(dims, correction=0) + norm.eps) / (full.var(dims, correction=0)[index] + norm.eps)
        off = norm.running_mean[index] - full.mean(dims)[index]
        return cut.mean(dims) + off * ratio.sqrt(), (norm.running_var[index] + norm.eps) * ratio - norm.eps

    def by(norm: nn.Module, value: Tensor, new: tuple[Tensor, Tensor], index: Tensor | slice) -> Tensor:
        return nn.functional.batch_norm(value, *new, norm.weight[index], norm.bias[index], eps=norm.eps)

    with torch.no_grad():
        full, cut = model.a(x), model.a(x)[:, left]
        for norm, conv in ((model.norm, model.b), (model.norm, None), (model.last, None)):
            new = correct(norm, full, cut, left)
            for said, expected in zip(found.pop(0), new, strict=True):
                torch.testing.assert_close(said, expected, rtol=1e-10, atol=1e-12)
            full, cut = norm(full), by(norm, cut, new, left)
            if norm is model.norm:
                full, cut = full.relu(), cut.relu()
            if conv is not None:
                cut = nn.functional.conv2d(cut, conv.weight[left][:, left], conv.bias[left], padding=1)
                full = conv(full)
        full, cut = full.mean((2, 3)), cut.mean((2, 3))
        full, cut = model.head(full), nn.functional.linear(cut, model.head.weight[:, left], model.head.bias)
        new = correct(model.flat, full, cut, slice(None))
        for said, expected in zip(found.pop(0), new, strict=True):
            torch.testing.assert_close(said, expected, rtol=1e-10, atol=1e-12)
        expected = by(model.flat, cut, new, slice(None))
        torch.testing.assert_close(Settled(traced, kept, known)(x), expected, rtol=1e-10, atol=1e-10)
    assert not found


def test_a_norm_without_averages_takes_those_of_all_samples() -> None:
    model, x = twice(averages=False), images()
    traced = ekgfx.trace(model, x[:2])
    shown = [Inputs.of(part) for part in x.split([5, 5, 14])]
    mean, var = list(statistics(traced, {}, shown, noted(traced, shown)).values())[2]
    with torch.no_grad():
        values = model.norm(model.b(model.norm(model.a(x)).relu())).relu()
    torch.testing.assert_close(mean, values.mean((0, 2, 3)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(var, values.var((0, 2, 3), correction=0), rtol=1e-10, atol=1e-12)


def test_the_first_norm_does_not_see_how_images_are_dealt() -> None:
    model, x = twice(), images()
    traced = ekgfx.trace(model, x[:2])
    kept = traced.groups.kept(ekgfx.Plan({next(iter(traced.groups)): (0, 2, 3)}))
    found = []
    for sizes in ([24], [5, 5, 5, 9], [1] * 24):
        shown = [Inputs.of(part) for part in x.split(sizes)]
        found.append(next(iter(statistics(traced, kept, shown, noted(traced, shown), rescale=True).values())))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


def test_nothing_of_the_model_changes() -> None:
    model, x = twice(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traced, shown = ekgfx.trace(model, x[:2]), [Inputs.of(x)]
    statistics(traced, {}, shown, noted(traced, shown))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_statistics_it_is_evaluation() -> None:
    model = twice()
    traced = ekgfx.trace(model, images(2))
    torch.testing.assert_close(Settled(traced, {}, {})(images()), model(images()), rtol=1e-12, atol=1e-12)
