"""The distillation: block by block, stopped by held-out images, and left out where it gains nothing."""

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.data.batches import Inputs
from ekgfx.repair.blocks import block_ends
from ekgfx.repair.judge import Judge
from ekgfx.repair.rearranged import weight_nodes


class Residual(nn.Module):
    """Two residual blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.a, self.b = (nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 12, 1)) for _ in "ab")
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.a(x)).relu()
        x = x + self.b(x)
        return self.head(x.mean((2, 3)))


def subject(count: int = 60) -> tuple[nn.Module, Tensor, ekgfx.TracedModel, ekgfx.Plan, nn.Module]:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(count, 3, 8, 8)
    traced = ekgfx.trace(model, x[:2])
    plan = ekgfx.search(traced, flops=0.5, strategy="uniform", importance="magnitude").plan
    return model, x, traced, plan, ekgfx.prune(model, plan, traced).eval()


def test_a_block_ends_with_a_sum_and_the_activation_behind_it() -> None:
    _, _, traced, _, _ = subject(2)
    ends = block_ends(traced, set(weight_nodes(traced)))
    assert [str(end.target) for end in ends] == ["aten.relu.default", "aten.add.Tensor"]


def test_each_block_comes_nearer_on_images_that_were_not_trained_on() -> None:
    model, x, traced, plan, pruned = subject()
    refitted, statistics = copy.deepcopy(pruned), {k: v.clone() for k, v in pruned.named_buffers()}
    plain = ekgfx.repair(refitted, traced, plan, x)
    told = []
    found = ekgfx.repair(pruned, traced, plan, x, epochs=10, on_block=told.append)
    assert list(found.blocks) == told and len(told) == 3
    assert all(block.after <= block.before for block in told) and any(block.epoch for block in told)
    assert found.layers and found.before == plain.before and found.after.better(plain.after)
    assert Judge(model, [Inputs.of(x[4::5])])(pruned).error == pytest.approx(found.after.error, rel=1e-4)
    assert {name: t.shape for name, t in pruned.named_buffers()} == {name: t.shape for name, t in statistics.items()}
    assert not any(p.grad is not None for p in pruned.parameters()) and all(
        p.requires_grad for p in pruned.parameters()
    )


def test_it_is_deterministic_and_needs_no_gradients_of_the_caller() -> None:
    _, x, traced, plan, pruned = subject()
    twin = copy.deepcopy(pruned)
    ekgfx.repair(pruned, traced, plan, x, epochs=2)
    with torch.no_grad():
        ekgfx.repair(twin, traced, plan, x, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(pruned.state_dict().values(), twin.state_dict().values(), strict=True))


def test_what_gains_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps that are far too large no epoch is better than none: the network is the refitted one."""
    monkeypatch.setattr(sys.modules["ekgfx.repair.blocks"], "RATE", 100.0)
    _, x, traced, plan, pruned = subject()
    refitted = copy.deepcopy(pruned)
    ekgfx.repair(refitted, traced, plan, x)
    found = ekgfx.repair(pruned, traced, plan, x, epochs=2)
    assert not found.blocks and "the distillation gained nothing" in str(found)
    pairs = zip(refitted.state_dict().values(), pruned.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
