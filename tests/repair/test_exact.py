"""Where kept channels can say exactly what was removed, the repaired network computes what the unpruned one does."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.surgery.check import relative_error

SIDE = 8
KEPT = (0, 2, 3, 5)
"""Of 8 channels; what is removed is made of these."""


def say_again(*weights: Tensor, signs: bool = False, dim: int = 0) -> None:
    """Removed rows become twice a kept row (with signs: sums of kept rows), in all of the tensors alike."""
    removed = [i for i in range(8) if i not in KEPT]
    mix = torch.zeros(len(removed), len(KEPT), dtype=torch.float64)
    for row in range(len(removed)):
        mix[row, row] = 2.0
        if signs:
            mix[row, (row + 1) % len(KEPT)] = -0.5
    with torch.no_grad():
        for weight in weights:
            rows = weight.movedim(dim, 0)
            rows[removed] = torch.einsum("rk,k...->r...", mix, rows[list(KEPT)])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, stride=2, padding=1)
        say_again(self.first.weight, self.first.bias)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Residual(nn.Module):
    """The stream's removed channels are sums of kept ones; every branch writes them so."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.shortcut, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        for layer in (self.stem, self.outer, self.shortcut):
            say_again(layer.weight, layer.bias, signs=True)

    def forward(self, x):
        x = self.stem(x)
        x = self.shortcut(x) + self.outer(self.inner(x).relu())
        return self.head(x)


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 5, 1), nn.Conv2d(13, 4, 3)
        say_again(self.a.weight, self.a.bias)

    def forward(self, x):
        return self.head(torch.cat([self.a(x).relu(), self.b(x)], 1))


class Grouped(nn.Module):
    """Within every group the removed inputs are copies of kept ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 6, 3, padding=1, groups=2)
        rows, bias = self.first.weight.unflatten(0, (2, 8)), self.first.bias.unflatten(0, (2, 8))
        say_again(rows, bias, dim=1)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Transposed(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=groups)
        say_again(self.first.weight, self.first.bias)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Attention(nn.Module):
    """Removed heads are copies of kept ones: the output projection answers for them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Linear(3, 16), nn.Linear(16, 3 * 8 * 4), nn.Linear(8 * 4, 16)
        rows, bias = self.qkv.weight.view(3, 8, 4, 16), self.qkv.bias.view(3, 8, 4)
        with torch.no_grad():
            for head, kept in zip((1, 4, 6, 7), KEPT, strict=True):
                rows[:, head], bias[:, head] = rows[:, kept], bias[:, kept]

    def forward(self, x):
        x = self.embed(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(x).unflatten(2, (3, -1, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ConstantChannels(nn.Module):
    """A norm makes the removed channels constant: the mean of the norm behind the consumer answers for them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        with torch.no_grad():
            for norm in (self.norm, self.last):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
                norm.weight.uniform_(0.5, 2)
            self.norm.weight[[1, 4, 6, 7]] = 0
            self.norm.bias[[1, 4, 6, 7]] = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=self.norm.bias.dtype)

    def forward(self, x):
        return self.last(self.second(self.norm(self.first(x)).relu()))


class Scaled(nn.Module):
    """The first summand has a weight that is computed, so that it stays wrong; the branch that ends last makes up for
    it, through a norm and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(5, 8, 1, 1))
        self.branch, self.norm = nn.Conv2d(8, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.gain, self.head = nn.Parameter(torch.rand(5, 1, 1) + 0.5), nn.Conv2d(5, 2, 1)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2)
        say_again(self.stem.weight, self.stem.bias)

    def forward(self, x):
        x = self.stem(x).relu()
        x = F.conv2d(x, self.weight * 2) + self.norm(self.branch(x)) * self.gain
        return self.head(x.relu())


class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 3, dilation=2, padding="same")
        say_again(self.first.weight, self.first.bias)

    def forward(self, x):
        return self.second(self.first(x.flatten(2)).relu())


class Conv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 8, 1), nn.Conv3d(8, 4, (1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 0))
        say_again(self.first.weight, self.first.bias)

    def forward(self, x):
        return self.second(self.first(x[:, :, None]).relu())


