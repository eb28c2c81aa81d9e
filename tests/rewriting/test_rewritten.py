"""What a forward that is written anew must hold to: sizes and numbers that follow the cut, batches, training."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.errors import EkgfxWarning
from ekgfx.rewriting.sized import sized
from ekgfx.surgery.check import check_pruned, perturb
from tests.support.zeroed import distance, zeroed


class Twice(nn.Module):
    """One module that cannot express its cut runs at two resolutions."""

    class Neck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).view(x.shape) / x.shape[1] ** 0.5

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.neck, self.head = nn.Conv2d(3, 6, 1), self.Neck(), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.neck(x)) + self.head(F.interpolate(self.neck(F.avg_pool2d(x, 2)), scale_factor=2.0))


def test_a_module_that_is_called_at_two_sizes_has_one_forward() -> None:
    traced = ekgfx.trace(Twice().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    plan = ekgfx.Plan({n: tuple(range(g.size - 1 - i)) for i, (n, g) in enumerate(traced.groups.items())})
    pruned = ekgfx.prune(traced.model, plan, traced, graphs="allow")
    assert [replacement.module for replacement in ekgfx.replaced(pruned)] == ["neck"]
    assert distance(pruned, zeroed(traced, plan), (torch.randn(3, 3, 12, 12, dtype=torch.float64),)) < 1e-10


class Branches(nn.Module):
    """Takes the channels apart between numbers, and each part its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 14, 1), nn.Conv2d(4, 2, 1)
        self.near, self.far = nn.Conv2d(5, 4, 1), nn.Conv2d(9, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(self.near(y[:, :5]) + self.far(y[:, 5:])).mean((2, 3))


def test_slices_between_numbers_are_written_with_the_widths_that_are_left() -> None:
    torch.manual_seed(0)
    model = Branches().double().eval()
    traced = ekgfx.trace(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert {name: group.size for name, group in traced.groups.items()} == {"stem#0": 5, "stem#1": 9, "near": 4}
    plan = ekgfx.Plan({"stem#0": (1, 4), "stem#1": (0, 2, 3, 8), "near": (0, 3)})
    pruned = ekgfx.prune(model, plan, traced, graphs="allow")
    assert [r.sizes for r in ekgfx.replaced(pruned)] == ["any"]
    for shape in ((3, 3, 4, 4), (2, 3, 7, 5)):
        assert distance(pruned, zeroed(traced, plan), (torch.randn(shape, dtype=torch.float64),)) < 1e-12


class Numbered(nn.Module):
    """Makes numbers of the batch: `len(x)`, alone and times how many windows an image has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 1), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.stem(x).permute(0, 2, 3, 1).reshape(len(x) * 4, -1, 12)
        return self.head(windows.relu().reshape(int(x.shape[0]), -1, 12).mean(1))


def test_a_batch_that_is_a_number_in_the_users_python_is_read_from_what_is_at_hand() -> None:
    torch.manual_seed(0)
    model = Numbered().double().eval()
    traced = ekgfx.trace(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    plan = ekgfx.Plan({"stem": (0, 3, 4, 9, 11)})
    pruned = ekgfx.prune(model, plan, traced, graphs="allow")
    assert len(ekgfx.replaced(pruned)) == 1
    for shape in ((2, 3, 4, 4), (1, 3, 4, 4), (5, 3, 4, 4), (3, 3, 6, 6)):
        for training in (False, True):
            x = torch.randn(shape, dtype=torch.float64)
            assert distance(pruned, zeroed(traced, plan), (x,), training=training) < 1e-12


class Normed(nn.Module):
    """Two numbers that no shape shows: how many groups a norm has, and where a slice starts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(4, 2, 1)
        self.scale = nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.group_norm(self.a(x), 3, self.scale)).relu()
        return self.head(x[:, 2:6])


def test_numbers_that_no_shape_shows_follow_the_cut() -> None:
    torch.manual_seed(0)
    model = Normed().double().eval()
    perturb(model)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    assert {name: group.size for name, group in traced.groups.items()} == {
        "a#0": 3,
        "a#1": 4,
        "b#0": 2,
        "b#1": 4,
        "b#2": 2,
    }
    for kept in ({"a#0": (0, 2)}, {"b#0": (1,)}, {"a#0": (1,), "a#1": (0, 1, 3), "b#0": (0,), "b#1": (1, 2, 3)}):
        plan = ekgfx.Plan(kept)
        pruned = ekgfx.prune(model, plan, traced, graphs="allow")
        assert check_pruned(traced, plan, pruned, (torch.randn(3, 3, 5, 4, dtype=torch.float64),)) < 1e-12


class Listed(nn.Module):
    """A list with an entry for each sample, and a width that only a forward written anew can change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.cat([x.new_ones(1, 1)] * x.shape[0])
        return self.head(self.stem(x).view(-1, 12, 16).mean(2)[..., None, None] * weights[..., None, None])


def test_a_forward_says_when_it_takes_the_examples_batch_only() -> None:
    model = Listed().eval()
    traced = ekgfx.trace(model, (torch.randn(2, 3, 4, 4),))
    with pytest.warns(EkgfxWarning, match=r"the model \(Listed, for the example's sizes only\)"):
        pruned = ekgfx.prune(model, ekgfx.Plan({"stem": (0, 3, 4)}), traced)
    assert [replacement.sizes for replacement in ekgfx.replaced(pruned)] == ["example"]


class Zeros(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(len(x), 3)], 1)


class Longer(nn.Module):
    """One module puts three zeros behind the features; what reads them stands in another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.zeros = nn.Linear(4, 6), Zeros()
        self.head = nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.zeros(self.stem(x)))


