"""Training one network in several processes: each takes its part of every batch, and all take the same step.

What a step computes is what one process computes on the whole batch, up to rounding: BatchNorm takes the statistics of
the whole batch, losses are weighted by the samples behind them, and gradients are added up. (Random numbers that the
network itself draws, as dropout does, are others.)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ekgfx.distributed.team import team


class _Summed(torch.autograd.Function):
    """The sum of what all processes have; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return team().all_reduce(value.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return team().all_reduce(gradients[0].clone(memory_format=torch.contiguous_format))


def summed(value: Tensor) -> Tensor:
    """The sum over all processes, differentiable. Every process must ask for it."""
    if team().size == 1:
        return value
    found: Tensor = _Summed.apply(value)  # type: ignore[no-untyped-call]
    return found


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every gradient becomes the sum over the processes, in one message per data type. A parameter that none of them
    has a gradient of is left without one."""
    if team().size == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    known = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for parameter, somewhere in zip(trained, team().all_reduce(known).tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            kinds.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in kinds.values():
        whole = team().all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


class SharedNorms(TorchFunctionMode):
    """While it lasts, batch norms in training take the statistics of what all processes have, whoever calls them: a
    BatchNorm, a module of timm's that is one and its activation, or a graph."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ARGUMENTS.get(function)
        if names is not None:
            given = DEFAULTS | dict(zip(names, args, strict=False)) | (kwargs or {})
            if given["training"]:
                return _normalized(*(given[name] for name in ARGUMENTS[functional.batch_norm]))
        return function(*args, **(kwargs or {}))


ARGUMENTS: dict[Any, tuple[str, ...]] = {
    functional.batch_norm: (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    ),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}  # fmt: skip
ARGUMENTS[torch.ops.aten.batch_norm.default] = ARGUMENTS[torch.batch_norm]
DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


def _normalized(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """What batch norm gives for the whole batch, and the running averages brought forward as PyTorch does."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims, channels = [d for d in range(x.dim()) if d != 1], x.shape[1]
    sums = summed(torch.cat([wide.sum(dims), wide.new_full((1,), x.numel() / channels)]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    shape = [1, channels] + [1] * (x.dim() - 2)
    centred = wide - mean.view(shape)
    var = summed(centred.square().sum(dims)) / count
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    output = centred * scale.view(shape)
    if running_mean is not None and running_var is not None:
        unbiased = var.detach() * count / (count - 1)
        running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return (output if bias is None else output + bias.view(shape)).to(x.dtype)
