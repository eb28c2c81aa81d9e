"""With fewer positions than inputs the refit is the same, in as many dimensions as there are positions."""

import copy
import sys

import pytest
import torch
from torch import nn

import ekgfx
from ekgfx.repair import Repair
from ekgfx.repair.moments import Moments
from ekgfx.repair.walk import Walk


def wide(bias: bool, behind: nn.Module) -> nn.Module:
    """A linear layer of 512 inputs, as a VGG's first, and a grouped convolution of 72 that reads one position."""
    torch.manual_seed(0)
    front = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 24, bias=bias), behind
    grouped = nn.Unflatten(1, (24, 1, 1)), nn.Conv2d(24, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(8, 4)
    return nn.Sequential(*front, *grouped).double().eval()


def repaired(model: nn.Module) -> tuple[nn.Module, Repair]:
    images = torch.randn(60, 3, 4, 4, dtype=torch.float64)
    traced = ekgfx.trace(model, images[:2])
    plan = ekgfx.search(traced, flops=0.5, strategy="uniform", importance="magnitude").plan
    pruned = ekgfx.prune(copy.deepcopy(model), plan, traced, verify=False)
    return pruned, ekgfx.repair(pruned, traced, plan, images, batch_size=7)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("behind", [nn.ReLU, nn.Tanh])
def test_the_refit_is_that_of_all_inputs(bias: bool, behind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int | None]] = []
    empty = Moments.empty

    def watched(shift, outputs, width=None):
        sizes.append((shift.shape[1], width))
        return empty(shift, outputs, width)

    model = wide(bias, behind())
    torch.manual_seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[Walk.__module__], "FEW", 0.0)
        expected, told = repaired(model)
    monkeypatch.setattr(Moments, "empty", staticmethod(watched))
    torch.manual_seed(1)
    pruned, found = repaired(model)
    assert any(width is not None and size == 48 < width for size, width in sizes)  # of 60 images, 12 are held out
    assert [(layer.done, layer.ridge) for layer in found.layers] == [(layer.done, layer.ridge) for layer in told.layers]
    for layer, other in zip(found.layers, told.layers, strict=True):
        assert layer.after == pytest.approx(other.after, rel=1e-6)
    for name, weight in pruned.state_dict().items():
        torch.testing.assert_close(weight, expected.state_dict()[name], rtol=1e-6, atol=1e-8)
