"""Leave a model as it was: what its forward keeps of a call (caches, attention maps, counters) is put back.

Whoever runs or exports a user's model does so under `untouched`. An export runs the forward on tensors without values;
one of them left behind in a cache breaks the model, and even a real one makes it another model than the user gave.
"""

import contextlib
import functools
import operator
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy, deepcopy
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, dict[str, Any]]
"""Module → its attributes, without parameters, buffers, sub-modules and hooks."""

_CONTAINERS = (dict, list, set, deque, bytearray)
_NUMBERS = (int, float, complex, str, bytes, bool, type(None))
_FIXED = (*_NUMBERS, type, types.ModuleType, Enum)
_OTHERS = {"torch", "logging", "threading", "multiprocessing", "concurrent", "asyncio", "weakref", "importlib"}
"""Libraries whose objects are theirs, not the model's."""
_FAR = 4
_STANDARD = frozenset(vars(nn.Module()))
_MISSING = object()


@contextlib.contextmanager
def untouched(model: nn.Module | Callable[..., Any]) -> Iterator[None]:
    """Whatever runs in here, afterwards the model (or a loss) holds what it held before.

    Put back are the attributes of every module, tensors by identity and value (parameters: by identity and storage),
    the contents of containers and of objects that modules hold, and of the containers that hooks and methods know by
    name (a list to which a hook appends). What lies elsewhere, in a file or in a library's own memory, is not seen.
    """
    holders, tensors = _reachable(model)
    held = [(holder, _contents(holder)) for holder in holders]
    values = [(tensor, tensor.data, _value(tensor) if whole else None) for tensor, whole in tensors]
    try:
        yield
    finally:
        for holder, before in held:
            _put_back(holder, before)
        for tensor, data, value in values:
            if _strided(tensor) and not _same_storage(tensor, data):
                tensor.data = data
            if value is not None and not torch.equal(data, value):
                data.copy_(value)


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy also of a model that keeps what an earlier forward computed, which PyTorch cannot copy with its
    history: it is copied without."""
    memo = {} if memo is None else memo
    for tensor, _ in _reachable(model)[1]:
        if tensor.grad_fn is not None:
            memo.setdefault(id(tensor), tensor.detach().clone())
    return deepcopy(model, memo)


def state_of(model: nn.Module) -> State:
    """What every module holds beside parameters, buffers and sub-modules; containers are copied, tensors are not."""
    return {
        name: {key: _copied(value) for key, value in vars(module).items() if key not in _STANDARD}
        for name, module in model.named_modules()
    }


def differing(now: State, then: State) -> State:
    """What of `then` the state `now` lacks or has otherwise: numbers by value, tensors by shape and type, containers
    element by element. Attributes that only `now` has are named as missing."""
    found: State = {}
    for name in now.keys() & then.keys():
        for key in now[name].keys() | then[name].keys():
            old, new = then[name].get(key, _MISSING), now[name].get(key, _MISSING)
            if not _alike(old, new):
                found.setdefault(name, {})[key] = old
    return found


def put(model: nn.Module, state: State) -> None:
    """Give the modules these attributes, and take from them those that are missing."""
    for name, attributes in state.items():
        own = vars(model.get_submodule(name))
        for key, value in attributes.items():
            if value is _MISSING:
                own.pop(key, None)
            else:
                own[key] = _copied(value)


def _copied(value: Any) -> Any:
    return copy(value) if type(value) in _CONTAINERS else value


def _alike(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | deque) and isinstance(b, list | tuple | deque):
        return len(a) == len(b) and all(map(_alike, a, b))
    known = (*_NUMBERS, Tensor, Mapping, list, tuple, deque)
    if a is _MISSING or b is _MISSING or isinstance(a, known) != isinstance(b, known):
        return False
    return bool(a == b) if isinstance(a, _NUMBERS) and isinstance(b, _NUMBERS) else not isinstance(a, known)


def _reachable(model: nn.Module | Callable[..., Any]) -> tuple[list[Any], list[tuple[Tensor, bool]]]:
    """The containers (with the dictionaries of attributes) and tensors that a model can change; of the tensors, whether
    their values count as the model's: those of its modules, and of objects that modules hold themselves."""
    holders: list[Any] = []
    tensors: list[tuple[Tensor, bool]] = []
    seen: dict[int, Any] = {}  # also keeps what is met alive, so that no other object gets its id
    classes: set[type] = set()
    waiting: list[tuple[Any, int]] = [(model, 0)]  # with the objects and functions between it and its module
    while waiting:
        value, depth = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        following: list[Any] = []
        if isinstance(value, Tensor):
            tensors.append((value, depth <= 1 and not isinstance(value, nn.Parameter)))
        elif isinstance(value, nn.Module):
            depth = 0
            following = [vars(value)]
            if type(value) not in classes:  # what the methods know is the same for all modules of a class
                classes.add(type(value))
                own = [kind for kind in type(value).__mro__ if kind.__module__.partition(".")[0] not in _OTHERS]
                following += [m for kind in own for m in vars(kind).values() if isinstance(m, types.FunctionType)]
        elif isinstance(value, dict):
            holders.append(value)
            following = [held for _, held in _items(value)]
        elif isinstance(value, _CONTAINERS):
            holders.append(value)
            following = [] if isinstance(value, bytearray) else list(value)
        elif isinstance(value, np.ndarray):
            holders.append(value)
        elif isinstance(value, tuple | frozenset):
            following = list(value)
        else:
            depth += 1
            following = _known_to(value) if depth <= _FAR else []
        waiting += [(each, depth) for each in following if not isinstance(each, _FIXED)]
    return holders, tensors


