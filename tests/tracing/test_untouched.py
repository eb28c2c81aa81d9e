"""A forward may keep things: caches, attention maps, counters, lists. What we run leaves them as the user had them."""

import copy
import functools
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ekgfx
from ekgfx import export
from ekgfx.graph.untouched import untouched
from ekgfx.surgery.check import perturb

SEEN: list[Tensor] = []
PLAN = ekgfx.Plan({"a": (0, 3, 4, 7, 9)})


class Base(nn.Module):
    """Two convolutions and a head; subclasses say what is kept of the features between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.keep(self.a(x).relu())).relu().mean((2, 3)))


class NewAttribute(Base):
    def keep(self, y: Tensor) -> Tensor:
        self.shown = y
        return y


class DeclaredAttribute(Base):
    shown = None

    def __init__(self) -> None:
        super().__init__()
        self.last, self.calls = None, 0

    def keep(self, y: Tensor) -> Tensor:
        self.last = {"map": y.mean(1), "sizes": [y.shape[-1]]}
        self.calls += 1
        return y


class Collections(Base):
    def __init__(self) -> None:
        super().__init__()
        self.maps, self.named, self.sizes = [], OrderedDict(), set()
        self.window, self.nested, self.counts = deque(maxlen=2), {"inner": [[], {}]}, np.zeros(2)
        self.holder = SimpleNamespace(best=None, all=[], total=torch.zeros(1))

    def keep(self, y: Tensor) -> Tensor:
        self.maps.append(y)
        self.named[f"{len(self.named)}"] = y.mean()
        self.sizes.add(len(self.sizes))
        self.window.append(y)
        self.nested["inner"][0].append(y)
        self.nested["inner"][1]["y"] = y
        self.counts[1] += 1
        self.holder.best = y
        self.holder.all.append(y)
        SEEN.append(y)
        return y


class Counter(Base):
    """Two buffers that are written to, one in place and one anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def keep(self, y: Tensor) -> Tensor:
        self.steps.add_(1)
        self.scale = self.scale * 2
        return y


