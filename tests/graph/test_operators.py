"""Operators between two convolutions: the groups by hand, and every cut exact against the user's own Python."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import ops

import ekgfx
from tests.support.families.base import expected
from tests.support.zeroed import exact

CASES: dict[str, tuple[Callable[["Between", Tensor], Tensor], list[tuple[int, str]], bool]] = {}


class Between(nn.Module):
    """Convolution a of 12 channels, the operator (which may use p, 12 → 12), convolution b."""

    def __init__(self, operator: Callable[["Between", Tensor], Tensor]) -> None:
        super().__init__()
        self.operator = operator
        self.a, self.p, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operator(self, self.a(x)))


def case(name: str, *groups: tuple[int, str], zeroed: bool = True) -> Callable:
    """zeroed: it is what the model's own Python makes of zeros in place of what was cut; else a statistic of what is
    kept. Without `groups` the twelve channels of a are one, and p is not used."""

    def register(function: Callable[[Between, Tensor], Tensor]) -> Callable[[Between, Tensor], Tensor]:
        CASES[name] = (function, list(groups) or [(12, "a> >b")], zeroed)
        return function

    return register


def over_channels(x: Tensor) -> Tensor:
    return x.unsqueeze(1)


BOXES = torch.tensor([[0.0, 0, 0, 4, 4], [1, 1, 1, 5, 5]], dtype=torch.float64)

case("complex numbers of two parts")(lambda s, x: torch.complex(x, 2 * x).abs() + torch.polar(x.sigmoid(), x).real)
# Statistics over channels: of the kept ones.
case("the largest of all channels", zeroed=False)(lambda s, x: x * x.max(1, keepdim=True)[0].sigmoid())
case("the least of all channels", zeroed=False)(lambda s, x: x * x.min(1).values[:, None].sigmoid())
case("median of all channels", zeroed=False)(lambda s, x: x * x.median(1, keepdim=True)[0])
case("amax and amin", zeroed=False)(lambda s, x: x * over_channels(torch.aminmax(x, dim=1)[0]))
case("standard deviation of everything", zeroed=False)(lambda s, x: x / x.std())
case("std_mean", zeroed=False)(lambda s, x: x / torch.std_mean(x, dim=1, keepdim=True)[0])
case("local response norm", zeroed=False)(lambda s, x: F.local_response_norm(x, 5, alpha=0.1))
case("local response norm of an even window", zeroed=False)(
    lambda s, x: F.local_response_norm(x.flatten(2), 4, alpha=0.1).view_as(x)
)
case("maxout", (6, "a> >b"), (2, "a>"), zeroed=False)(lambda s, x: x.unflatten(1, (6, 2)).max(2)[0].repeat(1, 2, 1, 1))
case("CBAM", zeroed=False)(lambda s, x: x * (x.mean(1, keepdim=True) + x.max(1, keepdim=True)[0]).sigmoid())

case("mean by hand", zeroed=False)(lambda s, x: x - x.sum(1, keepdim=True) / x.shape[1])

# Sums over channels: what is cut takes nothing but its own part away.
case("L2 norm by hand")(lambda s, x: x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-3))
case("norm")(lambda s, x: x / (x.norm(dim=1, keepdim=True) + 1))
case("norm of everything")(lambda s, x: x / (x.norm() + 1))
case("matrix norm")(lambda s, x: x / (torch.linalg.matrix_norm(x, dim=(1, 2), keepdim=True) + 1))
case("sum of everything")(lambda s, x: x * x.sum().tanh())
case("running sum over channels")(lambda s, x: x.cumsum(1))
case("how many are not zero")(lambda s, x: x * over_channels(x.relu().count_nonzero(dim=1)))
case("any")(lambda s, x: x * (x > 1).any(1, keepdim=True))
case("dot product", (12, "a> >p p> >b"))(lambda s, x: x * (x * s.p(x)).sum(1, keepdim=True).tanh())
case("dot product by einsum", (12, "a> >p p> >b"))(
    lambda s, x: x * over_channels(torch.einsum("bchw,bchw->bhw", x, s.p(x))).tanh()
)
case("vecdot", (12, "a> >p p> >b"))(lambda s, x: x * over_channels(torch.linalg.vecdot(x, s.p(x), dim=1)).tanh())
case("cosine similarity", (12, "a> >p p> >b"))(lambda s, x: x * over_channels(F.cosine_similarity(x, s.p(x), dim=1)))
case("cosine similarity to a vector")(
    lambda s, x: x * over_channels(F.cosine_similarity(x, x.mean((2, 3), keepdim=True), dim=1))
)
case("distances", (12, "a> >p p> >b"))(
    lambda s, x: (torch.cdist(x.flatten(2).mT, s.p(x).flatten(2).mT).softmax(-1) @ x.flatten(2).mT).mT.reshape(x.shape)
)
case("distance of all", (12, "a> >p p> >b"))(lambda s, x: x * torch.dist(x, s.p(x)).tanh())
case("pairwise distance", (12, "a> >p p> >b"), zeroed=False)(
    lambda s, x: x * F.pairwise_distance(x.permute(0, 2, 3, 1), s.p(x).permute(0, 2, 3, 1))[:, None]
)
case("Gram matrix", (12, "a> >p >b"), (12, "p>"))(
    lambda s, x: (s.p(x).flatten(2).mT @ (s.p(x).flatten(2) @ x.flatten(2).mT)).mT.reshape(x.shape)
)
case("tensordot", (12, "a> >p"), (12, "p.weight:0 >b"))(
    lambda s, x: torch.tensordot(x, s.p.weight[:, :, 0, 0], dims=([1], [1])).permute(0, 3, 1, 2)
)
case("inner", (12, "a> >p"), (12, "p.weight:0 >b"))(
    lambda s, x: torch.inner(x.permute(0, 2, 3, 1), s.p.weight[:, :, 0, 0]).permute(0, 3, 1, 2)
)

# What is cut need not be zero where it is summed: the sum is over the kept ones.
case("softmax by hand", zeroed=False)(lambda s, x: x.exp() / x.exp().sum(1, keepdim=True))
case("running sum of gates", zeroed=False)(lambda s, x: x.sigmoid().cumsum(1))
case("dot product of gates", (12, "a> >p p> >b"), zeroed=False)(
    lambda s, x: x * (x.sigmoid() * s.p(x).sigmoid()).sum(1, keepdim=True)
)
case("cosine similarity of gates", (12, "a> >p p> >b"), zeroed=False)(
    lambda s, x: x * over_channels(F.cosine_similarity(x.sigmoid(), s.p(x).exp(), dim=1))
)
case("distances of gates", (12, "a> >p p> >b"), zeroed=False)(
    lambda s, x: x * torch.cdist(x.sigmoid().flatten(2).mT, s.p(x).exp().flatten(2).mT).sum(1).view(-1, 1, 8, 8)
)
case("distance of gates", (12, "a> >p p> >b"), zeroed=False)(lambda s, x: x * torch.dist(x.sigmoid(), s.p(x).exp()))

# What is indexed is space; the channels pass.
case("index_add")(lambda s, x: torch.zeros_like(x).index_add(2, torch.arange(8), x))
case("index_copy")(lambda s, x: x.index_copy(3, torch.tensor([1, 0]), x[..., :2]))
case("index_reduce")(lambda s, x: x.index_reduce(2, torch.tensor([1, 0, 1]), x[:, :, :3], "amax"))
case("index_fill")(lambda s, x: x.index_fill(2, torch.tensor([1, 0]), 0.5))
case("scatter_add")(lambda s, x: torch.zeros_like(x).scatter_add(2, torch.zeros_like(x, dtype=torch.long), x))
case("scatter_add to expanded places")(
    lambda s, x: torch.zeros_like(x).scatter_add(2, torch.arange(8).remainder(3).view(1, 1, 8, 1).expand_as(x), x)
)
case("scatter_reduce")(lambda s, x: x.scatter_reduce(2, torch.ones_like(x, dtype=torch.long), x, "mean"))
case("scatter of a part")(lambda s, x: x.scatter(2, torch.ones_like(x, dtype=torch.long)[:, :, :1], x[:, :, 2:3]))
case("take_along_dim")(lambda s, x: torch.take_along_dim(x, torch.arange(8).flip(0).view(1, 1, 1, 8), 3))
case("max_unpool2d")(lambda s, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2))
case("max_unpool1d")(lambda s, x: F.max_unpool1d(*F.max_pool1d(x.flatten(2), 2, return_indices=True), 2).view_as(x))
case("roi_align")(lambda s, x: ops.roi_align(x, BOXES, 8))
case("roi_pool")(lambda s, x: ops.roi_pool(x, BOXES, 8))
case("grid of an affine map")(
    lambda s, x: F.grid_sample(x, F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3), x.shape))
)


@case("written where a mask is true")
def masked(s: Between, x: Tensor) -> Tensor:
    x = x.clone()
    x[x > 1] = 0.0
    return x


@case("written to rows")
def rows(s: Between, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, torch.tensor([0, 2])] = x[:, :, 1:3]
    return x


case("channel shuffle", (4, "a> >b"))(lambda s, x: nn.ChannelShuffle(3)(x))
case("rotated by a quarter")(lambda s, x: torch.rot90(x, 1, (2, 3)))
case("equal pieces", (6, "a> >b"))(lambda s, x: torch.cat(x.tensor_split(2, 1)[::-1], 1))
case("equal pieces of the second dimension", (6, "a> >b"))(lambda s, x: torch.cat(x.hsplit(2)[::-1], 1))
case("equal rows", (6, "a> >b"))(lambda s, x: torch.cat(x.movedim(1, 0).vsplit(2)[::-1], 0).movedim(0, 1))
case("equal depths", (6, "a> >b"))(lambda s, x: torch.cat(x.movedim(1, 2).dsplit(2)[::-1], 2).movedim(2, 1))


@pytest.mark.parametrize("name", CASES)
def test_an_operator_passes_channels_on_exactly(name: str) -> None:
    function, groups, zeroed = CASES[name]
    model = Between(function).double()
    if not any(place in text for _, text in groups for place in ("p>", ">p", "p.")):
        model.p = nn.Identity()
    traced = exact(model, lambda batch: (torch.randn(batch, 3, 8, 8, dtype=torch.float64),), zeroed=zeroed)
    found = Counter((g.size, frozenset(f"{p.parameter}:{p.dim}" for p in g.places)) for g in traced.groups.values())
    assert found == expected(model, tuple(groups))


# No rule of their own: PyTorch defines them by operators that have one. A mean is a statistic, a sum of errors is not.
both = (12, "a> >p p> >b")
case("squared errors", both)(lambda s, x: F.mse_loss(x, s.p(x), reduction="none"))
case("sum of squared errors", both)(lambda s, x: x * F.mse_loss(x, s.p(x), reduction="sum").tanh())
case("mean of squared errors", both, zeroed=False)(lambda s, x: x * F.mse_loss(x, s.p(x)))
case("smooth L1", both)(lambda s, x: x + F.smooth_l1_loss(x, s.p(x), reduction="sum"))
case("Huber", both, zeroed=False)(lambda s, x: x + F.huber_loss(x, s.p(x), delta=0.5))
case("cross entropy of every channel", both, zeroed=False)(
    lambda s, x: x + F.binary_cross_entropy_with_logits(x, s.p(x).sigmoid())
)
case("hinge, written in place", both, zeroed=False)(lambda s, x: x + F.hinge_embedding_loss(x, s.p(x).sign()))
case("divergence", both)(lambda s, x: F.kl_div(x, s.p(x).sigmoid(), reduction="none"))
case("margin of a ranking", both, zeroed=False)(lambda s, x: x + F.margin_ranking_loss(x, s.p(x), x.sign()))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda s, x: x * x.max(1, keepdim=True)[1], "aten.max.dim: the position of a value in it is read"),
        (lambda s, x: x * x.argmin(1, keepdim=True), "aten.argmin.default: reduced over"),
        (lambda s, x: x * x.prod(1, keepdim=True), "aten.prod.dim_int: reduced over"),
        (lambda s, x: x * x.logsumexp(1, keepdim=True), "aten.logsumexp.default: reduced over"),
        (lambda s, x: x * x.kthvalue(3, 1, keepdim=True)[0], "aten.kthvalue.default: positions mix"),
        (lambda s, x: x * F.cross_entropy(x, x.sigmoid()), "aten._log_softmax.default: positions mix"),
        (lambda s, x: x + 0 * x.diff(dim=1).sum(), "aten.diff.default: neighbours are subtracted"),
        (lambda s, x: x.index_add(1, torch.zeros(12, dtype=torch.long), x), "aten.index_add.default: indexed"),
        (
            lambda s, x: x * F.cosine_similarity(x, x.mean(1, keepdim=True), dim=1)[:, None],
            "aten.cosine_similarity.default: compared with one value",
        ),
    ],
)
def test_what_a_cut_would_change_stays_with_its_reason(function: Callable, reason: str) -> None:
    traced = ekgfx.trace(Between(function), torch.randn(2, 3, 8, 8))
    assert not traced.unknown_ops and not traced.groups
    assert {f.reason for f in traced.groups.frozen if f.parameter == "a.weight" and f.dim == 0} == {reason}


class Deformed(nn.Module):
    """Offsets from a convolution, for two halves of the channels; 3 groups of 4 → 2 channels."""

    def __init__(self, parts: int, groups: int, mask: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(6, 4, 1)
        self.offset, self.mask = nn.Conv2d(3, parts * 18, 1), nn.Conv2d(3, parts * 9, 1) if mask else None
        self.deformed = ops.DeformConv2d(12, 6, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask(x).sigmoid()
        return self.b(self.deformed(self.a(x), self.offset(x), mask))


@pytest.mark.parametrize(
    ("parts", "groups", "mask", "by_hand"),
    [
        (1, 1, True, [(12, "a> >deformed"), (6, "deformed> >b")]),
        (2, 1, False, [(6, "a> >deformed"), (6, "deformed> >b")]),
        (1, 3, True, [(3, "a> deformed> >b"), (4, "a> >deformed"), (2, "deformed> >b")]),
    ],
)
def test_deformable_convolutions_are_convolutions(parts: int, groups: int, mask: bool, by_hand: list) -> None:
    model = Deformed(parts, groups, mask).double()
    traced = exact(model, lambda batch: (torch.randn(batch, 3, 5, 5, dtype=torch.float64),))
    found = Counter((g.size, frozenset(f"{p.parameter}:{p.dim}" for p in g.places)) for g in traced.groups.values())
    assert found == expected(model, tuple(by_hand))
    others = 3 * 12 + 3 * parts * 18 + (3 * parts * 9 if mask else 0) + 6 * 4
    assert traced.cost().macs == 25 * (others + 6 * (12 // groups) * 9)


class Cell(nn.Module):
    """A loop over steps in Python, from states of zeros that the width is written down for."""

    def __init__(self, kind: type[nn.RNNCellBase], given: bool, **options: str) -> None:
        super().__init__()
        self.width, self.given = 8, given
        self.embed, self.cell, self.read = nn.Linear(5, 6), kind(6, 8, **options), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        several = isinstance(self.cell, nn.LSTMCell)
        state = x.new_zeros(x.shape[0], self.width) if self.given else None
        state = (state, state) if several and self.given else state
        for step in range(x.shape[1]):
            state = self.cell(self.embed(x[:, step]).relu(), state)
        return self.read(state[0] if several else state)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("kind", "gates", "options"),
    [(nn.GRUCell, 3, {}), (nn.LSTMCell, 4, {}), (nn.RNNCell, 1, {}), (nn.RNNCell, 1, {"nonlinearity": "relu"})],
)
def test_units_of_recurrent_cells_are_one_group(kind: type, gates: int, options: dict, given: bool) -> None:
    model = Cell(kind, given, **options).double()
    traced = exact(model, lambda batch: (torch.randn(batch, 3, 5, dtype=torch.float64),))
    found = Counter((g.size, frozenset(f"{p.parameter}:{p.dim}" for p in g.places)) for g in traced.groups.values())
    units = " ".join(f"cell.{name}:0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    assert found == expected(model, ((6, "embed> cell.weight_ih:1"), (8, f"{units} cell.weight_hh:1 >read")))
    assert traced.cost().macs == 3 * (5 * 6 + gates * 8 * (6 + 8)) + 8 * 3
    plan = ekgfx.Plan({name: tuple(range(3)) for name in traced.groups})
    pruned = ekgfx.prune(model, plan, traced)
    assert type(pruned.cell) is kind and (pruned.cell.input_size, pruned.cell.hidden_size) == (3, 3)
    assert type(pruned) is Cell and pruned.width == (3 if given else 8)


class Demodulated(nn.Module):
    """StyleGAN2: kernels scaled by a style and divided by their norm, one convolution with a group for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.style, self.b = nn.Conv2d(3, 12, 1), nn.Linear(3, 12), nn.Conv2d(6, 4, 1)
        self.kernel = nn.Parameter(torch.randn(6, 12, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        style = self.style(x.mean((2, 3))) + 1
        kernel = self.kernel * style[:, None, :, None, None]
        kernel = kernel * (kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        y = self.a(x)
        n, c, h, w = y.shape
        y = F.conv2d(y.reshape(1, n * c, h, w), kernel.flatten(0, 1), padding=1, groups=n)
        return self.b(y.reshape(n, -1, h, w))


def test_demodulated_convolutions_in_groups_of_the_batch() -> None:
    model = Demodulated().double()
    traced = exact(model, lambda batch: (torch.randn(batch, 3, 5, 5, dtype=torch.float64),))
    found = Counter((g.size, frozenset(f"{p.parameter}:{p.dim}" for p in g.places)) for g in traced.groups.values())
    assert found == expected(model, ((12, "a> style> kernel:1"), (6, "kernel:0 >b")))
    assert traced.cost().macs == 25 * (3 * 12 + 6 * 12 * 9 + 6 * 4) + 3 * 12


def test_channels_for_the_positions_of_a_region() -> None:
    """Position-sensitive regions of 2 × 2: channels are 3·[4]."""

    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            boxes = torch.cat([torch.arange(len(x))[:, None].to(x), x.new_tensor([[0, 0, 4, 4]]).expand(len(x), 4)], 1)
            return self.b(ops.ps_roi_align(self.a(x), boxes, 2))

    model = Regions().double()
    traced = exact(model, lambda batch: (torch.randn(batch, 3, 5, 5, dtype=torch.float64),))
    found = Counter((g.size, frozenset(f"{p.parameter}:{p.dim}" for p in g.places)) for g in traced.groups.values())
    assert found == expected(model, ((3, "a> >b"),))


def test_copies_that_no_layer_computes_stay() -> None:
    """`expand(-1, -1, 5)` has its 5 from the code: no layer computes less where the copies are fewer."""

    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix, self.head = nn.Linear(4, 6), nn.Linear(5, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            copies = self.stem(x).relu().unsqueeze(-1).expand(-1, -1, 5)
            return self.head(self.mix(copies).sum(-1))

    traced = ekgfx.trace(Copies().double(), torch.randn(3, 4, dtype=torch.float64))
    assert {name: group.size for name, group in traced.groups.items()} == {"stem": 6, "mix": 3}
    assert {place.reason for place in traced.groups.frozen if place.parameter == "mix.weight"} == {
        "copies of one position"
    }


def test_copies_that_meet_what_a_layer_computes_go_with_it() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.gate, self.head = nn.Linear(4, 6), nn.Linear(4, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            stem = self.stem(x)
            return self.head(stem * self.gate(x).expand_as(stem))

    traced = ekgfx.trace(Gate(), torch.randn(3, 4))
    assert {name: group.size for name, group in traced.groups.items()} == {"stem": 6}