def _known_to(value: Any) -> list[Any]:
    """What an object holds, or a function knows: its closure, and the containers that it calls by a global name."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    home = value.__module__ if isinstance(value, types.FunctionType) else type(value).__module__
    if str(home).partition(".")[0] in _OTHERS:
        return []
    if isinstance(value, types.FunctionType):
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        cells = []
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                cells.append(cell.cell_contents)
        return cells + [each for each in named if isinstance(each, _CONTAINERS)]
    attributes = getattr(value, "__dict__", None)
    return [attributes] if type(attributes) is dict else []


def _contents(holder: Any) -> Any:
    if isinstance(holder, np.ndarray):
        return holder.copy()
    if isinstance(holder, dict):
        return dict(_items(holder))
    for kind in (set, bytearray):
        if isinstance(holder, kind):
            return kind(holder)  # type: ignore[arg-type]
    return list(holder)


def _plain(holder: dict[Any, Any]) -> type[dict[Any, Any]]:
    """The class whose methods see what a dictionary holds: one that a user derived may make something of it when it is
    asked, as a registry that calls what stands in it."""
    return OrderedDict if isinstance(holder, OrderedDict) else dict


def _items(holder: dict[Any, Any]) -> list[tuple[Any, Any]]:
    return list(_plain(holder).items(holder))


def _put_back(holder: Any, before: Any) -> None:
    """Give a container its old contents again; one that has not changed is not written to."""
    if isinstance(holder, np.ndarray):
        if holder.tobytes() != before.tobytes():
            holder[...] = before
    elif isinstance(holder, dict):
        now = _items(holder)
        if not _identical([part for pair in now for part in pair], [part for pair in before.items() for part in pair]):
            kind = _plain(holder)
            kind.clear(holder)
            for key, value in before.items():
                kind.__setitem__(holder, key, value)
    elif isinstance(holder, set):
        if {*map(id, holder)} != {*map(id, before)}:
            holder.clear()
            holder.update(before)
    elif isinstance(holder, bytearray):
        holder[:] = before
    elif not _identical(holder, before):
        holder.clear()
        holder.extend(before)


def _identical(a: Collection[Any], b: Collection[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _value(tensor: Tensor) -> Tensor | None:
    """A copy of a tensor's values; None where it has none, or nothing outside inference mode may change them."""
    return tensor.detach().clone() if _strided(tensor) and not tensor.is_inference() else None


def _strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _same_storage(tensor: Tensor, data: Tensor) -> bool:
    return tensor.shape == data.shape and tensor.stride() == data.stride() and tensor.data_ptr() == data.data_ptr()
