"""Batch norm on tensors whose channels come last is PyTorch's, and gradients too."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from ekgfx.execution import channels_last
from ekgfx.execution.batch_norms import BatchNorms
from ekgfx.execution.channels_last import WIDTH, batch_norm, batch_norm_in_training, wide

SHAPES = [(3, 5, 7, 2), (4, 16, 8, 8), (2, 3, 1, 1), (1, WIDTH + 1, 2, 3), (2, 1, 4, 4)]


def image(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Channels last, with means and deviations of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * torch.rand(shape[1], 1, 1, generator=generator).double() + 10 * torch.rand(shape[1], 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("part", [1, 1500, channels_last.PART])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_pytorchs_batch_norm(shape: tuple[int, ...], affine: bool, part: int, monkeypatch) -> None:
    monkeypatch.setattr(channels_last, "PART", part)  # a row, a few of them with a rest, all
    torch.manual_seed(0)
    x, towards = image(shape), image(shape, 1)
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64) if affine else (None, None)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    ours = batch_norm(x, weight, bias, 1e-3)
    theirs = F.batch_norm(x, None, None, weight, bias, True, eps=1e-3)
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    found, expected = (torch.autograd.grad((y * towards).sum(), leaves) for y in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        plain = batch_norm(x, weight, bias, 1e-3)
        over = x.detach().clone(memory_format=torch.preserve_format)
        written = batch_norm(over, weight, bias, 1e-3, overwrite=True)
    assert plain is not None and torch.equal(plain, ours)  # the same numbers with gradients and without, and in place
    assert written is over and torch.equal(over, ours)


def test_rows_are_neighbouring_pixels() -> None:
    """By hand: 6 pixels of 2 channels; 2 divides 6, 4 does not."""
    x = torch.arange(12.0).view(1, 3, 2, 2).permute(0, 3, 1, 2)
    rows = wide(x)
    assert rows is not None and rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert rows.data_ptr() == x.data_ptr()


def test_other_tensors_are_pytorchs() -> None:
    torch.manual_seed(0)
    for x in (torch.randn(4, 8, 3, 3), torch.randn(4, 8), image(SHAPES[1]).half(), image((0, 8, 3, 3))):
        assert batch_norm(x, None, None, 1e-5) is None
    assert batch_norm(image(SHAPES[1]), torch.ones(16), None, 1e-5) is None  # weights of another type
    assert batch_norm(image((1, 4, 1, 1)), None, None, 1e-5) is None  # one value has no variance: PyTorch says so


@pytest.mark.parametrize("make", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_module_in_training_is_pytorchs_with_its_averages(make: type[nn.Module], momentum: float | None) -> None:
    ours, theirs = (make(16, momentum=momentum).double().train() for _ in range(2))
    for seed in range(3):
        x = image((4, 16, 8, 8), seed)
        with BatchNorms(batch_norm_in_training):
            found = ours(x)
        torch.testing.assert_close(found, theirs(x), rtol=1e-10, atol=1e-10)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-10, atol=1e-10)
    with BatchNorms(batch_norm_in_training):
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-10, atol=1e-10)


def test_sums_over_many_pixels_are_exact() -> None:
    """262,144 pixels in float32, against float64. PyTorch 2.14 adds one after the other, and is off by 7e-5."""
    x = torch.randn(256, 16, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.1
    exact, ours = (nn.BatchNorm2d(16, momentum=1.0).train() for _ in range(2))
    exact.double()(x.double())
    with BatchNorms(batch_norm_in_training):
        ours(x.contiguous(memory_format=torch.channels_last))
    assert (ours.running_var - exact.running_var).norm() < 2e-6 * exact.running_var.norm()
