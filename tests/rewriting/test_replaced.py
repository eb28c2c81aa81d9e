"""A module that cannot express its cut gets another forward; its class, and the model around it, stay."""

import copy
import io
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import ekgfx
from ekgfx.surgery.check import check_pruned, perturb
from ekgfx.surgery.masked import check_masked
from tests.support.zeroed import distance, zeroed


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


class Tutorial(nn.Module):
    """A hard-coded view, and functional dropout (of the image, so that both networks draw the same)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 16, 3)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(16 * 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, training=self.training)
        x = F.max_pool2d(self.norm(self.a(x)).relu(), 2)
        x = F.max_pool2d(self.b(x).relu(), 2)
        return self.head(x.view(-1, 16 * 2 * 2))

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(1)


class Correlation(nn.Module):
    """Divides by the root of a width, views to sizes of the image, and resizes to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.q, self.k, self.v, self.out = (nn.Conv2d(12, n, 1) for n in (6, 6, 12, 4))

    def forward(self, x: Tensor) -> Tensor:
        f = self.b(self.a(x).relu()).relu()
        b, c, h, w = f.shape
        q, k, v = self.q(f).flatten(2), self.k(f).flatten(2), self.v(f).flatten(2)
        f = f + (v @ (k.transpose(1, 2) @ q * q.size(1) ** -0.5).softmax(1)).view(b, c, h, w)
        return F.interpolate(self.out(f), size=x.shape[-2:], mode="bilinear")


class Decoder(nn.Module):
    """Grouped queries, rotary positions and a causal mask, all made in forward, with types and devices of the input."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.groups, self.width = 4, 2, 6
            self.q, self.k, self.v, self.o = (nn.Linear(12, n) for n in (24, 12, 12, 1))
            self.o = nn.Linear(24, 12)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = self.q(x), self.k(x), self.v(x)
            scale = (q.shape[-1] // self.heads) ** -0.5
            q, k, v = (t.view(b, n, -1, self.width).transpose(1, 2) for t in (q, k, v))
            angle = torch.arange(n, dtype=x.dtype, device=x.device)[:, None] / torch.arange(1, 7, device=x.device)
            q, k = q * angle.cos(), k * angle.cos()
            k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
            weights = F.dropout(((q @ k.transpose(2, 3)) * scale + mask).softmax(-1), 0.0, self.training)
            return self.o((weights @ v).transpose(1, 2).reshape(b, n, -1))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.blocks, self.head = nn.ModuleList(self.Attention() for _ in range(2)), nn.Linear(12, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        n = tokens.shape[1]
        mask = torch.full((n, n), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
        for block in self.blocks:
            x = x + block(x, mask)
        return self.head(x)


class Shift(nn.Module):
    """Shifts three channels each way, to neighbours, written into parts of a tensor; dropout inside of PyTorch's
    attention, an argument that the graph of evaluation mode leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        b, c, h, w = x.shape
        shifted = torch.zeros_like(x)
        shifted[:, :3, :-1], shifted[:, 3:6, 1:], shifted[:, 6:] = x[:, :3, 1:], x[:, 3:6, :-1], x[:, 6:]
        x = self.b(shifted.view(b, c, h * w).view(b, c, h, w)).relu().flatten(2).transpose(1, 2)
        rate = 0.2 if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(x, x, x, dropout_p=rate))


@dataclass
class Settings:
    width: int = 12
    heads: int = 3
    side: int = 4


