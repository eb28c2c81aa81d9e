"""Experts that are run as products of grouped matrices, and masks that are put together by Python's operators."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from tests.support.zeroed import distance, zeroed


class Experts(nn.Module):
    """Every row goes to one of three experts: 16 → 32 → 16, their matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(4, 16), nn.Linear(16, 3), nn.Linear(16, 2)
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 32)), nn.Parameter(torch.randn(3, 32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scores = self.gate(x)
        chosen, order = scores.argmax(-1).sort()
        ends = torch.histc(chosen.float(), 3, 0, 2).cumsum(0).to(torch.int32)
        y = F.grouped_mm(x[order], self.up, offs=ends).relu()
        y = F.grouped_mm(y, self.down, offs=ends)[order.argsort()]
        masked = (scores[:, :1] > 0) & (scores[:, 1:2] > -1) | (x > 0)
        return self.head(torch.multiply(y, masked) + x)


def test_experts_of_grouped_matrices_share_their_widths() -> None:
    torch.manual_seed(0)
    model = Experts().bfloat16().eval()  # no other type has such a product in a graph
    traced = ekgfx.trace(model, torch.randn(6, 4, dtype=torch.bfloat16))
    assert not traced.unknown_ops
    assert {name: {f"{p.parameter} {p.dim}" for p in group.places} for name, group in traced.groups.items()} == {
        "stem": {"stem.weight 0", "stem.bias 0", "gate.weight 1", "up 1", "down 2", "head.weight 1"},
        "up": {"up 2", "down 1"},
    }
    per_row = 4 * 16 + 16 * 3 + 16 * 32 + 32 * 16 + 16 * 2
    assert traced.cost().macs == per_row
    plan = ekgfx.Plan({"stem": (0, 2, 5, 7, 8, 9, 12, 15), "up": tuple(range(1, 32, 2))})
    pruned = ekgfx.prune(model, plan, traced, graphs="forbid")
    assert tuple(pruned.up.shape) == (3, 8, 16) and tuple(pruned.down.shape) == (3, 16, 8)
    assert distance(pruned, zeroed(traced, plan), (torch.randn(9, 4),)) < 0.03
