"""Modules without a graph: the error names the line and the way out, and everything around them is pruned exactly."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import PlanError, TraceError
from ekgfx.graph.opaque import find_leaves
from ekgfx.search import search
from ekgfx.surgery.check import check_pruned, perturb
from ekgfx.surgery.masked import check_masked
from tests.search import nets
from tests.support.branching import Branching, Careless, Detector, Router, Selecting

PLAN = {"a": (0, 3, 4, 8), "c": (1, 2, 5, 11, 15)}


def line_of(cls: type[nn.Module], code: str) -> str:
    """file:line of a piece of a class's source."""
    lines, start = inspect.getsourcelines(cls)
    return f"branching.py:{start + next(i for i, line in enumerate(lines) if code in line)}"


@pytest.mark.parametrize(
    ("model", "shape", "line", "advice"),
    [
        (
            Branching(),
            (2, 1, 8, 8),
            line_of(Router, "if x.mean() > 0"),
            "run this Router as it is, with leaf=['router']",
        ),
        (nn.Sequential(Selecting()), (2, 4), line_of(Selecting, "x[x > 0]"), "run this Selecting as it is"),
        (
            Careless(),
            (2, 4),
            line_of(Careless, "x.mean() > 0"),
            "move what has no graph out of Careless into a sub-mod",
        ),
    ],
)
def test_the_error_names_the_line_and_what_to_do(
    model: nn.Module, shape: tuple[int, ...], line: str, advice: str, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(TraceError) as error:
        ekgfx.trace(model, torch.randn(shape))
    assert line in str(error.value)
    assert advice in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == "", "PyTorch's own report must not be printed beside the error"


def test_a_model_that_does_not_run_at_all_is_told_apart() -> None:
    with pytest.raises(TraceError, match=r"Branching does not run on the example inputs: .*branching.py:\d+ `.*stem"):
        ekgfx.trace(Branching(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("leaf", [["router"], ["rout*"], [Router]])
def test_what_is_around_a_leaf_is_pruned_exactly_whatever_way_it_takes(leaf: list) -> None:
    torch.manual_seed(0)
    model = Branching().double().eval()
    perturb(model)
    traced = ekgfx.trace(model, torch.randn(2, 1, 8, 8, dtype=torch.float64), leaf=leaf)
    assert set(traced.groups) == {"a", "c"}
    whole = {place.parameter for place in traced.groups.frozen if place.reason.endswith("a leaf, run as it is")}
    assert {"router.bright.weight", "router.dark.bias", "stem.weight", "b.weight"} <= whole
    pruned = ekgfx.prune(model, ekgfx.Plan(PLAN), traced)
    assert all(type(a) is type(b) for a, b in zip(pruned.modules(), model.modules(), strict=True))
    ways = set()
    model.router.register_forward_hook(lambda module, args, output: ways.add(bool(args[0].mean() > 0)))
    for offset in (-3.0, 3.0):
        x = torch.randn(3, 1, 8, 8, dtype=torch.float64) + offset
        model(x)
        assert check_masked(traced, ekgfx.Plan(PLAN), (x,)) < 1e-12
        assert check_pruned(traced, ekgfx.Plan(PLAN), pruned, (x,)) < 1e-12
        torch.testing.assert_close(traced.subnetwork()(x), model(x))
    assert ways == {True, False}, "the inputs were to take both ways"


def test_a_leaf_finds_as_many_as_there_are() -> None:
    """How many rows it gives, and what it computes for them, follows from values, which a cut changes."""
    torch.manual_seed(0)
    model = Detector().double().eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    traced = ekgfx.trace(model, x, leaf=["finder"])
    plan = ekgfx.Plan({"a": (0, 3, 4, 8)})
    pruned: Any = ekgfx.prune(model, plan, traced)
    assert type(pruned) is Detector and not ekgfx.replaced(pruned)
    other = torch.randn(3, 1, 9, 10, dtype=torch.float64)
    assert {len(pruned(x)), len(pruned(other))}.isdisjoint({len(model(x)), len(model(other))})
    for images in (x, other):
        assert check_masked(traced, plan, (images,)) < 1e-12
        assert check_pruned(traced, plan, pruned, (images,)) < 1e-12


def test_a_leaf_counts_with_what_it_computed_on_the_example() -> None:
    x = torch.zeros(2, 1, 8, 8)
    model = Branching().eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, -0.1)  # the mean is negative: the way of 3 × 3 kernels, twice
    cost = ekgfx.trace(model, x, leaf=["router"]).cost()
    around = 64 * 9 * 8 + 64 * 9 * 8 * 12 + 64 * 12 * 8 + 36 * 9 * 8 * 16 + 16 * 10
    first = 64 * 9 * 8 * 8
    assert cost.macs == around + first + 64 * 8 * 8  # what the first made of it is positive: 1 × 1 kernels
    assert cost.params == sum(p.numel() for p in model.parameters())


def test_a_leaf_is_called_by_a_forward_that_was_replaced() -> None:
    torch.manual_seed(0)
    model = Branching(fixed=True).double().eval()
    traced = ekgfx.trace(model, torch.randn(2, 1, 8, 8, dtype=torch.float64), leaf=["router"])
    pruned = ekgfx.prune(model, ekgfx.Plan(PLAN), traced)
    assert ekgfx.replaced(pruned)
    assert isinstance(pruned.router, Router)
    for offset in (-3.0, 3.0):
        x = torch.randn(5, 1, 8, 8, dtype=torch.float64) + offset
        assert check_pruned(traced, ekgfx.Plan(PLAN), pruned, (x,)) < 1e-12
    pruned.train()(x).sum().backward()
    assert any(p.grad is not None for p in pruned.router.parameters())


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = Branching().train()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    ekgfx.trace(model, torch.randn(2, 1, 8, 8), leaf=[Router])
    with pytest.raises(TraceError):
        ekgfx.trace(nn.Sequential(model, Selecting()), torch.randn(2, 1, 8, 8), leaf=[Router])
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_a_search_and_a_saved_model_keep_their_leaves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    traced = ekgfx.trace(Branching().eval(), torch.randn(2, 1, 8, 8), leaf=["router"])
    result = search(traced, nets.batches(), flops=0.8)
    assert result.plan.leaf == ("router",)
    pruned = ekgfx.prune(traced.model, result.plan, example_inputs=torch.randn(1, 1, 8, 8)).eval()
    ekgfx.save(pruned, tmp_path / "kept", plan=result.plan, example_inputs=(torch.randn(1, 1, 8, 8),))
    loaded = ekgfx.load(tmp_path / "kept", model=Branching)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded(x), pruned(x), rtol=0, atol=0)
    assert ekgfx.Plan.from_json(result.plan.to_json()) == result.plan
    with pytest.raises(PlanError, match="leaf='router' is not a list of names"):
        ekgfx.Plan.from_json(json.dumps({"version": 1, "kept": {}, "leaf": "router"}))


def test_which_modules_are_meant() -> None:
    model = nn.Sequential(Branching(), nn.Sequential(Router(2), nn.Tanh()))
    assert find_leaves(model, ["*router", "1", "1.0"]) == ["0.router", "1"]  # not what is inside a leaf
    assert find_leaves(model, [Router]) == ["0.router", "1.0"]
    with pytest.raises(
        TraceError, match=r"leaf '0.ruoter' matches no sub-module of Sequential; did you mean '0.router'"
    ):
        find_leaves(model, ["0.ruoter"])
    with pytest.raises(TraceError, match=r"leaf 'LSTM' matches no sub-module"):
        find_leaves(model, [nn.LSTM])


class Many(nn.Module):
    """Takes and returns containers, has no parameters, and lets the batch's size alone."""

    def forward(self, pair: list[Tensor], scale: float) -> tuple[Tensor, list[Tensor]]:
        a, b = pair
        return (a * scale, [b, a + b]) if float(a.sum()) > 0 else (b * scale, [a, a + b])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.many = nn.Linear(4, 6), nn.Linear(6, 4), Many()

    def forward(self, x: Tensor) -> Tensor:
        a, (b, c) = self.many([x, self.down(self.up(x).relu())], 2.0)
        return a + b * c


def test_containers_go_in_and_come_out() -> None:
    torch.manual_seed(0)
    model = Pair().double().eval()
    traced = ekgfx.trace(model, torch.randn(2, 4, dtype=torch.float64), leaf="many")
    plan = ekgfx.Plan({"up": (0, 5)})
    pruned = ekgfx.prune(model, plan, traced)
    for sign in (1, -1):
        assert check_pruned(traced, plan, pruned, (sign * torch.rand(3, 4, dtype=torch.float64),)) < 1e-12


class Box:
    """No container that PyTorch knows; its tensors are in its attributes."""

    def __init__(self, content: Tensor) -> None:
        self.content = content


class Sealed:
    """What is in it would go unnoticed."""

    __slots__ = ("content",)

    def __init__(self, content: Tensor) -> None:
        self.content = content


class Boxing(nn.Module):
    def __init__(self, box: type) -> None:
        super().__init__()
        self.box = box

    def forward(self, box: Any) -> Any:
        x = box.content
        return self.box(x * 2 if x.sum() > 0 else x)


class Unboxing(nn.Module):
    """Hands a Box to a leaf, and takes one from it."""

    def __init__(self, box: type = Box) -> None:
        super().__init__()
        self.up, self.boxing, self.down = nn.Linear(4, 6), Boxing(box), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.boxing(Box(x)).content.sum(1, keepdim=True) * self.up(x))


def test_tensors_in_attributes_of_objects_go_through_leaves() -> None:
    torch.manual_seed(0)
    model = Unboxing().double().eval()
    traced = ekgfx.trace(model, torch.randn(2, 4, dtype=torch.float64), leaf=["boxing"])
    plan = ekgfx.Plan({"up": (0, 5)})
    pruned = ekgfx.prune(model, plan, traced)
    for sign in (1, -1):
        x = sign * torch.rand(3, 4, dtype=torch.float64)
        half = model.up(x) * torch.tensor([1, 0, 0, 0, 0, 1])
        want = model.down((2 if sign > 0 else 1) * x.sum(1, keepdim=True) * half)
        assert torch.allclose(pruned(x), want, atol=1e-12)
        assert torch.allclose(traced.subnetwork(plan)(x), want, atol=1e-12)


def test_tensors_that_cannot_be_seen_are_refused_rather_than_frozen() -> None:
    with pytest.raises(TraceError, match=r"^leaf 'boxing' returns a Sealed: use tensors, numbers"):
        ekgfx.trace(Unboxing(Sealed), torch.randn(2, 4), leaf=["boxing"])
