"""What a model computes on its example, in outline: its kernels, the shapes that they make, and who runs them.

Taking an outline costs a run. Comparing two of them says much sooner than tracing anew that a choice of integers is not
the right one; that it is right, only the trace says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ekgfx.graph.axis_graph import Example
from ekgfx.graph.running import running_modules
from ekgfx.graph.ways import Way, undisturbed

PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "linear"))
"""What a linear layer or a product becomes, with its bias or before it, as its inputs lie in memory."""


@dataclass(frozen=True)
class Step:
    """One kernel: its operator, the shapes of what it makes, the floats that it is given, the module that runs it.

    All `PRODUCTS` are one operator, of which only the size is known; what is added right after is part of them.
    """

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    numbers: tuple[float, ...]
    module: str = field(compare=False)


def outline_of(model: nn.Module, way: Way, example: Example) -> list[Step] | None:
    """Of a module that runs in a way; None where it raises. Nothing of it is changed afterwards."""
    args, kwargs = example
    with way.entered(model), undisturbed(model), running_modules(model) as (running, _):
        return outlined(lambda: model(*args, **kwargs), running)


def outlined(run: Callable[[], Any], running: list[str] | None = None) -> list[Step] | None:
    """Of whatever `run` computes. running: the modules that run at that time, the innermost last."""
    recorder = Recorder([""] if running is None else running)
    try:
        with torch.no_grad(), recorder:
            run()
    except Exception:  # noqa: BLE001  whatever the user's forward raises
        return None
    return recorder.steps


def otherwise(found: list[Step], wanted: list[Step]) -> dict[str, int]:
    """The modules that run what is not wanted, up to where another operator runs, with the number of the first such
    step."""
    modules: dict[str, int] = {}
    for number, (one, other) in enumerate(zip(found, wanted, strict=False)):
        if one != other:
            modules.setdefault(one.module, number)
        if one.operator != other.operator:
            break
    return modules


def transcript(model: nn.Module, way: Way, example: Example) -> Any:
    """All that a module computes when it runs in a way: every operator, the numbers that it is given, the shapes that
    it makes; the error's name where it raises. Nothing of it is changed afterwards."""
    writer, (args, kwargs) = _Writer(), example
    with torch.no_grad(), way.entered(model), undisturbed(model), writer:
        try:
            model(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever the user's forward raises
            return writer.lines, type(error).__name__
    return writer.lines, ""


def factors_of(model: nn.Module, way: Way, example: Example) -> list[tuple[str, tuple[float, ...]]]:
    """The operators of a run that are given floats, with these: scales, slopes, rates."""
    lines, _ = transcript(model, way, example)
    given = ((str(func), tuple(n for n in numbers if type(n) is float)) for func, numbers, _ in lines)
    return [(func, floats) for func, floats in given if floats]


class _Writer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(result)
        numbers = [value for value in given if type(value) in (int, float, bool)]
        self.lines.append((func, numbers, [tuple(value.shape) for value in made if isinstance(value, Tensor)]))
        return result


class Recorder(TorchDispatchMode):
    """Takes the outline of what runs while it is open. running: the modules that run, the innermost last."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running, self.steps = running, list[Step]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _computes(func):
            shapes = tuple(tuple(value.shape) for value in pytree.tree_leaves(result) if isinstance(value, Tensor))
            numbers = tuple(value for value in args if type(value) is float)
            name = func._schema.name.removesuffix("_")  # in place or not
            if name in PRODUCTS:
                name, shapes = "product", tuple((math.prod(shape),) for shape in shapes)
            last = self.steps[-1] if self.steps else None
            sizes = tuple((math.prod(shape),) for shape in shapes)
            if not (name == "aten::add" and last is not None and (last.operator, last.shapes) == ("product", sizes)):
                self.steps.append(Step(name, shapes, numbers, self.running[-1]))
        return result


def _computes(func: Any) -> bool:
    """Whether an operator does more than lay out what it is given, which depends on how that lies in memory."""
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not view and func._schema.name not in ("aten::clone", "aten::_to_copy", "aten::_unsafe_view", "aten::copy_")
