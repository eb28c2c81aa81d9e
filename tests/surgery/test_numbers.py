"""What a configuration says beside widths: numbers that grow together, and numbers that a run does not show."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.errors import EkgfxWarning

X = torch.randn(3, 6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@dataclass
class Config:
    width: int = 24
    heads: int = 4
    keys: int = 2
    head: int = 5
    inner: int = 24
    features: int = 24
    ratio: int = 3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Grouped(nn.Module):
    """Several query heads for each key, as a kernel finds out by itself; with a mask, keys are repeated by a number."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.head, self.repeats = config, config.head, config.heads // config.keys
        self.q, self.o = nn.Linear(24, config.heads * self.head), nn.Linear(config.heads * self.head, 7)
        self.k, self.v = (nn.Linear(24, config.keys * self.head) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part(x).unflatten(2, (-1, self.head)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (part.repeat_interleave(self.repeats, 1) for part in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.o(y.transpose(1, 2).flatten(2))


def traced_of(kind: type[nn.Module]) -> ekgfx.TracedModel:
    torch.manual_seed(0)
    return ekgfx.trace(kind(Config()).double().eval(), X)


def test_a_number_that_the_example_does_not_need_is_what_the_configuration_makes_of_it() -> None:
    traced = traced_of(Grouped)
    ((name, _),) = [(n, g) for n, g in traced.groups.items() if g.size == 2 and "q" in n and n.endswith("#1")]
    pruned = ekgfx.prune(traced.model, ekgfx.Plan({name: (1,)}), traced, graphs="forbid")
    assert traced.model.repeats == 2 and pruned.repeats == 1
    all_of_it = torch.ones(6, 6, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(pruned(X, all_of_it), pruned(X), rtol=1e-12, atol=1e-12)
        kept = copy.deepcopy(traced.model)
        kept.o.weight.unflatten(1, (2, 2, 5))[:, :, 0] = 0  # the first query head of each key
        torch.testing.assert_close(pruned(X, all_of_it), kept(X, all_of_it), rtol=1e-12, atol=1e-12)


class Scaled(nn.Module):
    """A width of whole heads, whose width is in a scale; a table has an entry for each head, as Swin's biases."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.heads, self.head = config, config.heads, config.width // config.heads
        self.scale, self.bias = self.head**-0.5, nn.Parameter(torch.randn(config.heads, 6, 6))
        self.embed, self.last = nn.Linear(24, config.width), nn.Linear(config.width, 7)
        self.q, self.k, self.v, self.o = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (part(x).unflatten(2, (-1, self.head)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = (q @ k.mT * self.scale + self.bias).softmax(3) @ v
        return self.last(x + self.o(y.transpose(1, 2).flatten(2)))


class Ratio(Scaled):
    """The same without a table, and with a block of some times that width."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bias = None
        wide = config.ratio * config.width
        self.up, self.down = nn.Linear(config.width, wide), nn.Linear(wide, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (part(x).unflatten(2, (-1, self.head)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = (q @ k.mT * self.scale).softmax(3) @ v
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return self.last(x + self.down(self.up(x).relu()))


class Equal(nn.Module):
    """One that refuses two widths which are not the same."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.inner != config.features:
            raise ValueError("inner and features differ")
        self.config = config
        self.up, self.down = nn.Linear(24, config.inner), nn.Linear(config.features, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Aligned(nn.Module):
    """Its kernel takes multiples of 4 alone, as grouped products of half precision do."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.up, self.down = config, nn.Linear(24, config.inner), nn.Linear(config.inner, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if x.shape[-1] % 4:
            raise RuntimeError("strides should be multiples of 4")
        return self.down(x.relu())


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (Scaled, {"width": 12, "heads": 2}),
        (Ratio, {"width": 12, "heads": 2}),
        (Equal, {"inner": 11, "features": 11}),
        (Aligned, {"inner": 8}),
    ],
)
def test_numbers_that_grow_together_describe_the_cut(kind: type[nn.Module], wanted: dict[str, int]) -> None:
    traced = traced_of(kind)
    plan = ekgfx.search(traced, params=0.5, strategy="uniform", importance="magnitude", uniform_layers=True).plan
    pruned = ekgfx.prune(traced.model, plan, traced, graphs="forbid")
    now, before = pruned.config, Config()
    changed = {f.name: getattr(now, f.name) for f in fields(now) if getattr(now, f.name) != getattr(before, f.name)}
    assert changed == wanted
    anew = kind(copy.deepcopy(now)).double().eval()
    anew.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(anew(X), pruned.eval()(X), rtol=0, atol=0)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 12
        self.mix, self.out = nn.Linear(8, 12), nn.Linear(24, 12)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return self.out(torch.cat([self.mix(x), state], 1))


class Recurrent(nn.Module):
    """Reads a number of a part, as torchvision's RAFT does, and nothing but an error tells that it is too large."""

    def __init__(self) -> None:
        super().__init__()
        self.context, self.cell, self.head = nn.Linear(5, 20), Cell(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context(x)
        rest = context.shape[1] - self.cell.width
        if rest <= 0:
            raise ValueError("no context is left")
        state, context = context.split([self.cell.width, rest], 1)
        for _ in range(2):
            state = self.cell(context.relu(), state.tanh())
        return self.head(state)


def test_a_number_that_only_the_module_around_reads_is_corrected() -> None:
    torch.manual_seed(0)
    model, x = Recurrent().double().eval(), torch.randn(4, 5, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    plan = ekgfx.Plan({name: tuple(range(group.size // 2)) for name, group in traced.groups.items()})
    pruned = ekgfx.prune(model, plan, traced, graphs="forbid")
    assert pruned.cell.width == 6 and model.cell.width == 12
    torch.testing.assert_close(pruned(x), traced.subnetwork(plan)(x), rtol=0, atol=1e-12)


class Elsewhere(nn.Module):
    """Makes a number of a width that is in no tensor's shape."""

    def __init__(self, ending: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.inside, self.out, self.ending = nn.Linear(5, 8), nn.Linear(8, 3), ending

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        return self.ending(self.out(y), y.shape[1])


ENDINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "a tensor of it": lambda y, width: y / torch.sqrt(torch.tensor(width)),
    "a shift": lambda y, width: torch.roll(y, width // 4, 0),
    "a name": lambda y, width: F.gelu(y, approximate="tanh" if width >= 8 else "none"),
    "a diagonal": lambda y, width: torch.tril(y, width // 4 - 1),
    "a list": lambda y, width: torch.flip(y, [width // 8]),
    "a row": lambda y, width: y * torch.linspace(0, width, 3, dtype=y.dtype),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_forward_whose_numbers_follow_a_width_that_no_shape_shows_is_replaced(ending: str) -> None:
    torch.manual_seed(0)
    model, x = Elsewhere(ENDINGS[ending]).double().eval(), torch.randn(4, 5, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    plan = ekgfx.Plan({"inside": (0, 2, 3, 7)})
    with pytest.warns(EkgfxWarning, match="differs from the sliced graph's by|before the cut it was"):
        pruned = ekgfx.prune(model, plan, traced)
    assert [each.kind for each in ekgfx.replaced(pruned)] == ["Elsewhere"]
    with torch.no_grad():  # the original, with zeros for what is cut
        for weight in (model.inside.weight, model.inside.bias):
            weight[[1, 4, 5, 6]] = 0
    torch.testing.assert_close(pruned(x), model(x), rtol=0, atol=1e-12)


class Correlation(nn.Module):
    """A scale by the width that no operator's shape shows, in a forward that runs in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x @ torch.eye(5))
        return self.out(y / torch.sqrt(torch.tensor(float(y.shape[1]))))


def test_a_forward_that_runs_in_float32_alone_is_compared_there() -> None:
    torch.manual_seed(0)
    model, x = Correlation().eval(), torch.randn(4, 5)
    with pytest.raises(RuntimeError, match="dtype"):
        copy.deepcopy(model).double()(x.double())
    traced = ekgfx.trace(model, x)
    plan = ekgfx.Plan({name: tuple(range(group.size // 2)) for name, group in traced.groups.items()})
    pruned = ekgfx.prune(model, plan, traced)
    assert [each.kind for each in ekgfx.replaced(pruned)] == ["Correlation"]
    torch.testing.assert_close(pruned(x), traced.subnetwork(plan)(x), rtol=0, atol=1e-6)