class Parameters(nn.Module):
    """Products with parameters: transposed, packed, stacked, and as the first factor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 8))
        self.packed = nn.Parameter(torch.randn(6, 8))
        self.stacked = nn.Parameter(torch.randn(2, 8, 3))
        self.left = nn.Parameter(torch.randn(5, 8))
        self.bias = nn.Parameter(torch.randn(4))
        say_again(self.first, dim=1)

    def forward(self, x):
        x = (x.flatten(2).transpose(1, 2) @ self.first).relu()
        a, b = self.packed.split([4, 2])
        heads = x[:, None].expand(-1, 2, -1, -1) @ self.stacked
        return F.linear(x, a, self.bias), x @ b.t(), heads, self.left @ x.mT


class Shared(nn.Module):
    """One weight, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        for layer in (self.first, self.second):
            say_again(layer.weight, layer.bias)

    def forward(self, x):
        return self.head(self.second(self.second(self.first(x).relu()).relu()))


EXACT = [
    Plain,
    Residual,
    Concatenated,
    Grouped,
    Transposed,
    Attention,
    ConstantChannels,
    Scaled,
    Conv1d,
    Conv3d,
    Parameters,
    Shared,
]


def images(count: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cut(model: nn.Module) -> tuple[ekgfx.TracedModel, ekgfx.Plan, nn.Module]:
    """Every group of 8 loses the same four."""
    traced = ekgfx.trace(model, images(2))
    plan = ekgfx.Plan({name: KEPT for name, group in traced.groups.items() if group.size == 8})
    assert plan.kept
    return traced, plan, ekgfx.prune(model, plan, traced)


@pytest.mark.parametrize("cls", EXACT, ids=lambda cls: cls.__name__)
def test_what_the_kept_channels_can_say_is_given_back(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model = cls().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    traced, plan, pruned = cut(model)
    fresh = images(3, seed=2)
    assert relative_error(pruned(fresh), model(fresh)) > 1e-2
    shapes = {name: tensor.shape for name, tensor in pruned.state_dict().items()}
    found = ekgfx.repair(pruned, traced, plan, images())
    assert found.kept and found.after.error < 1e-15
    assert relative_error(pruned(fresh), model(fresh)) < 1e-8
    assert type(pruned) is cls and {n: t.shape for n, t in pruned.state_dict().items()} == shapes


class Depthwise(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, groups=8, bias=bias), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)

    def features(self, x):
        return self.norm(self.depthwise(self.between(self.first(x))))

    def forward(self, x):
        return self.last(self.features(x).relu())


@pytest.mark.parametrize("bias", [True, False])
def test_a_depthwise_convolution_answers_for_a_gain_and_an_offset(bias: bool) -> None:
    """What comes in is scaled and shifted, channel by channel: the kernel takes the scale; the bias, or the mean of the
    norm that follows, takes the shift."""
    torch.manual_seed(0)
    model = Depthwise(bias).double().eval()
    traced = ekgfx.trace(model, images(2))
    (name,) = [name for name, group in traced.groups.items() if group.size == 8]
    plan = ekgfx.Plan({name: KEPT})
    pruned = ekgfx.prune(model, plan, traced)
    with torch.no_grad():
        pruned.between.weight *= torch.tensor([2.0, 0.5, 3.0, 1.0])
        pruned.between.running_mean += torch.tensor([0.3, -1.0, 0.0, 2.0])
        pruned.last.weight.zero_()
    x = images(3, seed=2)
    expected = model.features(x)[:, list(KEPT)]
    assert relative_error(pruned.features(x), expected) > 0.1
    ekgfx.repair(pruned, traced, plan, images())
    assert relative_error(pruned.features(x), expected) < 1e-8


def test_weights_that_were_lost_are_found_again() -> None:
    """Nothing is cut, but every weight is replaced by noise: least squares finds the unpruned network's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.Tanh(), nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.Tanh(),
        nn.Conv2d(6, 6, 2, groups=6), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2),
    ).double()  # fmt: skip
    traced = ekgfx.trace(model, images(2))
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter += torch.randn_like(parameter) * 0.2
    ekgfx.repair(pruned, traced, ekgfx.Plan(), images())
    for (name, found), expected in zip(pruned.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=name)
