"""Sizes that come from the batch follow it; what cannot is refused when the first other batch comes, never wrong."""

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import ops

import ekgfx
from ekgfx.errors import EkgfxWarning, PlanError
from ekgfx.graph import sizes
from tests.support.attending import Attending
from tests.support.zeroed import distance, exact, zeroed, zeros


class Tokens(nn.Module):
    """4 tokens of 6 features to 8, the function, 5 outputs."""

    def __init__(self, function: Callable[["Tokens", Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.up, self.down, self.table = nn.Linear(6, 8), nn.Linear(8, 5), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self, self.up(x)).relu())


def entries(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 4, 6, dtype=torch.float64),)


def regions(s: Tokens, x: Tensor) -> Tensor:
    boxes = torch.cat([torch.arange(len(x))[:, None].to(x), x.new_tensor([[0, 0, 3, 3]]).expand(len(x), 4)], 1)
    return ops.roi_align(x.mT[..., None].expand(-1, -1, 4, 4), boxes, 2).mean((2, 3))


def graph_sum(s: Tokens, x: Tensor) -> Tensor:
    of_sample = torch.arange(len(x)).repeat_interleave(4)
    return x.new_zeros(len(x), x.shape[2]).index_add(0, of_sample, x.reshape(-1, x.shape[2]))


FOLLOW: dict[str, Callable[[Tokens, Tensor], Tensor]] = {
    "the last token": lambda s, x: x[torch.arange(len(x)), (x.sum(2) > 0).sum(1).clamp(max=3)],
    "one token": lambda s, x: x[torch.arange(len(x)), -1],
    "a token by number": lambda s, x: x[torch.arange(len(x)), torch.full((len(x),), 2)],
    "rows by offsets": lambda s, x: x.reshape(-1, x.shape[2])[torch.arange(len(x)) * 4 + 1],
    "rows by steps": lambda s, x: x.reshape(-1, x.shape[2])[torch.arange(0, len(x) * 4, 4)],
    "index_select": lambda s, x: x.reshape(-1, x.shape[2]).index_select(0, torch.arange(len(x)) * 4),
    "a grid of both": lambda s, x: x[torch.meshgrid(torch.arange(len(x)), torch.arange(4), indexing="ij")],
    "full": lambda s, x: x + torch.full((len(x), 1, 1), 0.5),
    "noise": lambda s, x: x + 0 * torch.randn(len(x), 1, 1),
    "the mean of the batch by hand": lambda s, x: x - x.sum(0) / len(x),
    "counted from one": lambda s, x: x * torch.arange(1, len(x) + 1).view(-1, 1, 1),
    "counted in threes": lambda s, x: x * torch.arange(1, 3 * len(x), 3).view(-1, 1, 1),
    "counted through": lambda s, x: x + torch.arange(len(x) * 4).view(len(x), 4, 1),
    "a table repeated": lambda s, x: x + s.table.repeat(len(x), 1).view(len(x), 4, -1),
    "a table expanded": lambda s, x: torch.cat([s.table.expand(len(x), -1, -1), x], 1),
    "numbers repeated": lambda s, x: x + torch.arange(len(x)).repeat_interleave(4).view(-1, 4, 1),
    "an identity": lambda s, x: (torch.eye(len(x), dtype=x.dtype) @ x.flatten(1)).view(x.shape),
    "from 0 to 1": lambda s, x: x * torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None, None],
    "two views of a sample": lambda s, x: (lambda y: y[: len(x)] * y[len(x) :])(torch.cat([x, x + 1])),
    "places to scatter to": lambda s, x: x.new_zeros(x.shape).scatter_add(1, torch.zeros_like(x, dtype=torch.long), x),
    "regions of every image": regions,
    "nodes of every graph": graph_sum,
}


@pytest.mark.parametrize("name", FOLLOW)
def test_sizes_of_the_batch_follow_it(name: str) -> None:
    traced = exact(Tokens(FOLLOW[name]).double(), entries, plans=1)
    assert [group.size for group in traced.groups.values()] == [8]
    network = traced.subnetwork()
    for batch in (1, 2, 7):
        torch.testing.assert_close(network(*entries(batch)).shape, traced.model(*entries(batch)).shape)


