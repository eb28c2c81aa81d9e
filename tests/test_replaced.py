"""A module that cannot express its cut gets another forward; its class, and the model around it, stay."""

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.verify import check_masked, check_pruned, perturb


class Mixer(nn.Module):
    """Reads its output's width off its input: right only while heads·features is the stream's width."""

    def __init__(self, position: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.position = nn.Linear(8, 24), nn.Linear(8, 8), position

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1) + table).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
        return self.proj(mixed) + self.position(x)


class Shares(nn.Module):
    """Two blocks share one position encoding, and are handed a parameter of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(5, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Mixer(self.position), Mixer(self.position)])
        self.table, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x, self.table)
        return self.head(x.mean(1))


@pytest.fixture
def traced() -> ekgfx.TracedModel:
    torch.manual_seed(0)
    model = Shares().double().eval()
    perturb(model)
    return ekgfx.trace(model, torch.randn(2, 4, 5, dtype=torch.float64))


def test_only_what_cannot_express_the_cut_gets_another_forward(traced: ekgfx.TracedModel) -> None:
    stream = next(group for group in traced.groups.values() if group.size == 8)
    plan = ekgfx.Plan({stream.name: (0, 2, 3, 5, 6)})
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    assert check_masked(traced, plan, (x,)) < 1e-12
    with pytest.warns(UserWarning, match="blocks.0"):
        pruned = ekgfx.prune(traced.model, plan, traced)
    assert type(pruned) is Shares and type(pruned.position) is nn.Linear
    assert [replacement.module for replacement in ekgfx.replaced(pruned)] == ["blocks.0", "blocks.1"]
    assert all(isinstance(block, Mixer) for block in pruned.blocks)
    assert check_pruned(traced, plan, pruned, (x,)) < 1e-12
    assert sum(p.numel() for p in pruned.parameters()) == traced.cost(plan).params


def test_what_was_shared_is_shared_still(traced: ekgfx.TracedModel) -> None:
    stream = next(group for group in traced.groups.values() if group.size == 8)
    pruned = ekgfx.prune(traced.model, ekgfx.Plan({stream.name: (0, 2, 3, 5, 6)}), traced).train()
    weights = {id(block.get_parameter("position.weight")) for block in pruned.blocks} | {id(pruned.position.weight)}
    assert len(weights) == 1
    pruned(torch.randn(3, 4, 5, dtype=torch.float64)).sum().backward()
    assert pruned.table.grad is not None and pruned.table.grad.abs().sum() > 0


def test_integers_of_a_shared_layer_are_corrected() -> None:
    """A depthwise convolution that two blocks share goes by its first name, in whichever block it runs."""

    class Block(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shared(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.depthwise = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
            self.blocks = nn.Sequential(Block(self.depthwise), Block(self.depthwise))
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.stem(x)))

    traced = ekgfx.trace(Net(), torch.randn(2, 3, 4, 4))
    pruned = ekgfx.prune(traced.model, ekgfx.Plan({"stem": (1, 4)}), traced)
    assert type(pruned) is Net and pruned.depthwise.groups == 2
    assert pruned.blocks[0].shared is pruned.depthwise
