"""Maps that every stage pads to whole windows: sizes that are remainders of remainders are left as they are."""

import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.errors import EkgfxWarning
from ekgfx.rewriting import nested
from tests.support.attending import Attending
from tests.support.zeroed import distance, zeroed

WINDOW = 7


class Within(nn.Module):
    """Attention within windows, of four heads of two channels, which is all that its view takes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        windows, places, _ = x.shape
        q, k, v = self.qkv(x).view(windows, places, 3, 4, 2).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.attention = nn.Conv2d(8, 8, 2, 2), Within()

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)))
        b, c, h, w = x.shape
        padded = F.pad(x, (0, (WINDOW - w % WINDOW) % WINDOW, 0, (WINDOW - h % WINDOW) % WINDOW))
        _, _, high, wide = padded.shape
        tiles = padded.view(b, c, high // WINDOW, WINDOW, wide // WINDOW, WINDOW).permute(0, 2, 4, 3, 5, 1)
        found = self.attention(tiles.reshape(-1, WINDOW * WINDOW, c))
        count = high * wide // WINDOW // WINDOW
        back = found.view(found.shape[0] // count, high // WINDOW, wide // WINDOW, WINDOW, WINDOW, -1)
        return x + back.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, high, wide)[:, :, :h, :w]


def test_a_network_of_padded_windows_is_cut_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit it does not end in minutes."""
    monkeypatch.setattr(nested, "MOST", 60)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *(Stage() for _ in range(4)), nn.AdaptiveAvgPool2d(1)).double().eval()
    traced = ekgfx.trace(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    plan = ekgfx.search(traced, flops=0.6, strategy="uniform", importance="magnitude").plan
    start = time.process_time()
    with pytest.warns(EkgfxWarning, match="for the example's sizes, any batch"):
        pruned = ekgfx.prune(model, plan, traced)
    assert time.process_time() - start < 120
    twin = zeroed(traced, plan)
    for batch in (2, 1, 5):
        assert distance(pruned, twin, (torch.randn(batch, 3, 32, 32, dtype=torch.float64),)) < 1e-12


def test_each_example_has_a_forward_of_its_own_where_sizes_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested, "MOST", 0)

    def images(side: int, batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, side, side, dtype=torch.float64)

    torch.manual_seed(0)
    traced = ekgfx.trace(Attending().double().eval(), images(6), also=[images(10)])
    plan = ekgfx.Plan({name: tuple(range(group.size // 2)) for name, group in traced.groups.items()})
    with pytest.warns(EkgfxWarning, match="for the example's sizes, any batch"):
        pruned = ekgfx.prune(traced.model, plan, traced)
    twin = zeroed(traced, plan)
    for given in (images(6), images(10), images(10, 5), images(6, 3)):
        assert distance(pruned, twin, (given,)) < 1e-12
    with pytest.raises(NotImplementedError, match=r"query\.shape\[1\] == 9"):
        pruned(images(14))


def test_a_size_that_is_not_the_only_example_s_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested, "MOST", 0)
    torch.manual_seed(0)
    traced = ekgfx.trace(Attending().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    plan = ekgfx.Plan({name: tuple(range(group.size // 2)) for name, group in traced.groups.items()})
    with pytest.warns(EkgfxWarning, match="for the example's sizes, any batch"):
        pruned = ekgfx.prune(traced.model, plan, traced)
    assert distance(pruned, zeroed(traced, plan), (torch.randn(5, 3, 6, 6, dtype=torch.float64),)) < 1e-12
    with pytest.raises(NotImplementedError, match=r"query\.shape\[1\] == 9"):
        pruned(torch.randn(2, 3, 10, 10, dtype=torch.float64))


class Padded(Within):
    """Longer sequences are padded again and again, which makes nested sizes of them."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 4:
            for step in (2, 3, 5):
                x = F.pad(x, (0, 0, 0, (step - x.shape[1] % step) % step))
            return super().forward(x) + x.mean(1, keepdim=True)
        return super().forward(x)


def test_one_of_two_examples_may_be_followed_and_the_other_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested, "MOST", 8)

    def words(length: int, batch: int = 2) -> Tensor:
        return torch.randn(batch, length, 5, dtype=torch.float64)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Padded(), nn.Linear(8, 3)).double().eval()
    traced = ekgfx.trace(model, words(4), also=[words(7)])
    plan = ekgfx.Plan({name: tuple(range(group.size // 2)) for name, group in traced.groups.items()})
    with pytest.warns(EkgfxWarning, match="the forward of 1 module was replaced"):
        pruned = ekgfx.prune(model, plan, traced)
    twin = zeroed(traced, plan)
    for given in (words(4), words(3), words(7), words(7, 5), words(2, 3)):
        assert distance(pruned, twin, (given,)) < 1e-12
    with pytest.raises(NotImplementedError, match=r"x\.shape\[1\] <= 4 or x\.shape\[1\] == 7"):
        pruned(words(9))
