"""Widths that one number stands for: what of a module's Python, and of a configuration, shrinks together."""

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.errors import BudgetError, EkgfxWarning
from ekgfx.surgery.tied import ties_of

TOKENS = torch.randint(13, (4, 6), generator=torch.Generator().manual_seed(0))


@dataclass
class Config:
    """As libraries have them. `sides`: a list, and numbers within a configuration that this one holds."""

    width: int = 24
    heads: int = 4
    hidden: int = 20
    depth: int = 2
    sides: list[int] = field(default_factory=lambda: [10, 14])
    inner: "Config | None" = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Layer(nn.Module):
    """Attention that shapes queries, keys and values by one head width, and whose products have a scale of it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.heads, self.head_width = config.heads, width // config.heads
        self.scale = self.head_width**-0.5
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, config.hidden),
            nn.Linear(config.hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_width)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = (q @ k.transpose(2, 3) * self.scale).softmax(-1) @ v
        x = self.norm(x + self.o(y.transpose(1, 2).flatten(2)))
        return x + self.down(F.gelu(self.up(x)))


class Network(nn.Module):
    """Layers and a head with widths of its own, one of them in a configuration inside."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        inner, (first, second) = config.inner or Config(), config.sides
        self.embed = nn.Embedding(13, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Sequential(nn.Linear(config.width, first), nn.GELU(), nn.Linear(first, second))
        self.last = nn.Sequential(nn.Linear(second, inner.hidden), nn.GELU(), nn.Linear(inner.hidden, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.last(self.head(x.mean(1)).relu())


class Bare(Network):
    """The same without a configuration that builds it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        del self.config


def traced_of(model: nn.Module) -> ekgfx.TracedModel:
    return ekgfx.trace(model.eval(), TOKENS)


def network(kind: type[Network] = Network, **options: Any) -> Network:
    torch.manual_seed(0)
    return kind(Config(**options, inner=Config(hidden=16))).double()


def members(traced: ekgfx.TracedModel, uniform: bool) -> list[set[str]]:
    return [set(tie.members) for tie in ties_of(traced, uniform).ties]


def test_a_modules_one_head_width_ties_what_it_shapes() -> None:
    ties = ties_of(traced_of(network()))
    assert [dict(tie.members) for tie in ties.ties] == [{f"layers.{i}.q#1": 1, f"layers.{i}.v": 1} for i in (0, 1)]
    assert not ties.held and "layers.0 shapes them by one number, 6" in ties.ties[0].why


def test_two_numbers_of_equal_value_are_two_widths() -> None:
    class Two(Layer):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.value_width = self.head_width

        def forward(self, x: Tensor) -> Tensor:
            q, k = (part(x).view(*x.shape[:-1], -1, self.head_width).transpose(1, 2) for part in (self.q, self.k))
            y = (q @ k.transpose(2, 3)).softmax(-1) @ self.v(x).view(*x.shape[:-1], -1, self.value_width).transpose(
                1, 2
            )
            return x + self.o(y.transpose(1, 2).flatten(2))

    class Net(Bare):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.layers = nn.ModuleList([Two(config)])

    assert not ties_of(traced_of(network(Net))).ties


def test_a_configuration_ties_all_layers_and_whole_heads_to_the_width() -> None:
    ties = ties_of(traced_of(network()), uniform_layers=True)
    assert [dict(tie.members) for tie in ties.ties] == [
        {"embed": 6, "layers.0.q#0": 1, "layers.1.q#0": 1},  # 24 channels are 4 heads of 6
        {"layers.0.up": 1, "layers.1.up": 1},
    ]
    assert set(ties.held) == {"layers.0.q#1", "layers.0.v", "layers.1.q#1", "layers.1.v"}  # it is in the scale


def test_without_a_configuration_repeated_layers_share_their_widths() -> None:
    assert members(traced_of(network(Bare)), True) == [
        {"layers.0.q#0", "layers.1.q#0"},
        {"layers.0.q#1", "layers.0.v", "layers.1.q#1", "layers.1.v"},
        {"layers.0.up", "layers.1.up"},
    ]


@pytest.mark.parametrize("strategy", ["ekg", "uniform", "global"])
@pytest.mark.parametrize("uniform", [False, True])
def test_every_search_keeps_to_the_ties(strategy: Any, uniform: bool) -> None:
    traced = traced_of(network())
    importance = "taylor" if strategy == "ekg" else "magnitude"
    result = ekgfx.search(
        traced, [TOKENS], flops=0.6, strategy=strategy, importance=importance, step=0.5, uniform_layers=uniform
    )
    widths = traced.groups.widths(result.plan)
    ties = ties_of(traced, uniform)
    for tie in ties.ties:
        assert len({widths[name] / step for name, step in tie.members.items()}) == 1, (widths, tie)
    assert all(widths[name] == traced.groups[name].size for name in ties.held)
    assert result.kept_fraction <= 0.6
    pruned = ekgfx.prune(traced.model, result.plan, traced, graphs="forbid")
    assert not ekgfx.replaced(pruned)


def test_a_search_with_ties_goes_on_to_the_same_end() -> None:
    traced = traced_of(network())
    whole = ekgfx.search(traced, [TOKENS], flops=0.5, step=0.5, uniform_layers=True)
    assert len(whole.steps) > 2
    for done in (1, len(whole.steps) - 1):
        history = [step.to_json() for step in whole.steps[:done]]
        again = ekgfx.search(traced, [TOKENS], flops=0.5, step=0.5, uniform_layers=True, resume_from=history)
        assert again.plan.kept == whole.plan.kept


def test_a_tied_group_that_is_ignored_keeps_the_others_whole() -> None:
    traced = traced_of(network())
    result = ekgfx.search(
        traced, flops=0.8, strategy="uniform", importance="magnitude", uniform_layers=True, ignore="=layers.1.up"
    )
    widths = traced.groups.widths(result.plan)
    assert widths["layers.0.up"] == widths["layers.1.up"] == 20 and widths["embed"] < 24


@pytest.mark.parametrize("inplace", [False, True])
def test_the_configuration_builds_the_pruned_network(inplace: bool) -> None:
    model, other = network(), network()
    other.config = model.config  # as two models of a library may share one
    traced = traced_of(model)
    kept = {
        "embed": tuple(range(6, 24)),
        **{f"layers.{i}.q#0": heads for i, heads in ((0, (0, 1, 3)), (1, (1, 2, 3)))},
        **{f"layers.{i}.up": tuple(range(i, 20, 2)) for i in (0, 1)},
        "head.0": (0, 4, 7),
        "head.2": (1, 2, 3, 5, 8),
        "last.0": (3, 9),
    }
    pruned = ekgfx.prune(model, kept, traced, inplace=inplace, graphs="forbid")
    wanted = Config(18, 3, 10, 2, [3, 5], Config(hidden=2))
    assert pruned.config == wanted
    assert other.config == Config(inner=Config(hidden=16))
    anew = Network(copy.deepcopy(pruned.config)).double().eval()
    anew.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(anew(TOKENS), pruned.eval()(TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        ({"layers.0.up": range(9)}, "layers.0.up keeps 9 channels and layers.1.up 20"),
        ({f"layers.{i}.{n}": range(5) for i in (0, 1) for n in ("q#1", "v")}, "layers.0.q#1 would have to stay whole"),
        ({"embed": range(12)}, "embed keeps 12 channels and layers.0.q#0 4"),
    ],
)
def test_a_cut_that_no_configuration_describes_is_told_of(kept: dict[str, Any], why: str) -> None:
    model = network()
    traced = traced_of(model)
    with pytest.warns(
        EkgfxWarning, match=f"no configuration of Network describes this cut: {why}.*uniform_layers=True"
    ):
        pruned = ekgfx.prune(model, kept, traced)
    assert pruned.config == model.config


def test_a_configuration_that_computes_something_else_is_not_taken() -> None:
    """A scale that the forward takes from the configuration: no attribute shows it, the outputs do."""

    class Scaled(Network):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) * self.config.hidden

    model = network(Scaled)
    traced = traced_of(model)
    assert "a Scaled that is built so computes something else" in ties_of(traced, True).held["layers.0.up"]
    plan = {f"layers.{i}.up": tuple(range(10)) for i in (0, 1)}
    with pytest.warns(EkgfxWarning, match="a Scaled that is built so computes something else"):
        pruned = ekgfx.prune(model, plan, traced)
    assert pruned.config.hidden == 20


def test_numbers_that_a_configuration_refuses() -> None:
    class Strict(Config):
        def validate(self) -> None:
            if self.hidden % 5:
                raise ValueError("hidden must be a multiple of 5")

    torch.manual_seed(0)
    traced = traced_of(Network(Strict(inner=Config(hidden=16))).double())
    tie = next(tie for tie in ties_of(traced, True).ties if "layers.0.up" in tie.members)
    assert dict(tie.members) == {"layers.0.up": 5, "layers.1.up": 5}
    with pytest.raises(BudgetError, match="least width"):
        ekgfx.search(traced, flops=0.01, strategy="uniform", importance="magnitude", uniform_layers=True)


def test_aligned_ties() -> None:
    traced = traced_of(network())
    result = ekgfx.search(traced, flops=0.6, strategy="uniform", importance="magnitude", uniform_layers=True, align=4)
    widths = traced.groups.widths(result.plan)
    assert widths["embed"] in (12, 24) and widths["layers.0.up"] % 4 == 0  # heads of 6 channels: two at once


def test_what_stays_whole_is_told(caplog: pytest.LogCaptureFixture) -> None:
    traced = traced_of(network())
    with caplog.at_level("INFO", "ekgfx"):
        ekgfx.search(traced, flops=0.8, strategy="uniform", importance="magnitude", uniform_layers=True)
    assert "layers.0.q#1 (config.width does not say how it is made up)" in caplog.text


def test_a_configuration_that_says_no_width_is_named_as_the_reason() -> None:
    class Unsaid(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.config, self.out = config, nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, config.width))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x)

    traced = ekgfx.trace(Unsaid(Config()).eval(), torch.randn(2, 4))
    said = r"no width can shrink with uniform_layers: out.0 \(config: no number says the width.*; search without it"
    with pytest.raises(BudgetError, match=said):
        ekgfx.search(traced, flops=0.8, strategy="uniform", importance="magnitude", uniform_layers=True)


def test_a_weight_with_two_names_shrinks_with_its_number() -> None:
    class Tied(Network):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            del self.head, self.last
            self.out = nn.Linear(config.width, 13, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.layers[0](self.embed(tokens)))

    model = network(Tied, depth=1)
    traced = traced_of(model)
    assert "embed" not in ties_of(traced, True).held
    result = ekgfx.search(traced, flops=0.7, strategy="uniform", importance="magnitude", uniform_layers=True)
    pruned = ekgfx.prune(model, result, traced)
    assert pruned.config.width == pruned.embed.weight.shape[1] < 24 and pruned.out.weight is pruned.embed.weight


def test_it_is_told_where_no_configuration_says_the_widths(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    traced = ekgfx.trace(model, torch.randn(2, 4))
    with caplog.at_level("INFO", logger="ekgfx"):
        ekgfx.search(traced, flops=0.6, strategy="uniform", importance="magnitude", uniform_layers=True)
    assert "no configuration builds Sequential; repeated layers share their widths" in caplog.text


class Positions(Network):
    """A table of positions that is in the state, and that the library does not save but computes anew."""

    _keys_to_ignore_on_save = ["table"]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.arange(20.0)[:, None].div(config.width).expand(20, config.width).sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.table[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.last(self.head(x.mean(1)).relu())


def test_a_width_of_what_is_computed_anew_and_not_saved_stays() -> None:
    ties = ties_of(traced_of(network(Positions)), uniform_layers=True)
    assert ties.held["embed"] == "table is not saved"
    assert {"layers.0.up", "layers.1.up"} in [set(tie.members) for tie in ties.ties]


class Scaled(Layer):
    """Divides by the root of its head width as it runs; on small weights that is next to nothing. Heads have biases."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        del self.scale
        self.bias = nn.Parameter(torch.randn(config.heads, 1, 1))
        self.q.weight.data.mul_(1e-4)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_width)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = (q @ k.transpose(2, 3) / math.sqrt(self.head_width) + self.bias).softmax(-1) @ v
        x = self.norm(x + self.o(y.transpose(1, 2).flatten(2)))
        return x + self.down(F.gelu(self.up(x)))


def test_a_scale_that_the_forward_computes_keeps_the_head_width() -> None:
    class Net(Network):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.layers = nn.ModuleList(Scaled(config) for _ in range(config.depth))

    traced = traced_of(network(Net))
    result = ekgfx.search(traced, flops=0.9, strategy="uniform", importance="magnitude", uniform_layers=True)
    pruned: Any = ekgfx.prune(traced.model, result.plan, traced, graphs="forbid")
    assert pruned.layers[0].head_width == 6 and pruned.config.width == 24
    anew = Net(copy.deepcopy(pruned.config)).double().eval()
    anew.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(anew(TOKENS), pruned.eval()(TOKENS), rtol=0, atol=1e-14)
