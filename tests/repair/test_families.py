"""Real architectures: no operator's error rises, class and shapes stay, and what is said is what the module does."""

import contextlib

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

import ekgfx
from benchmarks.common import listed
from ekgfx.data.batches import Inputs
from ekgfx.repair import Repair
from ekgfx.repair.judge import Judge
from ekgfx.surgery.check import perturb

FEW = ["test_resnet", "test_vit", "test_convnext", "test_mambaout", "test_efficientnet"]
"""Small networks that timm carries for tests: residual sums, attention, depthwise convolutions, gates."""


def repaired(name: str, count: int = 10) -> tuple[nn.Module, nn.Module, Repair]:
    """A network with random weights, cut to 60%, and repaired on random images, in double precision."""
    torch.manual_seed(0)
    config = timm.get_pretrained_cfg(name)
    model = timm.create_model(name).double().eval()
    perturb(model)
    given = [] if config is None else [config.input_size]
    small = [] if config is not None and config.fixed_input_size else [(3, 64, 64), (3, 128, 128)]
    images = taken(model, [*small, *given], count)
    traced = ekgfx.trace(model, images[:2])
    if not traced.groups:
        pytest.skip("nothing to cut")
    plan = ekgfx.search(traced, flops=0.6, strategy="uniform", importance="magnitude").plan
    pruned = ekgfx.prune(model, plan, traced)  # without a verification no forward is replaced, and some need that
    shapes = {key: tensor.shape for key, tensor in pruned.state_dict().items()}
    found = ekgfx.repair(pruned, traced, plan, images, positions=500, batch_size=5)
    assert type(pruned) is type(model)
    assert {key: tensor.shape for key, tensor in pruned.state_dict().items()} == shapes
    again = Judge(traced.subnetwork(), [Inputs.of(images[4::5])])(pruned)
    assert not found.after.better(again)
    if not found.batch_norm:  # else it is told with statistics of the fitted images, and delivered with those of all
        assert not again.better(found.after)
    return model, pruned, found


def taken(model: nn.Module, sizes: list[tuple[int, int, int]], count: int) -> Tensor:
    """Random images of the first size that a model takes: an Inception none of 64 pixels, a HaloNet none of 128."""
    for size in sizes:
        with contextlib.suppress(RuntimeError, AssertionError), torch.no_grad():
            model(torch.randn(1, *size, dtype=torch.float64))
            return torch.randn(count, *size, dtype=torch.float64)
    raise AssertionError(f"{type(model).__name__} takes no images of {sizes}")


@pytest.mark.parametrize("name", FEW)
def test_no_error_rises(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    check(repaired(name)[2])


@pytest.mark.sweep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", listed())
def test_no_error_rises_in_any_family(name: str) -> None:
    check(repaired(name)[2])


def check(found: Repair) -> None:
    assert found.layers
    assert all(layer.after <= layer.before * (1 + 1e-9) for layer in found.layers)
    assert not found.before.better(found.after)


@pytest.mark.parametrize("act", [nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU], ids=lambda act: act.__name__)
def test_inverted_residuals_gain_with_every_activation(act: type[nn.Module]) -> None:
    """Half of what is lost comes back, on images that were not fitted."""
    torch.manual_seed(0)
    blocks = [InvertedResidual(8, 8, exp_ratio=4.0, act_layer=act) for _ in range(2)]
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), act(), *blocks, *ends).double().eval()
    perturb(model)
    images = nn.functional.interpolate(torch.randn(240, 3, 4, 4, dtype=torch.float64), scale_factor=3, mode="bilinear")
    traced = ekgfx.trace(model, images[:2])
    plan = ekgfx.search(traced, flops=0.6, strategy="uniform", importance="magnitude").plan
    pruned = ekgfx.prune(model, plan, traced, verify=False)
    found, unseen = ekgfx.repair(pruned, traced, plan, images[:200]), images[200:]
    check(found)
    assert found.before.error is not None and found.after.error is not None
    assert found.after.error < found.before.error / 2
    cut = ekgfx.prune(model, plan, traced, verify=False)
    with torch.no_grad():
        lost, left = ((network(unseen) - model(unseen)).square().mean() for network in (cut, pruned))
    assert left < lost / 2
