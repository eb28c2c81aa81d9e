"""A table in a plain attribute is cut as a buffer is, unless a forward makes it anew."""

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.surgery.check import perturb
from ekgfx.surgery.masked import check_masked


def positions(length: int, width: int) -> Tensor:
    return torch.sin(torch.arange(length)[:, None] * torch.arange(width)[None] / 7.0).double()


class Stream(nn.Module):
    """Positions are added to a stream of 8; subclasses say where they come from."""

    fixed = False

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = (nn.Linear(*sizes) for sizes in ((5, 8), (8, 12), (12, 8), (8, 3)))
        self.hold(positions(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.table(x).type_as(x).detach().clone()
        x = x + self.down(self.up(x).relu())
        return self.head(x.view(-1, 6, 8) if self.fixed else x)


class Buffer(Stream):
    def hold(self, table: Tensor) -> None:
        self.register_buffer("places", table)

    def table(self, x: Tensor) -> Tensor:
        return self.places


class Plain(Buffer):
    def hold(self, table: Tensor) -> None:
        self.places = table


class PlainInGraph(Plain):
    """A forward that only a graph can express."""

    fixed = True


class Cache(Plain):
    """Made anew for another length, in a branch that the example does not take."""

    def table(self, x: Tensor) -> Tensor:
        if len(self.places) != x.shape[1]:
            self.renew(x.shape[1])
        return self.places

    def renew(self, length: int) -> None:
        self.places = positions(length, self.stem.out_features)


def built(kind: type[Stream]) -> tuple[Stream, Tensor]:
    torch.manual_seed(0)
    model = kind().double().eval()
    perturb(model)
    return model, torch.randn(3, 6, 5).double()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [Buffer, Plain, PlainInGraph])
def test_a_table_is_cut(kind: type[Stream], inplace: bool) -> None:
    model, x = built(kind)
    traced = ekgfx.trace(model, x[:2])
    assert {name: group.size for name, group in traced.groups.items()} == {"stem": 8, "up": 12}
    plan = ekgfx.Plan({"stem": (0, 3, 5), "up": (1, 2, 8, 11)})
    assert check_masked(traced, plan, (x,)) < 1e-12
    expected = traced.subnetwork(plan)(x).detach()
    places = model.places
    pruned = ekgfx.prune(model, plan, traced, inplace=inplace)
    assert torch.allclose(pruned(x), expected, rtol=0, atol=1e-12)
    assert inplace or (model.places is places and places.shape == (6, 8))
    if not kind.fixed:
        assert type(pruned) is kind and pruned.places.shape == (6, 3)
        assert [*pruned.state_dict()] == [*model.state_dict()]
    pruned(x).sum().backward()


def test_a_cache_is_not() -> None:
    model, x = built(Cache)
    traced = ekgfx.trace(model, x)
    assert list(traced.groups) == ["up"]
    assert "constant c_places" in {place.reason for place in traced.groups.frozen}
    pruned = ekgfx.prune(model, ekgfx.Plan({"up": (1, 5)}), traced)
    assert pruned(torch.randn(2, 9, 5).double()).shape == (2, 9, 3)
