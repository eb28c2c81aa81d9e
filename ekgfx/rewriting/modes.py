"""Which modules do something else in training than in evaluation, found out by running the model in both."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ekgfx.graph.axis_graph import Example
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
    steps: Steps = {}
    running: list[str] = []
    args, kwargs = example
    try:
        with torch.no_grad(), way.entered(model), undisturbed(model), _followed(model, running), _Noted(steps, running):
            model(*args, **kwargs)
    except Exception:  # noqa: BLE001  whatever the user's forward raises
        return None
    return steps


@contextmanager
def _followed(model: nn.Module, running: list[str]) -> Iterator[None]:
    """While this is open, `running` ends with the module whose forward runs."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _, __, n=name: running.append(n)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Noted(TorchFunctionMode):
    def __init__(self, steps: Steps, running: list[str]) -> None:
        super().__init__()
        self.steps, self.running = steps, running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            given = map(_described, pytree.tree_leaves((args, kwargs)))
            self.steps.setdefault(self.running[-1] if self.running else "", []).append((func, *given))
        return func(*args, **kwargs)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return value if isinstance(value, int | float | complex | str | torch.dtype | type(None)) else type(value)
