"""Real architectures: exact cuts of the networks that the README names, and one network per mechanism."""

import copy

import pytest
import timm
import torch

import ekgfx
from ekgfx.surgery.check import check_pruned, perturb
from ekgfx.surgery.masked import check_masked
from tests.support.costs import counted_macs, said_macs
from tests.support.plans import random_plan

NAMED = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "densenet121",
    "regnety_002",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "ekgfx.models:resnet20_cifar",
    "ekgfx.models:resnet56_cifar",
]


# A stage of six like blocks proves no more than one of two.
SHALLOW = {"swin_tiny_patch4_window7_224": {"depths": (2, 2, 2, 2)}, "test_vit_relpos": {"depth": 2}}


def build(name: str) -> tuple[torch.nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if ":" in name:
        factory = name.partition(":")[2]
        return getattr(ekgfx.models, factory)(), (3, 32, 32)
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    options = SHALLOW.get(name, {}) | ({"img_size": 64} if fixed else {})
    return timm.create_model(name, **options), (3, 64, 64)


@pytest.mark.parametrize("name", NAMED)
def test_random_plans_are_exact(name: str) -> None:
    model, shape = build(name)
    model.double().eval()
    perturb(model)
    x = torch.randn(2, *shape, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    assert not traced.unknown_ops
    plan = random_plan(traced, 0)
    assert check_masked(traced, plan, (x,)) < 1e-10
    pruned = ekgfx.prune(model, plan, traced)  # traces the result again: shapes, MACs and parameters as predicted
    assert type(pruned) is type(model)
    assert all(type(a) is type(b) for a, b in zip(pruned.modules(), model.modules(), strict=True))
    fresh = torch.randn(3, *shape, dtype=torch.float64)
    assert check_pruned(traced, plan, pruned, (fresh,)) < 1e-10
    assert said_macs(traced, ekgfx.Plan(), 2) == counted_macs(model, (x,))
    assert said_macs(traced, plan, 2) == counted_macs(pruned, (x,))
    assert sum(p.numel() for p in pruned.parameters()) == traced.cost(plan).params

    pruned.train()
    optimizer = torch.optim.SGD(pruned.parameters(), 1e-3)
    pruned(torch.randn(4, *shape, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    twin = copy.deepcopy(pruned).eval()
    twin.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin(x), pruned.eval()(x), rtol=0, atol=0)


@pytest.mark.sweep
@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_macs_are_those_that_pytorch_counts(name: str) -> None:
    """One small model of each of timm's own for tests; cut to half of every group as well."""
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, *timm.get_pretrained_cfg(name).input_size[1:])
    traced = ekgfx.trace(model, x)
    assert said_macs(traced, ekgfx.Plan(), 2) == counted_macs(model, (x,))
    plan = ekgfx.Plan({n: range(max(1, group.size // 2)) for n, group in traced.groups.items()})
    pruned = ekgfx.prune(model, plan, traced)
    assert said_macs(traced, plan, 2) == counted_macs(pruned, (x,))


def test_an_attention_that_assumes_the_streams_width_gets_another_forward() -> None:
    """test_vit_relpos reshapes its attention to the width of the stream: Python cannot express other widths."""
    if not timm.is_model("test_vit_relpos"):
        pytest.skip(f"timm {timm.__version__} has no test_vit_relpos")
    model, shape = build("test_vit_relpos")
    model.eval()
    traced = ekgfx.trace(model, torch.randn(1, *shape))
    heads = {n: tuple(range(max(1, g.size - 1))) for n, g in traced.groups.items() if n.endswith("attn.qkv")}
    assert heads
    pruned = ekgfx.prune(model, ekgfx.Plan(heads), traced)
    assert type(pruned) is type(model)
    assert [each.module for each in ekgfx.replaced(pruned)] == [f"blocks.{i}.attn" for i in range(len(pruned.blocks))]
    assert {k.split(".")[0] for k in pruned.state_dict()} == {k.split(".")[0] for k in model.state_dict()}
    for batch in (1, 5):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(pruned.eval()(x), traced.subnetwork(ekgfx.Plan(heads))(x), rtol=1e-4, atol=1e-4)
    pruned.train()(torch.randn(2, *shape)).sum().backward()
    assert pruned.blocks[0].attn.get_parameter("qkv.weight").grad is not None