def test_what_shows_in_one_module_is_mended_in_the_one_before_it() -> None:
    torch.manual_seed(0)
    model = Longer().double().eval()
    traced = ekgfx.trace(model, torch.randn(2, 4, dtype=torch.float64))
    assert {name: group.size for name, group in traced.groups.items()} == {"stem": 6, "head.0#0": 5, "head.0#1": 3}
    plan = ekgfx.Plan({"stem": (0, 1, 4), "head.0#0": (0, 4), "head.0#1": (2,)})
    pruned = ekgfx.prune(model, plan, traced, graphs="allow")
    assert [replacement.module for replacement in ekgfx.replaced(pruned)] == ["zeros"]
    assert distance(pruned, zeroed(traced, plan), (torch.randn(5, 4, dtype=torch.float64),)) < 1e-12


class Modes(nn.Module):
    """The same operators in training, on another weight, and with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.still, self.noisy = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).view(-1, 5, 6) * (self.noisy if self.training else self.still)
        mask = x.new_ones(5, 5).tril() > 0
        y = F.scaled_dot_product_attention(x[..., :2] * 0 + 1, x[..., :2] * 0 + 1, x, mask if self.training else None)
        return self.head(y) + mask.sum()


def test_training_runs_on_what_it_ran_on() -> None:
    torch.manual_seed(0)
    model = Modes().double().eval()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    name, group = max(traced.groups.items(), key=lambda pair: pair[1].size)
    plan = ekgfx.Plan({name: tuple(range(1, group.size))})
    pruned = ekgfx.prune(model, plan, traced, graphs="allow")
    assert len(ekgfx.replaced(pruned)) == 1
    for training in (False, True):
        assert distance(pruned, zeroed(traced, plan), (x[:2],), training=training) < 1e-12


class Attention(nn.Module):
    """Queries, keys and values of one width, which its Python knows."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.query, self.key, self.value = (nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, self.width).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Masked(nn.Module):
    """Leaves a mask out that hides nothing but what lies ahead, unless it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(3, 6), Attention(), nn.Linear(6, 2)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        fake = isinstance(padding, torch._subclasses.FakeTensor)
        if not fake and not torch.compiler.is_compiling() and 0 not in tokens and not padding.any():
            mask = None
        else:
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            mask = causal & ~padding[:, None, None]
        return self.head(self.attention(self.stem(x), mask))


def test_a_forward_takes_the_way_that_a_run_takes_and_the_one_that_a_trace_takes() -> None:
    torch.manual_seed(0)
    model = Masked().double().eval()
    x, tokens = torch.randn(2, 5, 3, dtype=torch.float64), torch.ones(2, 5, dtype=torch.long)
    traced = ekgfx.trace(model, (x, tokens))
    assert not traced.unknown_ops
    plan = ekgfx.Plan({"attention.value": (0, 2)})
    assert {p.parameter for p in traced.groups["attention.value"].places} == {
        "attention.value.weight",
        "attention.value.bias",
        "attention.out.weight",
    }
    pruned = ekgfx.prune(model, plan, traced, graphs="allow")
    assert [replacement.module for replacement in ekgfx.replaced(pruned)] == ["attention"]
    hidden = tokens.clone()
    hidden[1, 1] = 0
    for ids in (tokens, hidden):
        for length in (5, 3):
            given = (x[:, :length], ids[:, :length])
            assert distance(pruned, zeroed(traced, plan), given) < 1e-12


class Averaged(nn.Module):
    """An attention that splits by numbers, and returns a map that its caller does not read."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            b, t, _ = x.shape
            q, k, v = (f(x).view(b, t, 4, 2).transpose(1, 2).reshape(b * 4, t, 2) for f in (self.q, self.k, self.v))
            attended = (q @ k.transpose(1, 2)).softmax(-1)
            y = (attended @ v).view(b, 4, t, 2).transpose(1, 2).reshape(b, t, 8)
            return self.o(y), attended.view(b, 4, t, t).mean(1)[:, None].broadcast_to(b, 4, t, t)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(4, 8), self.Attention(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y, _ = self.attention(x)
        return self.head(x + y)


def test_what_nobody_reads_need_not_be_written() -> None:
    torch.manual_seed(0)
    traced = ekgfx.trace(Averaged().double().eval(), torch.randn(2, 5, 4, dtype=torch.float64))
    plan = ekgfx.Plan({name: tuple(range(0, group.size, 2)) for name, group in traced.groups.items()})
    with pytest.warns(EkgfxWarning, match=r"it returns None as result\[1\], which nothing here reads"):
        pruned = ekgfx.prune(traced.model, plan, traced)
    assert [replacement.module for replacement in ekgfx.replaced(pruned)] == ["attention"]
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    assert check_pruned(traced, plan, pruned, (x[:, :5],)) < 1e-12
    assert pruned(x).shape == (3, 7, 2)


class Nodes(nn.Module):
    """A graph of nodes and edges, of which there is one: no size is a batch."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            y = self.lin(x).reshape(len(x), 4, 2).flip(1).reshape(len(x), 8)
            return y + torch.zeros(len(x), 8, dtype=x.dtype).index_add_(0, edges[1], y[edges[0]])

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixing, self.head = nn.Linear(4, 8), self.Mixing(), nn.Linear(8, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.head(self.mixing(self.stem(x).relu(), edges))


def test_numbers_made_of_sizes_are_read_where_there_is_no_batch() -> None:
    torch.manual_seed(0)

    def graph(nodes: int, edges: int) -> tuple[Tensor, Tensor]:
        return torch.randn(nodes, 4, dtype=torch.float64), torch.randint(0, nodes, (2, edges))

    traced = ekgfx.trace(Nodes().double().eval(), graph(7, 11))
    plan = ekgfx.Plan({name: tuple(range(0, group.size, 2)) for name, group in traced.groups.items()})
    pruned = ekgfx.prune(traced.model, plan, traced, graphs="allow")
    assert [(r.module, r.sizes) for r in ekgfx.replaced(pruned)] == [("mixing", "any")]
    for inputs in (graph(7, 11), graph(9, 5)):
        assert distance(pruned, zeroed(traced, plan), inputs) < 1e-12


class Attends(nn.Module):
    """Splits one dimension into heads and their widths: its own Python cannot express widths of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        batch, _, height, width = x.shape
        q, k, v = self.qkv(x).view(batch, 2, 12, height * width).split([4, 4, 4], 2)
        return self.out((v @ (q.mT @ k).softmax(-1).mT).view(batch, 8, height, width))


def test_a_written_forward_follows_sizes_also_under_the_tracer_of_torchscript() -> None:
    """As older ONNX exports are made (Ultralytics'): a number of the example there would hold for no other batch."""
    model, images = Attends().eval(), torch.randn(2, 3, 4, 4)
    traced = ekgfx.trace(model, images)
    plan = ekgfx.Plan({name: range(group.size // 2) for name, group in traced.groups.items()})
    pruned = ekgfx.prune(model, plan, traced, graphs="allow")
    (replacement,) = ekgfx.replaced(pruned)
    assert replacement.sizes == "any"
    script = torch.jit.trace(pruned, images)
    for shape in ((2, 3, 4, 4), (3, 3, 6, 5)):
        other = torch.randn(shape)
        torch.testing.assert_close(script(other), pruned(other))
    part = torch.jit.trace(lambda x: sized(torch.ops.aten.slice.Tensor, x, -1, 1, x.shape[0]), torch.randn(2, 5))
    assert part(torch.randn(4, 5)).shape == (4, 3)


class Casting(nn.Module):
    """It is told which type to compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.linear(x.to(dtype))


class Telling(nn.Module):
    """It writes its width out, and tells a submodule the type of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), Casting()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).reshape(len(x), 2, 4).reshape(len(x), 8), dtype=x.dtype)


def test_a_type_that_a_submodule_is_passed_follows_the_model() -> None:
    model = Telling().double()
    traced = ekgfx.trace(model, torch.randn(2, 5, dtype=torch.float64))
    plan = ekgfx.Plan({name: range(group.size // 2) for name, group in traced.groups.items()})
    pruned = ekgfx.prune(model, plan, traced)
    assert [each.module for each in ekgfx.replaced(pruned)] == [""]
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.allclose(pruned(x).float(), pruned.float()(x.float()), atol=1e-6)
