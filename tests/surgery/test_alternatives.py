"""A second way through a module that the model itself does not take follows the cut; so does what keeps a cache."""

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.surgery.check import check_pruned


class Halves(nn.Module):
    """Halves what it is given, or, where an exporter cannot, splits it by the width that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 8
        self.into, self.middle, self.out = nn.Conv2d(6, 16, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(24, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.into(x).chunk(2, 1)
        return self.out(torch.cat((a, b, self.middle(b)), 1))

    def forward_split(self, x: Tensor) -> Tensor:
        a, b = self.into(x).split((self.c, self.c), 1)
        return self.out(torch.cat((a, b, self.middle(b)), 1))

    def forward_plain(self, x: Tensor) -> Tensor:
        """Something else than the forward: no reason to change what it reads."""
        return x * self.c


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.halves, self.head = nn.Conv2d(3, 6, 1), Halves(), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.halves(self.stem(x)))


def test_a_second_forward_splits_by_the_width_that_is_left() -> None:
    torch.manual_seed(0)
    traced = ekgfx.trace(Net().double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64))
    assert sorted(group.size for group in traced.groups.values()) == [6, 6, 8, 8]
    plan = ekgfx.Plan({name: tuple(range(group.size - 3)) for name, group in traced.groups.items()})
    pruned = ekgfx.prune(traced.model, plan, traced, graphs="forbid")
    x = torch.randn(3, 3, 7, 5, dtype=torch.float64)
    assert pruned.halves.c == 5 and traced.model.halves.c == 8
    x = pruned.stem(x)
    assert torch.equal(pruned.halves.forward_split(x), pruned.halves(x))


class Attention(nn.Module):
    """Scales by its width and keeps, in a list, the grid of the last size that it saw: no integer expresses its cut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.shape, self.kept = width, None, [torch.empty(0)]
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.shape != x.shape:
            self.shape, self.kept = x.shape, [torch.arange(x.shape[1], dtype=x.dtype)[:, None]]
        q, k, v = self.qkv(x).split([self.width] * 3, -1)
        return self.proj((q @ k.transpose(-2, -1) * self.width**-0.5).softmax(-1) @ v + 0.1 * self.kept[0])


class Blocks(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Attention, widths))
        self.between = nn.ModuleList(nn.Linear(a, b) for a, b in zip((5, *widths), (*widths, 2), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.between[0](x)
        for block, after in zip(self.blocks, list(self.between)[1:], strict=True):
            x = after(x + block(x))
        return x


@pytest.mark.parametrize("widths", [(8,), (8, 12, 12)])
def test_a_forward_is_written_for_a_module_that_keeps_what_it_computes(widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    traced = ekgfx.trace(Blocks(*widths).double().eval(), torch.randn(2, 4, 5, dtype=torch.float64))
    plan = ekgfx.Plan({name: tuple(range(1, group.size, 2)) for name, group in traced.groups.items()})
    pruned = ekgfx.prune(traced.model, plan, traced, graphs="allow")
    assert [r.module for r in ekgfx.replaced(pruned)] == [f"blocks.{i}" for i in range(len(widths))]
    assert check_pruned(traced, plan, pruned, (torch.randn(3, 4, 5, dtype=torch.float64),)) < 1e-10
