"""Random numbers that Python looks at, as where a whole layer is left out now and then (layer dropout).

A graph takes one path. Where training has no graph otherwise, a single number between 0 and 1 that is drawn while it is
traced is nearly one, at which what is dropped below a probability is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ekgfx.base.lines import calling

HIGHEST = 1 - 2**-24
"""The highest that a draw in float32 can be."""


class NothingDropped(TorchFunctionMode):
    """While this is open, `torch.rand` of a single number draws the highest one, as a constant.

    lines: the lines of the user's code that drew one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.rand and _is_one(args) and not kwargs.get("out"):
            self.lines[calling()] = None
            return torch.full(_shape(args), HIGHEST) if _shape(args) else torch.tensor(HIGHEST)
        return func(*args, **kwargs)


def _shape(args: Any) -> tuple[Any, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else tuple(args)


def _is_one(args: Any) -> bool:
    shape = _shape(args)
    return not any(isinstance(size, Tensor) for size in shape) and all(
        type(size) is int and size == 1 for size in shape
    )
