"""Which modules do something else in training than in evaluation, found out by running the model in both."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ekgfx.graph.axis_graph import Example
from ekgfx.graph.running import running_modules
from ekgfx.graph.ways import Way, undisturbed

Steps = dict[str, list[Any]]
"""Module → the functions of PyTorch that it calls itself, with what they are given."""


def others_in_training(model: nn.Module, way: Way, example: Example) -> frozenset[str]:
    """The modules that call other functions in training mode, or the same with other numbers (dropout); all of them
    where the model does not run in training mode on the example."""
    every = frozenset(name for name, _ in model.named_modules())
    there = _steps(model, replace(way, training=True), example)
    here = _steps(model, replace(way, training=False), example)
    if there is None or here is None:
        return every
    return frozenset(name for name in every if there.get(name) != here.get(name))


def _steps(model: nn.Module, way: Way, example: Example) -> Steps | None:
    args, kwargs = example
    try:
        with (
            torch.no_grad(),
            way.entered(model),
            undisturbed(model),
            running_modules(model) as (running, _),
            _Noted(running) as noted,
        ):
            model(*args, **kwargs)
    except Exception:  # noqa: BLE001  whatever the user's forward raises
        return None
    return noted.steps


class _Noted(TorchFunctionMode):
    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running, self.steps = running, Steps()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            given = map(_described, pytree.tree_leaves((args, kwargs)))
            self.steps.setdefault(self.running[-1], []).append((func, *given))
        return func(*args, **kwargs)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return value if isinstance(value, int | float | complex | str | torch.dtype | type(None)) else type(value)
