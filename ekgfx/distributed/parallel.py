"""Training one network in several processes: each takes its part of every batch, and all take the same step.

What a step computes is what one process computes on the whole batch, up to rounding: BatchNorm takes the statistics of
the whole batch, losses are weighted by the samples behind them, and gradients are added up. (Random numbers that the
network itself draws, as dropout does, are others.)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.distributed.team import team
from ekgfx.execution.batch_norms import BatchNorms, bring_forward


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


def shared_norms() -> BatchNorms:
    """While it lasts, batch norms in training take the statistics of what all processes have."""
    return BatchNorms(_normalized)


def _normalized(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
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
    bring_forward(running_mean, running_var, mean, var, count, momentum)
    return (output if bias is None else output + bias.view(shape)).to(x.dtype)