REFUSED: dict[str, tuple[Callable[[Tokens, Tensor], Tensor], str]] = {
    "a loop over samples": (lambda s, x: torch.stack([y * 2 for y in x]), "the batch ends at aten.unbind.int"),
    "half of the batch": (lambda s, x: x[: len(x) // 2], "the batch ends at aten.slice.Tensor"),
    "strides": (
        lambda s, x: x.contiguous().as_strided(x.shape, (32, 8, 1)),
        "the batch ends at aten.as_strided.default",
    ),
    "divided by the batch": (lambda s, x: x / len(x), "its values differ by"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_for_the_example_only_is_refused(name: str) -> None:
    function, said = REFUSED[name]
    traced = ekgfx.trace(Tokens(function).double().eval(), entries(2))
    traced.subnetwork()(*entries(2))
    for _ in range(2):
        found = "traced on inputs of 2×4×6, does not hold for batches of another size, such as 4×4×6: "
        with pytest.raises(PlanError, match=rf"{found}.*{said}.*; trace it"):
            traced.subnetwork()(*entries(5))
    assert traced.subnetwork()(*entries(2)).isfinite().all()


def test_a_length_that_the_graph_does_not_know_is_refused_whenever_it_comes() -> None:
    traced = ekgfx.trace(Tokens(lambda s, x: x + s.table).double().eval(), entries(2))
    with pytest.raises(RuntimeError, match="must match"):  # of the model itself
        traced.subnetwork()(torch.randn(2, 3, 6, dtype=torch.float64))
    traced = ekgfx.trace(Tokens(lambda s, x: x[:, : x.shape[1] // 2]).double().eval(), entries(2))
    for length in (6, 8):
        with pytest.raises(PlanError, match=rf"2×4×6, does not hold for 3×{length}×6: its output has the shape"):
            traced.subnetwork()(torch.randn(3, length, 6, dtype=torch.float64))


class Apart(Tokens):
    """An output for every sample, as detectors give."""

    def forward(self, x: Tensor) -> Any:
        return [{"scores": sample} for sample in super().forward(x)]


class Pair(nn.Module):
    """Every token meets each of some rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(3, 5)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.down(self.up(x).relu() @ self.up(table).mT)


def test_an_output_for_every_sample_is_that_of_the_example_only() -> None:
    traced = ekgfx.trace(Apart(lambda s, x: x).double().eval(), entries(2), unused=["table"])
    with pytest.raises(PlanError, match="it returns 2 tensors, the model 4; the batch ends at aten.unbind.int"):
        traced.subnetwork()(*entries(5))


def test_a_large_batch_is_compared_by_few_of_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model runs beside the graph once, on twice the example's samples; a table of the example's size stays."""
    model = Pair().double().eval()
    (example,), table, compared = entries(3), torch.randn(3, 6, dtype=torch.float64), []
    network = ekgfx.trace(model, (example, table)).subnetwork()
    problem = sizes._problem
    monkeypatch.setattr(
        sizes, "_problem", lambda graph, *given: compared.append([t.shape for t in given[0]]) or problem(graph, *given)
    )
    for batch in (50, 7, 3):
        (x,) = entries(batch)
        torch.testing.assert_close(network(x, table), model(x, table))
    assert compared == [[(6, 4, 6), (3, 6)]]


def test_random_values_are_no_difference() -> None:
    traced = ekgfx.trace(Tokens(lambda s, x: x + torch.randn_like(x)).double().eval(), entries(2))
    state = torch.get_rng_state()
    assert traced.subnetwork()(*entries(5)).shape == (5, 4, 5)
    assert not torch.equal(state, torch.get_rng_state())


class Bags(nn.Module):
    """Bags of five words each: 8 features, 6 hidden, 3 outputs."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.a, self.b = nn.EmbeddingBag(30, 8, mode=mode), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.b(self.a(self.bag(words)).relu())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_those_of_the_batch(mode: str) -> None:
    traced = exact(Bags(mode).double(), lambda batch: (torch.randint(0, 30, (batch, 5)),))
    places = [{f"{p.parameter}:{p.dim}" for p in g.places} for g in traced.groups.values()]
    assert places == [{"bag.weight:1", "a.weight:1"}, {"a.weight:0", "a.bias:0", "b.weight:1"}]
    assert [g.size for g in traced.groups.values()] == [8, 6]


class Mask(nn.Module):
    """A mask looked up by batch and position, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(50, 12), nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        b, n = ids.shape
        rows, columns = torch.arange(b)[:, None, None, None], torch.arange(n)[None, None, None]
        mask = keep.bool()[rows, columns].expand(b, 1, n, n)
        x = self.embed(ids)[:, None]
        return self.head(self.up(F.scaled_dot_product_attention(x, x, x, mask)[:, 0]).relu().mean(1))


def test_a_search_takes_batches_of_any_size() -> None:
    def batch(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(50, (n, 7)), torch.ones(n, 7, dtype=torch.long)

    model = Mask().double()
    traced = exact(model, batch)
    result = ekgfx.search(traced, [(batch(n), torch.randint(3, (n,))) for n in (8, 5)], flops=0.55)
    twin = zeros(model, traced, result.plan)
    torch.testing.assert_close(traced.subnetwork(result.plan)(*batch(1)).shape, twin(*batch(1)).shape)


class Mixed(nn.Module):
    """(B, H·W, C) seen as (B, C, H, W), without a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.value, self.head = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.value(x).flatten(2).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("size", [2, 4, 3])
def test_a_reshape_that_mixes_channels_and_space_keeps_both(size: int) -> None:
    """It parts channels by the example's image size: 16 as [4]·4 at 2 × 2."""
    traced = ekgfx.trace(Mixed(), torch.randn(2, 3, size, size))
    assert not traced.groups
    reasons = {
        f.reason.partition(": ")[2] for f in traced.groups.frozen if f.parameter == "value.weight" and f.dim == 0
    }
    assert reasons == {"positions mix with those of space, by sizes of the example"} or size == 4


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(x.shape), [16]),
        (lambda x: x.view(len(x), 4, 2, 2, *x.shape[2:]).sum((2, 3)).repeat(1, 4, 1, 1), [4, 2, 2]),
        (lambda x: x.flatten(2).transpose(1, 2).unflatten(2, (2, 8)).transpose(1, 2).sum(3)[..., None].mT, None),
    ],
    ids=["there and back", "blocks of channels", "heads"],
)
def test_reshapes_within_channels_part_them_as_before(function: Callable, sizes: list[int] | None) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1) if sizes else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(function(self.stem(x)))

    traced = ekgfx.trace(Net(), torch.randn(2, 3, 4, 4))
    assert sizes is None or sorted(g.size for g in traced.groups.values()) == sorted(sizes)
    assert not any("sizes of the example" in f.reason for f in traced.groups.frozen)


class Edges(nn.Module):
    """Messages along the edges of a graph: as many nodes and edges as come, and no batch. 5 features, heads of 4, 12
    hidden, 3 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.up, self.message, self.head = nn.Linear(5, 12), nn.Linear(24, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        x = self.up(x).relu()
        degree = torch.zeros(x.size(0), dtype=x.dtype).scatter_add_(0, target, x.new_ones(edges.size(1))).clamp(min=1)
        message = self.message(torch.cat([x[source], x[target]], 1)).view(edges.size(1), self.heads, -1).relu()
        gathered = torch.zeros(len(x), *message.shape[1:], dtype=x.dtype).index_add_(0, target, message).flatten(1)
        return self.head(x + gathered / degree[:, None])


def graphs(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(4 * size, 5, dtype=torch.float64), torch.randint(4 * size, (2, 7 * size))


def test_graphs_of_any_size_are_searched_and_cut() -> None:
    traced = exact(Edges().double(), graphs)
    batches = [(graphs(size), torch.randint(3, (4 * size,))) for size in (3, 1, 4)]
    plan = ekgfx.search(traced, batches, flops=0.6).plan
    assert traced.subnetwork(plan)(*graphs(6)).shape == (24, 3)


class Flipping(nn.Module):
    """It turns high images over, and those of odd width; the numbers of its channels are its own Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).view(x.shape[0], 4, 2, -1).view(x.shape[0], 8, *x.shape[2:])
        if x.shape[2] >= 8 or x.shape[3] % 2:
            x = x.flip(2)
        return self.down(x)


class Halving(nn.Module):
    """One block for images of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Flipping()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).mean((2, 3)) - self.block(x[:, :, ::2]).mean((2, 3)) + self.block(x)[:, :, 0, 0]


def images(height: int, width: int, batch: int = 2) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, height, width, dtype=torch.float64),)


def halved(model: nn.Module, *example: Tensor, also: Sequence[Any] = ()) -> tuple[nn.Module, nn.Module]:
    """The first half of every group, cut, and the same with zeros in place of the rest."""
    traced = ekgfx.trace(model.double(), *example, also=also)
    plan = ekgfx.Plan({name: tuple(range(group.size // 2)) for name, group in traced.groups.items()})
    return ekgfx.prune(traced.model, plan, traced), zeroed(traced, plan)


def test_sizes_that_go_another_way_are_refused() -> None:
    """Silently they would get the example's: no image would be turned over."""
    with pytest.warns(
        EkgfxWarning, match=r"it goes the example's way, where x\.shape\[2\] < 8 and \(x\.shape\[3\] % 2\) == 0"
    ):
        pruned, twin = halved(Flipping(), *images(6, 6))
    for taken in (images(6, 6, 5), images(7, 4), images(3, 10)):
        assert distance(pruned, twin, taken) < 1e-12
    for refused in (images(8, 6), images(12, 12), images(6, 5)):
        with pytest.raises(NotImplementedError, match=r"for x\.shape\[2\] < 8, .*: trace with .*\(also=\)"):
            pruned(*refused)


def test_further_examples_show_further_ways() -> None:
    pruned, twin = halved(Flipping(), *images(6, 6), also=[images(12, 12), images(6, 5)])
    for taken in (images(6, 6, 5), images(8, 4), images(9, 9), images(4, 7)):
        assert distance(pruned, twin, taken) < 1e-12


def test_a_module_that_is_called_for_two_sizes_goes_two_ways() -> None:
    pruned, twin = halved(Halving(), *images(12, 6))
    assert [replacement.module for replacement in ekgfx.replaced(pruned)] == ["block"]
    for taken in (images(12, 6), images(8, 4, 3), images(14, 10)):
        assert distance(pruned, twin, taken) < 1e-12
    with pytest.raises(NotImplementedError, match="ekgfx replaced the forward of block"):
        pruned(*images(12, 5))


def test_a_product_of_sizes_follows_a_tensor_that_has_a_part_of_it() -> None:
    pruned, twin = halved(Attending(), *images(6, 6))
    assert [replacement.sizes for replacement in ekgfx.replaced(pruned)] == ["any"]
    for taken in (images(6, 6, 5), images(9, 14), images(4, 12, 3)):
        assert distance(pruned, twin, taken) < 1e-12


class Positions(nn.Module):
    """Tokens of 6 features with positions that are held for 4 tokens, and made anew by `anew` for another number."""

    def __init__(self, anew: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.anew, self.up, self.down = anew, nn.Linear(6, 8), nn.Linear(8, 5)
        self.register_buffer("held", by_width(torch.empty(1, 8), 4))

    def forward(self, x: Tensor) -> Tensor:
        held = self.held if x.shape[1] == self.held.shape[0] else self.anew(self.held, x.shape[1])
        return self.down((self.up(x) + held).relu())


def by_width(held: Tensor, tokens: int) -> Tensor:
    places, waves = torch.arange(tokens, dtype=torch.float64), torch.arange(held.shape[1], dtype=torch.float64)
    return (places[:, None] / 10 ** (waves / held.shape[1])).sin()


def stretched(held: Tensor, tokens: int) -> Tensor:
    return F.interpolate(held.T[None], tokens, mode="linear")[0].T


def by_place(held: Tensor, tokens: int) -> Tensor:
    return torch.arange(tokens, dtype=torch.float64)[:, None] * held.mean(0)


def test_what_is_made_by_a_width_at_another_size_is_said() -> None:
    """Without the call that the warning names, the cut model is another one there; with it, it is exact there."""
    model, larger = Positions(by_width).double(), torch.randn(2, 8, 6, dtype=torch.float64)
    with pytest.warns(
        EkgfxWarning, match=r"another size Positions makes numbers \(arange\) .*: once up is cut"
    ) as said:
        traced = ekgfx.trace(model, entries(2))
    assert re.findall(r"once (.*) is cut.*also=\[(.*?)\]\)", str(said[0].message)) == [("up", "torch.randn(2, 8, 6)")]
    plan = ekgfx.Plan(dict.fromkeys(traced.groups, (0, 1, 2, 3)))
    without = ekgfx.prune(model, plan, traced)
    assert distance(without, zeroed(traced, plan), (larger,)) > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error", EkgfxWarning)
        assert len(ekgfx.trace(model, entries(2), also=[larger]).groups) == 0


@pytest.mark.parametrize("anew", [stretched, by_place])
def test_what_follows_from_tensors_and_sizes_at_another_size_is_not_said(
    anew: Callable[[Tensor, int], Tensor], recwarn: pytest.WarningsRecorder
) -> None:
    exact(Positions(anew).double(), lambda batch: (torch.randn(batch, 4, 6, dtype=torch.float64),), plans=1)
    assert not [w for w in recwarn if "another size" in str(w.message)]
