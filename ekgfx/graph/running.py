"""Which modules' forwards run at a time."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def running_modules(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """While this is open, two lists of names that grow and shrink: the modules whose forward runs, the innermost last
    (before any of them the model itself), and all whose forward has begun, in order.

    A module whose forward raises stays in the first list. TorchScript is in none: it takes no hooks.
    """
    running, begun = [""], list[str]()

    def begins(name: str) -> None:
        running.append(name)
        begun.append(name)

    def ends(*_: Any) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        handles.append(module.register_forward_pre_hook(lambda _, __, n=name: begins(n)))
        handles.append(module.register_forward_hook(ends))
    try:
        yield running, begun
    finally:
        for handle in handles:
            handle.remove()
