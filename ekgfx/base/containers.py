"""Tensors in nested values: containers, dataclasses, the output classes of model libraries, and plain objects.

PyTorch's pytrees know only the classes that somebody has registered. A model may return or pass on any others; their
tensors are found in their attributes, and a value with other tensors in their places is a copy of the same class.
"""

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Sizes while a model is exported: they know everything else that the exporter does."""
_PLAIN = (str, bytes, int, float, complex, type(None), type, enum.Enum, nn.Module, *_SYMBOLS)
"""Values without parts; also those whose attributes are nobody's business."""


@dataclass(frozen=True)
class Slot:
    """Stands for tensor number `index`."""

    index: int


@dataclass(frozen=True)
class Frame:
    """A nested value without its tensors. value: with a `Slot` for each; places: their names, such as "aux.0"."""

    value: Any
    places: tuple[str, ...]

    @classmethod
    def of(cls, value: Any, kind: type = Tensor) -> tuple[Self, list[Any]]:
        """The frame of a value, and the tensors (or values of another kind) that were in it."""
        places: list[str] = []
        tensors: list[Any] = []

        def taken(place: str, tensor: Any) -> Slot:
            places.append(place)
            tensors.append(tensor)
            return Slot(len(tensors) - 1)

        return cls(mapped(value, taken, kind), tuple(places)), tensors

    @property
    def plain(self) -> bool:
        """Whether it is made of Python's own tuples, lists, dicts and values alone."""
        return _plain(self.value)

    def filled(self, tensors: Sequence[Any]) -> Any:
        """A value of the same kind with these tensors."""
        return mapped(self.value, lambda _, slot: tensors[slot.index], Slot)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, in order."""
    tensors: list[Tensor] = Frame.of(value)[1]
    return tensors


def tensors_by_place(value: Any) -> dict[str, Tensor]:
    """The tensors in a value by their places: keys, fields and indices, joined by dots; a lone tensor is ""."""
    frame, tensors = Frame.of(value)
    return dict(zip(frame.places, tensors, strict=True))


def mapped(value: Any, change: Callable[[str, Any], Any], kind: type = Tensor) -> Any:
    """The value with `change(place, part)` in place of every part that is a `kind`; what holds none is left as it is,
    the same object."""
    return _mapped(value, change, kind, "", ())


def atoms(value: Any) -> Iterator[Any]:
    """What a value is made of: everything in it that has no parts."""
    names, parts, _ = ([], [], None) if _whole(value) else _opened(value)
    if not names and not isinstance(value, tuple | list | Mapping):
        yield value
    for part in parts:
        yield from atoms(part)


def _plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_plain, value))
    if type(value) is dict:
        return all(map(_plain, value.values()))
    return isinstance(value, (Slot, *_PLAIN)) or not any(True for _ in _opened(value)[0])


def _whole(value: Any) -> bool:
    return isinstance(value, (*_PLAIN, Tensor)) or callable(value)


def _mapped(value: Any, change: Callable[[str, Any], Any], kind: type, place: str, above: tuple[int, ...]) -> Any:
    if isinstance(value, kind):
        return change(place, value)
    if _whole(value) or id(value) in above:
        return value
    names, parts, rebuilt = _opened(value)
    inside = (*above, id(value))
    new = [
        _mapped(part, change, kind, f"{place}.{name}" if place else name, inside)
        for name, part in zip(names, parts, strict=True)
    ]
    return value if all(a is b for a, b in zip(parts, new, strict=True)) else rebuilt(new)


def _opened(value: Any) -> tuple[list[str], list[Any], Callable[[list[Any]], Any]]:
    """The names and values of a value's parts, and what makes a value of its kind of other ones."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        # not by its constructor, which may look at what it is given (`PackedSequence`)
        return list(value._fields), list(value), partial(tuple.__new__, type(value))
    parts, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    if not (len(parts) == 1 and parts[0] is value):
        return _names(value, len(parts)), parts, lambda new: pytree.tree_unflatten(new, spec)
    if isinstance(value, Mapping):
        keys = list(value)

        def with_items(new: list[Any]) -> Any:
            made: Any = copy.copy(value)
            for key, part in zip(keys, new, strict=True):
                made[key] = part
            return made

        return list(map(str, keys)), [value[key] for key in keys], with_items
    if isinstance(value, tuple | list):  # of a class of their own
        return list(map(str, range(len(value)))), list(value), type(value)
    fields = _fields(value)

    def with_fields(new: list[Any]) -> Any:
        made = copy.copy(value)
        for name, part in zip(fields, new, strict=True):
            object.__setattr__(made, name, part)  # also of a frozen dataclass
        return made

    return fields, [getattr(value, name) for name in fields], with_fields


def _names(value: Any, count: int) -> list[str]:
    """What a registered container calls its parts: keys or fields where there are as many, else numbers."""
    if isinstance(value, Mapping):
        known = list(map(str, value))
    else:
        known = list(getattr(type(value), "_fields", ())) or _fields(value)
    return known if len(known) == count else list(map(str, range(count)))


def _fields(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    return list(getattr(value, "__dict__", ()))