class Configured(nn.Module):
    """Reads its width from a configuration."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.a, self.qkv, self.out = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 36, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        f, s = self.a(x).relu(), self.settings
        b, _, h, w = f.shape
        q, k, v = self.qkv(f).view(b, 3, s.heads, s.width // s.heads, h * w).unbind(1)
        y = (v @ k.softmax(-1).transpose(-2, -1)) @ q
        return self.out(y.reshape(b, s.width, h, w) + f)


def image(batch: int, size: int) -> tuple[Tensor]:
    return (torch.randn(batch, 3, size, size),)


def tokens(batch: int, length: int) -> tuple[Tensor]:
    return (torch.randint(0, 11, (batch, length)),)


CASES = {
    "hard-coded view": (Tutorial, image, 14, (14,)),
    "root of a width": (Correlation, image, 16, (16, 24)),
    "grouped queries": (Decoder, tokens, 5, (5, 9)),
    "configuration": (lambda: Configured(Settings()), image, 4, (4, 6)),
    "parts written to": (Shift, image, 4, (4, 6)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pruned_module_does_what_the_users_python_does_with_zeroed_weights(name: str, dtype: torch.dtype) -> None:
    make, inputs, size, sizes = CASES[name]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    perturb(model)
    example = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs(2, size))
    traced = ekgfx.trace(model, example)
    groups = {n: g for n, g in traced.groups.items() if g.size > 2}
    plan = ekgfx.Plan({n: tuple(range(g.size - g.size // 3)) for n, g in groups.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = ekgfx.prune(model, plan, traced)
    twin = zeroed(traced, plan)
    assert isinstance(pruned, type(model)) and sum(p.numel() for p in pruned.parameters()) == traced.cost(plan).params
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for other in sizes:
        for batch in (2, 5):
            for training in (False, True):
                assert distance(pruned, twin, inputs(batch, other), training=training) < tolerance
    buffer = io.BytesIO()
    if name != "configuration":  # a class inside a function or a test cannot be found again
        torch.save(pruned, buffer)
        buffer.seek(0)
        assert distance(torch.load(buffer, weights_only=False), twin, inputs(3, size)) < tolerance
    half = copy.deepcopy(pruned).bfloat16()
    assert distance(half, twin.bfloat16(), inputs(3, size)) < 0.1
    assert (
        half(
            *pytree.tree_map_only(Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, inputs(2, size))
        ).dtype
        == torch.bfloat16
    )


def test_a_shared_configuration_is_not_changed_for_others() -> None:
    settings = Settings()
    model = Configured(settings).eval()
    traced = ekgfx.trace(model, image(2, 4))
    plan = ekgfx.Plan({n: tuple(range(g.size - g.size // 3)) for n, g in traced.groups.items()})
    ekgfx.prune(model, plan, traced, inplace=True, graphs="allow")
    assert settings == Settings()


def test_a_replaced_forward_is_told_by_name_or_forbidden(traced: ekgfx.TracedModel) -> None:
    stream = next(group for group in traced.groups.values() if group.size == 8)
    plan = ekgfx.Plan({stream.name: (0, 2, 3, 5, 6)})
    with pytest.raises(ekgfx.EkgfxError, match=r"blocks.0 \(Mixer\).*ignore="):
        ekgfx.prune(traced.model, plan, traced, graphs="forbid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = ekgfx.prune(traced.model, plan, traced, graphs="allow")
    first = ekgfx.replaced(pruned)[0]
    assert (first.module, first.kind, first.sizes) == ("blocks.0", "Mixer", "any")
    assert "self.qkv" in first.source and not ekgfx.replaced(traced.model)


def test_a_replaced_forward_refuses_to_be_called_in_another_way() -> None:
    class Optional(Tutorial):
        def forward(self, x: Tensor, features: bool = False) -> Tensor:
            return super().forward(x) + (1 if features else 0)

    traced = ekgfx.trace(Optional(), image(2, 14))
    pruned = ekgfx.prune(traced.model, ekgfx.Plan({"b": tuple(range(10))}), traced, graphs="allow")
    assert pruned(*image(2, 14), False).shape == (2, 3)
    with pytest.raises(NotImplementedError, match="features=False"):
        pruned(*image(2, 14), True)


class Points(nn.Module):
    """As many points as channels, and as many neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.num_points, self.k, self.width, self.parts = 16, 8, 16, 2
        self.a, self.b, self.head = nn.Linear(3, 16), nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        near = torch.cdist(x, x).topk(self.k, largest=False).values
        x = x[:, : self.num_points]
        y = self.a(x).view(len(x), -1, self.parts, self.width // self.parts).flatten(2)
        return self.head(y * self.b(near[:, : self.num_points])).mean(1)


def test_an_integer_that_only_equals_a_width_stays() -> None:
    traced = ekgfx.trace(Points().eval(), torch.randn(2, 20, 3))
    plan = ekgfx.Plan({n: tuple(range(g.size // 2)) for n, g in traced.groups.items()})
    pruned = ekgfx.prune(traced.model, plan, traced)
    assert not ekgfx.replaced(pruned)
    assert (pruned.num_points, pruned.k) == (16, 8) and (pruned.width, pruned.parts) != (16, 2)
    for points in (20, 40):
        assert distance(pruned, zeroed(traced, plan), (torch.randn(3, points, 3),)) < 1e-4


def test_rounding_is_no_reason_to_replace_a_forward() -> None:
    """In float32 a TransformerEncoder takes another way in evaluation, whose sums are in another order."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    perturb(encoder)
    traced = ekgfx.trace(encoder, torch.randn(2, 5, 8))
    plan = ekgfx.Plan({n: tuple(range(9)) for n, g in traced.groups.items() if g.size == 16})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = ekgfx.prune(encoder, plan, traced)
    assert distance(pruned, zeroed(traced, plan), (torch.randn(3, 7, 8),)) < 1e-4
