"""Marks in an exported graph: where the forward of a module begins and ends, with the values that pass there.

A mark is an operator that takes the tensors and the integers. What it cannot hold, other values and how all of them are
nested, is recorded beside it.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ekgfx.base.containers import Frame
from ekgfx.graph.opaque import wrapped_forwards


@torch.library.custom_op("ekgfx::mark", mutates_args=())
def mark(tensors: list[Tensor], sizes: list[int], module: str, begins: bool) -> list[Tensor]:
    """The values with which a module's forward begins, or which it returns."""
    raise NotImplementedError("marks are in exported graphs only")


@mark.register_fake
def _(tensors: list[Tensor], sizes: list[int], module: str, begins: bool) -> list[Tensor]:
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors]


MARK = torch.ops.ekgfx.mark.default
fx.node.has_side_effect(MARK)  # a call is kept whose result nobody reads: it may change what it is given


@dataclass(frozen=True)
class Held:
    """A value of a class that PyTorch does not know as a container, with the nodes of the tensors in it."""

    frame: Frame
    nodes: tuple[Any, ...]


@dataclass(frozen=True)
class Values:
    """Nested containers as they were passed: tensors and integers as nodes (or constants), other values that hold
    tensors as `Held`, anything else as it is."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @property
    def flat(self) -> list[Any]:
        """The leaves, with what is held by some of them in their place."""
        return [each for leaf in self.leaves for each in (leaf.nodes if isinstance(leaf, Held) else (leaf,))]

    @property
    def paths(self) -> list[pytree.KeyPath]:
        """Where in the containers each leaf is."""
        return list(_paths(pytree.tree_unflatten(self.leaves, self.spec)))


def _paths(value: Any, above: pytree.KeyPath = ()) -> Iterator[pytree.KeyPath]:
    """The way to every leaf of nested containers."""
    parts = pytree.tree_leaves(value, is_leaf=lambda part: part is not value)
    if len(parts) == 1 and parts[0] is value:
        yield above
    else:
        for key, part in zip(_keys(value, parts), parts, strict=True):
            yield from _paths(part, (*above, key))


def _keys(value: Any, parts: Sequence[Any]) -> Sequence[Any]:
    """How the parts of one container are reached; diffusers registers its outputs without saying so."""
    if isinstance(value, Mapping) and list(map(id, value.values())) == list(map(id, parts)):
        return [pytree.MappingKey(key) for key in value]
    return [path[0] for path, _ in pytree.tree_flatten_with_path(value, is_leaf=lambda part: part is not value)[0]]


@contextlib.contextmanager
def marked(model: nn.Module, recorded: list[Any], running: list[str]) -> Iterator[None]:
    """While this is open, every forward begins and ends with a mark; `recorded` gets what marks cannot hold. running:
    the modules whose forward runs, the innermost last."""

    def around(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def marking(*args: Any, **kwargs: Any) -> Any:
            if not path:
                recorded.clear()  # the exporter may run the model more than once
            args, kwargs = note(path, True, (args, kwargs))
            running.append(path)
            try:
                result = forward(*args, **kwargs)
            finally:
                running.pop()
            return note(path, False, result)

        return marking

    def note(path: str, begins: bool, value: Any) -> Any:
        leaves, spec = pytree.tree_flatten(value)
        frames = {id(leaf): Frame.of(leaf) for leaf in leaves if not isinstance(leaf, _KNOWN)}
        inside = [tensor for _, held in frames.values() for tensor in held]
        given = [*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *inside]
        tensors = {id(tensor): tensor for tensor in given}  # what is the same stays the same
        sizes = [leaf for leaf in leaves if _is_size(leaf)]
        made = dict(zip(tensors, torch.ops.ekgfx.mark([*tensors.values()], sizes, path, begins), strict=True))
        numbers, places = {key: i for i, key in enumerate(tensors)}, itertools.count()
        kinds: list[Any] = []
        passed: list[Any] = []
        for leaf in leaves:
            frame, held = frames.get(id(leaf), (None, []))
            if frame is not None and held:
                kinds.append(Held(frame, tuple(_Tensor(numbers[id(tensor)]) for tensor in held)))
                passed.append(frame.filled([made[id(tensor)] for tensor in held]))
            else:
                size = _Size(next(places)) if _is_size(leaf) else leaf
                kinds.append(_Tensor(numbers[id(leaf)]) if isinstance(leaf, Tensor) else size)
                passed.append(made.get(id(leaf), leaf))
        recorded.append((path, begins, kinds, spec))
        return pytree.tree_unflatten(passed, spec)

    not_run = torch.jit.ScriptModule | nn.ModuleList | nn.ModuleDict
    paths = [path for path, module in model.named_modules() if not isinstance(module, not_run)]
    with wrapped_forwards(model, paths, around):
        yield


@dataclass(frozen=True)
class _Tensor:
    """Stands for the tensor of that number in a mark."""

    number: int


@dataclass(frozen=True)
class _Size:
    """Stands for the integer of that number in a mark."""

    number: int


_KNOWN = (Tensor, int, float, complex, str, bytes, torch.SymInt, torch.SymFloat, torch.SymBool, type(None))


def _is_size(value: Any) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def filled(kinds: list[Any], tensors: Sequence[Any], sizes: Any) -> Iterator[Any]:
    """The values of a mark as they were recorded, with these tensors and integers in them."""
    for kind in kinds:
        if isinstance(kind, Held):
            yield Held(kind.frame, tuple(filled(list(kind.nodes), tensors, sizes)))
        elif isinstance(kind, _Tensor):
            yield tensors[kind.number]
        else:
            yield sizes[kind.number] if isinstance(kind, _Size) else kind
