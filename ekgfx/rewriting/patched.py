"""A module whose forward alone was replaced: the same object, of a class made for it.

The class derives from the user's, and bears its name: `isinstance` holds, attributes, methods, hooks and submodules are
untouched. It can be copied and pickled, since it is made again from the user's class and the forward's source.
"""

import copyreg
import inspect
import itertools
import linecache
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ekgfx.base.containers import tensors_in
from ekgfx.rewriting.sized import sized


@dataclass(frozen=True)
class Replacement:
    """A module of a pruned model whose forward was replaced.

    Attributes:
        module: its qualified name, "" for the model itself.
        kind: the name of its class.
        reason: what its own Python could not express.
        sizes: which sizes of the inputs it takes: "any" that its own Python takes, any "batch", or the "example" alone.
        source: the forward that it has now.
    """

    module: str
    kind: str
    reason: str
    sizes: str
    source: str

    def __str__(self) -> str:
        limits = {
            "any": "",
            "batch": ", for the example's sizes, any batch",
            "example": ", for the example's sizes only",
        }
        return f"{self.module or 'the model'} ({self.kind}{limits[self.sizes]}): {self.reason}"


@dataclass(frozen=True)
class Forward:
    """The source of a forward, objects that it names, and why it stands in place of the user's."""

    source: str
    objects: tuple[tuple[str, Any], ...]
    reason: str
    sizes: str


def replaced(model: nn.Module) -> list[Replacement]:
    """The modules of a pruned model whose forward was replaced, since their own Python could not express the cut.

    Args:
        model: what `prune` returned, or any module.

    Returns:
        One entry for each such module, in the order of `named_modules`; none where every forward is the user's own.

    Example:
        >>> for replacement in ekgfx.replaced(pruned):
        ...     print(replacement)
    """
    return [
        Replacement(name, type(module).__name__, forward.reason, forward.sizes, forward.source)
        for name, module in model.named_modules()
        if (forward := forward_of(module)) is not None
    ]


def forward_of(module: nn.Module) -> Forward | None:
    """The forward that was given to a module, None where it has its own."""
    return getattr(type(module), "_ekgfx_forward", None)


def put_forward(module: nn.Module, forward: Forward | None) -> None:
    """Replace a module's forward in place, or give it its own again."""
    base = type(module) if forward_of(module) is None else type(module).__bases__[0]
    module.__class__ = base if forward is None else _class(base, forward)


def name_space(forward: Forward) -> dict[str, Any]:
    """What the source of a forward can name."""
    known = {"torch": torch, "operator": operator, "math": math, "pytree": pytree, "tensors_in": tensors_in}
    return {**known, "sized": sized, **dict(forward.objects)}


_numbers = itertools.count()


def _class(base: Any, forward: Forward) -> type:
    file = f"<forward of {base.__qualname__} replaced by ekgfx, {next(_numbers)}>"
    space = {**name_space(forward), "own_forward": base.forward}
    linecache.cache[file] = (len(forward.source), None, forward.source.splitlines(True), file)
    exec(compile(forward.source, file, "exec"), space)  # our own code, made from the exported graph
    function = space["forward"]
    given = inspect.signature(base.forward).parameters.values()  # of the function that decorators may have wrapped
    defaults = [p for p in given if p.default is not p.empty]
    function.__defaults__ = tuple(p.default for p in defaults if p.kind is not p.KEYWORD_ONLY)
    function.__kwdefaults__ = {p.name: p.default for p in defaults if p.kind is p.KEYWORD_ONLY}
    function.__module__, function.__qualname__ = base.__module__, f"{base.__qualname__}.forward"
    members: Mapping[str, Any] = {
        "forward": function,
        "_ekgfx_forward": forward,
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (base,), dict(members))


def _reduce(module: Any, protocol: Any) -> Any:
    base, forward = type(module).__bases__[0], type(module)._ekgfx_forward
    reduced = super(type(module), module).__reduce_ex__(protocol)
    if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return reduced
    return (_revive, (base, forward, *reduced[1][1:]), *reduced[2:])


def _revive(base: type, forward: Forward, *arguments: Any) -> Any:
    made = _class(base, forward)
    return made.__new__(made, *arguments)
