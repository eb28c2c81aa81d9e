"""What hangs on a parameter: its class, attributes and hooks. PyTorch's own deep copies lose the last two."""

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

Cut = Callable[[Tensor], Tensor]


def like(full: Tensor, values: Tensor) -> Tensor:
    """A leaf with these values, of the class of `full` and asking for gradients where that does."""
    if type(full) is Tensor:
        return values.requires_grad_(full.requires_grad and full.is_leaf)
    made: Tensor = torch.Tensor._make_subclass(type(full), values.detach(), full.requires_grad)
    return made


def carry(old: Tensor, new: Tensor, cut: Cut, memo: Mapping[int, Any]) -> None:
    """Give `new` the attributes and hooks of `old` that it has not.

    cut: what is kept of a tensor of the shape of `old`, such as a mask among its attributes. memo: id of what was
    copied → its copy: a hook that is a method of a module becomes that of the module's copy.
    """
    for name, value in vars(old).items():
        if name not in vars(new):
            fits = isinstance(value, Tensor) and value.shape == old.shape
            setattr(new, name, cut(value) if fits else _copied(value, memo))
    for kind in _HOOKS:
        hooks = getattr(old, kind, None)
        if hooks and not getattr(new, kind, None):
            new.requires_grad_()  # a frozen parameter takes none
            register = new.register_hook if kind == "_backward_hooks" else new.register_post_accumulate_grad_hook
            for hook in hooks.values():
                register(_copied(hook, memo))
            new.requires_grad_(old.requires_grad)


def _copied(value: Any, memo: Mapping[int, Any]) -> Any:
    """What stands for a value beside the copy: the copy of what was copied, itself otherwise."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in memo:
        return types.MethodType(value.__func__, memo[id(value.__self__)])
    return copy.copy(value) if type(value) in (list, dict, set) else value