class Grid(Base):
    """Made anew when the size is another; read by the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.size = None

    def keep(self, y: Tensor) -> Tensor:
        if self.size != y.shape[-2:]:
            self.size, self.grid = y.shape[-2:], torch.linspace(0, 1, y.shape[-1], dtype=y.dtype)
        return y + self.grid


class Anchors(Base):
    """As detectors do: per shape, batch included, and with a number that is read from a tensor, which has no graph."""

    anchors, shape = torch.empty(0), None

    def __init__(self) -> None:
        super().__init__()
        self.strides = torch.tensor([8.0, 16.0])

    def keep(self, y: Tensor) -> Tensor:
        if self.shape != y.shape[:1] + y.shape[2:]:
            self.anchors = torch.cat([y.new_full((1, y.shape[-1]), self.strides[i]) for i in range(2)]).mean(0)
            self.shape = y.shape[:1] + y.shape[2:]
        return y + self.anchors.to(y.dtype)


KINDS = [NewAttribute, DeclaredAttribute, Collections, Counter, Grid, Anchors]


def images(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)).double()


def build(kind: type[Base], warm: bool) -> Base:
    torch.manual_seed(0)
    model = kind().double().eval()
    perturb(model)
    if warm:  # with gradients, as a user's loop leaves it; of another size than what is traced
        model(images(3, 6))
    return model


def held(model: nn.Module) -> list[Any]:
    """Everything in the modules' attributes, tensors by identity and value."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value.detach().flatten().tolist()
        if isinstance(value, SimpleNamespace):
            return id(value), pytree.tree_map(plain, vars(value))
        if isinstance(value, dict | list | set | deque):
            inner = list(value.items()) if isinstance(value, dict) else list(value)
            return id(value), [plain(item) for item in inner]
        return tuple(map(plain, value)) if isinstance(value, tuple) else str(value)

    ours = {"_forward_hooks", "_forward_pre_hooks"}
    return [{key: plain(v) for key, v in vars(m).items() if key not in ours | {"_modules"}} for m in model.modules()]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_trace_and_prune_leave_what_a_forward_keeps(kind: type[Base], warm: bool) -> None:
    SEEN.clear()
    model, twin = build(kind, warm), build(kind, warm)
    before, seen = held(model), [*SEEN]
    traced = ekgfx.trace(model, images())
    assert held(model) == before
    pruned = ekgfx.prune(model, PLAN, traced)
    assert held(model) == before
    assert [*map(id, SEEN)] == [*map(id, seen)]
    assert type(pruned) is kind and not [m for m in pruned.modules() if isinstance(m, torch.fx.GraphModule)]
    for module, original in ((pruned, model), (ekgfx.prune(twin, PLAN, traced), twin)):
        assert vars(module).keys() - {"_ekgfx_plans"} == vars(original).keys()
    for batch, size in ((2, 8), (4, 12)):
        with torch.no_grad():
            assert torch.equal(model(images(batch, size)), twin(images(batch, size)))
            expected = ekgfx.trace(model, images(batch, size)).subnetwork(PLAN)(images(batch, size))
            assert torch.allclose(pruned(images(batch, size)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [Grid, Anchors])
def test_caches_that_are_filled_between_tracing_and_pruning(kind: type[Base]) -> None:
    """The graph was traced in another state of the caches than that in which the cut module is looked at."""
    for first, second in ((None, (2, 8)), (None, (3, 12)), ((2, 8), (3, 12)), ((3, 12), (2, 8))):
        model = build(kind, False)
        if first:
            model(images(*first))
        traced = ekgfx.trace(model, images())
        model(images(*second))
        pruned = ekgfx.prune(model, PLAN, traced)
        assert type(pruned) is kind
        with torch.no_grad():
            assert torch.allclose(pruned(images(5)), traced.subnetwork(PLAN)(images(5)), rtol=0, atol=1e-10)


def test_containers_and_objects_stay_the_same_ones_under_all_their_names() -> None:
    model = build(Collections, False)
    alias, holder = model.maps, model.holder.all
    ekgfx.prune(model, PLAN, example_inputs=images())
    model(images())
    assert alias is model.maps and len(alias) == 1
    assert holder is model.holder.all and len(holder) == 1


def test_what_hooks_collect_is_put_back() -> None:
    model, closure, by_method, partial = build(Grid, False), {}, SimpleNamespace(outputs=[]), []

    class Recorder:
        def __init__(self) -> None:
            self.outputs: list[Tensor] = []

        def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.outputs.append(output)

    recorder = Recorder()
    model.a.register_forward_hook(lambda module, args, output: closure.update(a=output))
    model.b.register_forward_hook(recorder.note)
    model.head.register_forward_pre_hook(functools.partial(lambda kept, module, args: kept.append(args), partial))
    model.head.register_forward_hook(lambda module, args, output: SEEN.append(output))
    SEEN.clear()
    ekgfx.prune(model, PLAN, example_inputs=images())
    assert (closure, recorder.outputs, by_method.outputs, partial, SEEN) == ({}, [], [], [], [])
    model(images())
    assert len(closure) == len(recorder.outputs) == len(partial) == len(SEEN) == 1
    SEEN.clear()


def test_a_leaf_that_counts_is_left_as_it_was() -> None:
    class Leafed(Base):
        def __init__(self) -> None:
            super().__init__()
            self.count = Counting()

        def keep(self, y: Tensor) -> Tensor:
            return self.count(y)

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.maps, self.plain = 0, [], torch.zeros(3)
            self.register_buffer("total", torch.zeros(()))

        def forward(self, y: Tensor) -> Tensor:
            self.calls += 1
            self.plain[0] += 1
            self.maps.append(y)
            self.total += 1
            return y * 2 if y.sum() > 0 else y

    model = build(Leafed, False)
    before = held(model)
    traced = ekgfx.trace(model, images(), leaf=["count"])
    with torch.no_grad():
        assert torch.equal(traced.subnetwork()(images(4)), copy.deepcopy(model)(images(4)))
    assert held(model) == before


def test_a_model_is_put_back_also_when_it_cannot_be_traced() -> None:
    class Untraceable(Collections):
        def keep(self, y: Tensor) -> Tensor:
            super().keep(y)
            return y * 2 if y.sum() > 0 else y

    model = build(Untraceable, False)
    before = held(model)
    with pytest.raises(ekgfx.EkgfxError, match="depends on values"):
        ekgfx.trace(model, images())
    assert held(model) == before


def test_parameters_that_a_forward_sets_are_put_back() -> None:
    model = build(Grid, False)
    weight, data = model.a.weight, model.a.weight.data_ptr()
    value = weight.detach().clone()
    with untouched(model):
        model.a.weight.data = model.a.weight.data.renorm(2, 0, 0.1)
        model.b.weight = nn.Parameter(torch.zeros(6, 10, 3, 3))
    assert model.a.weight is weight and weight.data_ptr() == data and torch.equal(weight, value)
    assert model.b.weight.abs().max() > 0


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_cache_per_batch_size_does_not_fix_that_of_an_onnx_file(warm: bool, tmp_path) -> None:
    model = build(Grid, False).float()
    model.keep = functools.partial(Anchors.keep, model)
    model.shape, model.strides = None, [8.0, 16.0]
    if warm:
        model(images().float())
    before = held(model)
    file = export.to_onnx(model, images().float(), tmp_path / "net.onnx")
    assert {1, 4} <= {*export.check_parity(model, file, images(4).float()).batches}
    assert held(model) == before


class Yolov5(nn.Module):
    """A buffer of anchors, and a grid that is made of it once per image size and is no part of the state."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 4, 1)
        self.register_buffer("anchors", torch.arange(1.0, 5.0) * scale)
        self.grid = [torch.empty(0)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        if self.grid[0].shape[-2:] != y.shape[-2:]:
            self.grid[0] = self.anchors.view(1, -1, 1, 1).expand(-1, -1, *y.shape[-2:]).clone()
        return y.sigmoid() * self.grid[0]


def test_a_loaded_model_fills_its_caches_from_the_loaded_weights(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Yolov5(3.0).eval(), images().float()
    pruned = ekgfx.prune(model, PLAN, example_inputs=x)
    ekgfx.save(pruned, tmp_path / "run", plan=PLAN)
    again = ekgfx.load(tmp_path / "run", model=Yolov5, example_inputs=(x,))
    with torch.no_grad():
        assert torch.equal(again(x), pruned(x))


class Registry(OrderedDict):
    """Makes a new one of what stands in it when asked, as a library's table of activations does."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value if isinstance(value, type) else type(value))


ACTIVATIONS = Registry(relu=nn.ReLU, gelu=nn.GELU)


def test_a_registry_keeps_what_stands_in_it() -> None:
    class Named(Base):
        def keep(self, y: Tensor) -> Tensor:
            ACTIVATIONS.move_to_end("relu")
            ACTIVATIONS[f"seen {len(ACTIVATIONS)}"] = nn.ReLU
            return ACTIVATIONS["gelu"](y)

    model, x = Named().eval(), torch.randn(2, 3, 8, 8)
    traced = ekgfx.trace(model, x)
    ekgfx.prune(model, PLAN, traced)
    assert list(OrderedDict.items(ACTIVATIONS)) == [("relu", nn.ReLU), ("gelu", nn.GELU)]
