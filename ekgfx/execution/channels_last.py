"""Channels last in memory: where that is quicker, and batch norm by the statistics of the batch on such CPU tensors.

PyTorch's own kernel goes through such a tensor pixel by pixel. With the few channels of a small or pruned layer that is
slow: at 8 to 16 channels about as slow as a third to a half of the convolution before it. It is inexact, too: sums over
262,144 pixels in float32 are off by 1e-4, and by 1e-3 where positive and negative cancel. Neighbouring pixels are one
run of memory, so k of them can be read as one pixel of k·C channels. Statistics of those are vectorized well and short,
and the k of each channel are then combined. The result is that of PyTorch's other kernels up to rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.execution.batch_norms import bring_forward

WIDTH = 512
"""Numbers that are read at once: enough for the vector units, few enough that the statistics stay in the cache."""
PART = 1 << 16
"""Numbers that are worked on at once where several passes go over them, so that they stay in the cache."""


def quicker_channels_last(model: nn.Module) -> bool:
    """Whether a model computes faster with its images' channels last: on the CPU, where there are convolutions."""
    cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return cpu and any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())


def channels_last(x: Tensor) -> Tensor:
    """N × C × H × W in that memory format. With one channel both formats are one, and PyTorch takes it for the other
    unless its strides say so."""
    x = x.contiguous(memory_format=torch.channels_last)
    _, c, h, w = x.shape
    return x.as_strided(x.shape, (h * w, 1, w, 1)) if c == 1 else x


def wide(x: Tensor) -> Tensor | None:
    """N × C × H × W with channels last in memory as rows of k·C values, channels in turn; None for other tensors."""
    if x.dim() != 4 or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not x.numel():
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):
        return None
    channels, side = x.shape[1], 1
    pixels = x.numel() // channels
    while 2 * side * channels <= WIDTH and pixels % (2 * side) == 0:
        side *= 2
    return x.permute(0, 2, 3, 1).reshape(pixels // side, side * channels)


def statistics(rows: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (of the population) per channel. rows: as from `wide`."""
    mean, var = torch.ops.aten.batch_norm_update_stats(rows, None, None, 0.0)
    means = mean.view(-1, channels)
    mean = means.mean(0)
    return mean, (var.view(-1, channels) + (means - mean).square()).mean(0)


class BatchNorm(torch.autograd.Function):
    """y = (x − mean)·γ/√(var + ε) + β with the statistics of the batch, which it returns as well."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = wide(x)
        assert rows is not None
        mean, var = statistics(rows, x.shape[1])
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.mark_non_differentiable(mean, var)
        return scaled(x, mean, var, weight, bias, eps, torch.empty_like(x)), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        channels = x.shape[1]
        g, rows = wide(gradient), wide(x)
        assert g is not None and rows is not None
        count = x.numel() // channels
        parts = max(1, PART // rows.shape[1])
        product = torch.empty_like(rows[:parts])
        shift, along = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
        for towards, values in zip(g.split(parts), rows.split(parts), strict=True):
            shift += towards.sum(0)
            along += torch.mul(towards, values, out=product[: len(values)]).sum(0)
        shift, along = shift.view(-1, channels).sum(0), along.view(-1, channels).sum(0)
        scale = (along - mean * shift) * inverse  # Σ g·x̂
        factor = inverse if weight is None else inverse * weight
        # dx = γ/σ·(g − Σg/m − x̂·Σ(g·x̂)/m), as a·g + b·x + c
        on_x = -factor * inverse * scale / count
        rest = -factor * shift / count - on_x * mean
        on_g, on_x, rest = spread(factor, rows), spread(on_x, rows), spread(rest, rows)
        found = torch.empty_like(rows)
        for towards, values, out in zip(g.split(parts), rows.split(parts), found.split(parts), strict=True):
            torch.addcmul(rest, values, on_x, out=out).addcmul_(towards, on_g)
        needed = ctx.needs_input_grad
        return (
            as_image(found, x) if needed[0] else None,
            scale if needed[1] else None,
            shift if needed[2] else None,
            None,
        )


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, overwrite: bool = False
) -> Tensor | None:
    """N × C × H × W normalized by its own statistics; None where nothing is gained over PyTorch's kernel.

    overwrite: whether the result may take the place of x; without gradients.
    """
    found = _normalized(x, weight, bias, eps, overwrite)
    return None if found is None else found[0]


def batch_norm_in_training(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor | None:
    """The same, with the running averages brought forward; for `ekgfx.execution.batch_norms.BatchNorms`."""
    found = _normalized(x, weight, bias, eps)
    if found is None:
        return None
    output, mean, var = found
    bring_forward(running_mean, running_var, mean, var, x.numel() // x.shape[1], momentum)
    return output


def _normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The output, and mean and variance of each channel."""
    rows = wide(x)
    if rows is None or x.numel() == x.shape[1] or any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        found: tuple[Tensor, Tensor, Tensor] = BatchNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
        return found
    mean, var = statistics(rows, x.shape[1])
    return scaled(x, mean, var, weight, bias, eps, x if overwrite else torch.empty_like(x)), mean, var


def scaled(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> Tensor:
    """x normalized by known statistics, into `out`, which may be x."""
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    rows, written = wide(x), wide(out)
    assert rows is not None and written is not None
    torch.addcmul(spread(shift, rows), rows, spread(scale, rows), out=written)
    return out


def spread(values: Tensor, rows: Tensor) -> Tensor:
    """A value per channel as a row."""
    return values.repeat(rows.shape[1] // len(values))


def as_image(rows: Tensor, like: Tensor) -> Tensor:
    """Rows as the N × C × H × W that they came from."""
    n, c, h, w = like.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)
