"""Python that does otherwise while it is exported than when it runs, what an export leaves or says, and caches that a
written forward cannot fill."""

import copy
import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import EkgfxWarning, PruneError
from ekgfx.graph.opaque import Leaves
from ekgfx.rewriting.calls import calls_of
from ekgfx.surgery.check import perturb, relative_error
from tests.support.zeroed import zeros

HEADS, WIDTH = 2, 4


class Cache:
    """Keys and values of earlier calls."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def update(self, *new: Tensor) -> list[Tensor]:
        self.held = [torch.cat(pair, 2) for pair in zip(self.held, new, strict=True)] if self.held else list(new)
        return self.held


class Attention(nn.Module):
    """One number is the width of queries and of values."""

    def __init__(self) -> None:
        super().__init__()
        self.width = WIDTH
        self.q, self.k, self.v, self.o = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, self.width).transpose(1, 2) for f in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.update(k, v)
        scores = q @ k.transpose(-2, -1) / 2
        if mask is not None:
            scores = torch.where(mask, scores, torch.finfo(x.dtype).min)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Makes a mask that hides nothing where it is exported, as transformers does; its training takes ways by values."""

    def __init__(self, drops: bool = False) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(5, HEADS * WIDTH), Attention(), nn.Linear(HEADS * WIDTH, 3)
        self.drops = drops

    def forward(self, x: Tensor) -> Tensor:
        mask = None
        if torch.compiler.is_exporting():
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        x = self.embed(x)
        if not (self.drops and self.training and x.sum() < torch.rand([])):
            x = x + self.attention(x, mask)
        return self.head(x)


