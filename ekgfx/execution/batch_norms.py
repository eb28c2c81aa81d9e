"""Batch norm in training, computed otherwise than PyTorch does, whoever calls it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ARGUMENTS: dict[Any, tuple[str, ...]] = {
    functional.batch_norm: (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    ),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}  # fmt: skip
ARGUMENTS[torch.ops.aten.batch_norm.default] = ARGUMENTS[torch.batch_norm]
DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}

Norm = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, float], Tensor | None]
"""input, running mean and variance, weight, bias, momentum, eps → the output; None leaves it to PyTorch."""


class BatchNorms(TorchFunctionMode):
    """While it lasts, `norm` computes the batch norms in training: those of a BatchNorm, of a module of timm's that is
    one and its activation, of a graph."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ARGUMENTS.get(function)
        if names is not None:
            given = DEFAULTS | dict(zip(names, args, strict=False)) | (kwargs or {})
            if given["training"]:
                found = self.norm(*(given[name] for name in ARGUMENTS[functional.batch_norm] if name != "training"))
                if found is not None:
                    return found
        return function(*args, **(kwargs or {}))


def bring_forward(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor | int,
    momentum: float,
) -> None:
    """The running averages as PyTorch brings them forward. var: of the population; count: values per channel."""
    if running_mean is not None and running_var is not None:
        unbiased = var.detach() * (count / (count - 1))
        running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
