"""Sizes that are made of sizes, many times over, are not followed.

Where every stage of a network pads its maps to whole windows (DaViT), a size is a remainder of a remainder of a
remainder, and the exporter's algebra takes minutes for each operator, later hours. Where the model is exported with
free sizes and they become such, that is given up, and fewer sizes are left free.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ekgfx.errors import PruneError

MOST = 210
"""Terms of a size, as a Swin of two stages may have. An operator takes a few seconds then, and at 390 over a minute."""


class NothingNested(TorchFunctionMode):
    """While this is open, a size of more than `MOST` terms raises PruneError."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[Any, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            for size in tensor.shape if isinstance(tensor, Tensor) else ():
                if isinstance(size, torch.SymInt) and self._terms(size.node.expr) > MOST:
                    raise PruneError(f"a size is an expression of more than {MOST} terms: {size}")
        return made

    def _terms(self, expression: Any) -> int:
        if expression not in self.terms:
            self.terms[expression] = 1 + sum(self._terms(part) for part in expression.args)
        return self.terms[expression]