class Config:
    """As a library's, which says whether a decoder keeps a cache."""

    def __init__(self) -> None:
        self.use_cache = True

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.embed, self.attention, self.head = nn.Linear(5, HEADS * WIDTH), Attention(), nn.Linear(HEADS * WIDTH, 3)

    def forward(self, x: Tensor, cache: Cache | None = None) -> dict[str, Any]:
        if cache is None and self.config.use_cache:
            cache = Cache()
        x = self.embed(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return {"logits": self.head(x + self.attention(x, mask, cache)), "cache": cache}


def made(model: nn.Module) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    perturb(model.double().eval())
    return model, torch.randn(2, 6, 5, dtype=torch.float64)


def apart(traced: ekgfx.TracedModel) -> ekgfx.Plan:
    """Half of the values' width, and three quarters of the queries': no one number says both."""
    kept = {"attention.q#1": (0, 1, 3), "attention.v": (1, 2)}
    assert {name: traced.groups[name].size for name in kept} == dict.fromkeys(kept, WIDTH)
    return ekgfx.Plan(kept)


def quietly(model: nn.Module, plan: ekgfx.Plan, traced: ekgfx.TracedModel, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ekgfx.prune(model, plan, traced, **options)


def test_a_written_forward_takes_the_call_of_a_run_and_that_of_an_export() -> None:
    model, x = made(Encoder())
    traced = ekgfx.trace(model, x)
    plan = apart(traced)
    pruned = quietly(model, plan, traced)
    (written,) = ekgfx.replaced(pruned)
    assert written.module == "attention" and written.sizes == "any"
    assert "mask is None" in written.source and "isinstance(mask, torch.Tensor)" in written.source
    assert "torch.finfo(x.dtype).min" in written.source and "e+308" not in written.source
    twin = zeros(model, traced, plan)
    for training in (False, True):
        for shape in ((3, 6, 5), (2, 9, 5)):
            y = torch.randn(*shape, dtype=torch.float64)
            assert relative_error(pruned.train(training)(y), twin.train(training)(y)) < 1e-12
    hiding = torch.ones(6, 6, dtype=torch.bool).tril()
    hidden = torch.randn(2, 6, HEADS * WIDTH, dtype=torch.float64)
    assert relative_error(pruned.attention(hidden, hiding), twin.attention(hidden, hiding)) < 1e-12
    assert ekgfx.trace(pruned, x).cost() == traced.cost(plan)


def test_an_export_that_fails_leaves_no_marks_for_the_next() -> None:
    """Training has no graph: recording it fails half-way, with sizes of the example that are free."""
    model, x = made(Encoder(drops=True))
    with pytest.warns(EkgfxWarning, match="training mode was not traced"):
        traced = ekgfx.trace(model, x)
    for _ in range(2):
        pruned = quietly(model, apart(traced), traced)
        assert [each.module for each in ekgfx.replaced(pruned)] == ["attention"]


def test_pytorch_does_not_warn_of_images_of_one_channel(capfd: pytest.CaptureFixture[str]) -> None:
    """Sizes of 1 cannot be left free; asked to, the exporter logs a line of its own for each."""
    calls_of(nn.Conv2d(1, 2, 3), ((torch.zeros(2, 1, 8, 8),), {}), Leaves())
    assert not capfd.readouterr().err


def test_a_decoder_whose_attention_is_written_anew_runs_without_its_cache() -> None:
    model, x = made(Decoder())
    traced = ekgfx.trace(model, x)
    plan = apart(traced)
    with pytest.warns(EkgfxWarning, match=r"without its cache \(config.use_cache is False"):
        pruned: Any = ekgfx.prune(model, plan, traced)
    assert model.config.use_cache and not pruned.config.use_cache
    y = torch.randn(3, 8, 5, dtype=torch.float64)
    found, wanted = pruned(y), zeros(model, traced, plan)(y)
    assert found["cache"] is None and relative_error(found["logits"], wanted["logits"]) < 1e-12
    with pytest.raises(NotImplementedError, match="cache=None"):
        pruned(y, Cache())
    with pytest.raises(PruneError):
        ekgfx.prune(model, plan, traced, graphs="forbid")


def test_a_decoder_keeps_its_cache_where_one_number_says_both_widths() -> None:
    model, x = made(Decoder())
    traced = ekgfx.trace(model, x)
    plan = ekgfx.Plan({"attention.q#1": (0, 3), "attention.v": (1, 2)})
    pruned: Any = ekgfx.prune(model, plan, traced, graphs="forbid")
    assert pruned.config.use_cache and pruned.attention.width == 2
    first, cache = pruned(x)["logits"], pruned(x[:, :5])["cache"]
    assert cache.held[0].shape == (2, HEADS, 5, 2) and first.shape == (2, 6, 3)


class Bucketed(nn.Module):
    """Numbers that have the value of a width by chance: many that nothing reads, and one that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.buckets, self.width = 8, 4
        self.first, self.second, self.third, self.fourth, self.fifth = (8,) * 5
        self.settings = SimpleNamespace(heads=2, model=8, inner=8, hidden=4, layers=4)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device) % self.buckets
        x = self.up(x).view(*x.shape[:2], -1, self.width).transpose(1, 2)
        return self.out((x * (steps[:, None] + 1)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("inplace", [False, True])
def test_integers_that_nothing_reads_hide_no_other(inplace: bool) -> None:
    model, x = made(Bucketed())
    traced = ekgfx.trace(model, torch.cat([x, x, x], 1))
    draw = random.Random(0)
    plan = ekgfx.Plan({n: sorted(draw.sample(range(g.size), g.size // 2)) for n, g in traced.groups.items()})
    twin = zeros(model, traced, plan)
    pruned: Any = ekgfx.prune(copy.deepcopy(model), plan, traced, graphs="forbid", inplace=inplace)
    assert pruned.buckets == 8 and pruned.settings == model.settings
    y = torch.randn(3, 30, 5, dtype=torch.float64)
    assert relative_error(pruned(y), twin(y)) < 1e-12


class Sorted(nn.Module):
    """Splits by a number of its own, and looks at values where it is given no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 8)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.lin(x).view(len(x), 4, 2)
        if mask is not None:
            y = y * mask
        elif (x.abs() > 9).any():
            y = y.clamp(-9, 9)
        return y.flip(1).reshape(len(x), 8)


class Sorting(nn.Module):
    """Makes a mask that hides nothing where it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.sorted, self.head = Sorted(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(1, 4, 1, dtype=x.dtype) if torch.compiler.is_exporting() else None
        return self.head(self.sorted(x, mask))


def test_a_written_forward_says_what_it_decides_as_the_example_did() -> None:
    torch.manual_seed(0)
    traced = ekgfx.trace(Sorting().double().eval(), torch.randn(2, 6, dtype=torch.float64))
    (name,) = traced.groups
    with pytest.warns(EkgfxWarning, match=r"decides as in the example, where .*`elif .*any\(\):` is False"):
        ekgfx.prune(traced.model, ekgfx.Plan({name: (0,)}), traced)
