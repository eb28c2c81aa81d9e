"""Tensors in nested values of any class: all are found, and a value with others is of the same class."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ekgfx
from ekgfx.base.containers import Frame, atoms, mapped, tensors_by_place
from tests.support.zeroed import exact

Pair = namedtuple("Pair", "first second")


class Named(OrderedDict):
    """An output class of a model library, which PyTorch does not know."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class Registered(OrderedDict):
    """One that it knows, without names for its parts."""


pytree.register_pytree_node(
    Registered,
    lambda o: (list(o.values()), list(o)),
    lambda values, keys: Registered(zip(keys, values, strict=True)),
    serialized_type_name="tests.Registered",
)


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    extra: Any = None


class Cache:
    def __init__(self, *tensors: Tensor) -> None:
        self.tensors, self.length = list(tensors), len(tensors)


class Looking(namedtuple("Looking", "first second")):
    """Looks at what it is made of, as PyTorch's own packed sequences do."""

    def __new__(cls, first: Tensor, second: Any) -> "Looking":
        return super().__new__(cls, first.detach(), second)


a, b = torch.zeros(2), torch.ones(3)


@pytest.mark.parametrize(
    ("value", "places"),
    [
        (a, [""]),
        ([a, (b, None)], ["0", "1.0"]),
        ({"x": {"y": a}, "n": 3}, ["x.y"]),
        (Pair(a, [b]), ["first", "second.0"]),
        (Looking(a, [b]), ["first", "second.0"]),
        (Named(logits=a, n=1), ["logits"]),
        (Registered(sample=a), ["sample"]),
        (Frozen(a, {"k": b}), ["logits", "extra.k"]),
        ({"cache": Cache(a, b)}, ["cache.tensors.0", "cache.tensors.1"]),
        ({"a.b": a, "a": {"b": b}}, ["a.b", "a.b"]),
        (torch.Size([2]), []),
        ("text", []),
    ],
)
def test_places_and_the_way_back(value: Any, places: list[str]) -> None:
    frame, tensors = Frame.of(value)
    assert list(frame.places) == places
    again = frame.filled([tensor + 1 for tensor in tensors])
    assert type(again) is type(value)
    assert [t.tolist() for t in Frame.of(again)[1]] == [(t + 1).tolist() for t in tensors]
    assert [t.tolist() for t in Frame.of(value)[1]] == [t.tolist() for t in tensors]  # which is left as it was


def test_what_holds_no_tensor_stays_the_same_object() -> None:
    settings = {"sizes": [1, 2], "name": "x"}
    value = {"settings": settings, "x": a}
    again = mapped(value, lambda place, tensor: tensor * 2)
    assert again["settings"] is settings and again is not value


def test_a_value_that_holds_itself_ends() -> None:
    cache = Cache(a)
    cache.again = cache  # type: ignore[attr-defined]
    assert list(tensors_by_place(cache)) == ["tensors.0"]
    assert {type(atom) for atom in atoms((torch.float32, [], {"k": 1}))} == {torch.dtype, int}


def test_a_size_that_an_exporter_follows_has_no_parts() -> None:
    """It holds the exporter's own state, with tensors of which the value knows nothing."""
    found = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found.append(tensors_by_place({"image": Cache(x), "sizes": [x.shape[0]]}))
            return x + 1

    dynamic = {"x": {0: torch.export.Dim("batch")}}
    torch.export.export(Net(), (torch.zeros(2, 3),), dynamic_shapes=dynamic, strict=False)
    assert [list(each) for each in found] == [["image.tensors.0"]] * len(found) and found


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x).relu()
        return Registered(pooled=y.mean((2, 3)), sample=y)


class Outer(nn.Module):
    """Its view makes another forward for it necessary, which takes apart what the inner one returns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Inner(), nn.Linear(6 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Any:
        found = self.inner(x)
        return Registered(logits=self.head(found["sample"].view(-1, 6 * 4 * 4)), pooled=found["pooled"].sum(1))


def test_a_container_that_is_registered_without_ways_to_its_parts_passes_through_a_written_forward() -> None:
    model = Outer().double()
    traced = exact(model, lambda batch: (torch.randn(batch, 3, 6, 6, dtype=torch.float64),), plans=1)
    pruned = ekgfx.prune(model, ekgfx.Plan({"inner.conv": (0, 3)}), traced, graphs="allow")
    assert [each.kind for each in ekgfx.replaced(pruned)] == ["Outer"]
    assert list(pruned(torch.randn(2, 3, 6, 6, dtype=torch.float64))) == ["logits", "pooled"]
