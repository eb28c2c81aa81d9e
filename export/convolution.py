"""Convolution written as the matrix products that it stands for.

A layer with weights of its own for every sample (CondConv, Yang et al. 2019) puts the samples side by side as groups of
one convolution. ONNX's Conv takes a fixed number of groups, so that such a file could have only one batch size; its
MatMul takes any number of leading dimensions.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """What `torch.nn.functional.conv2d` computes, by one product of every group for each position in the kernel.

    input: N × G·c × H × W; weight: G·o × c × h × w; bias: G·o; groups: G. Returns N × G·o × H' × W'.
    """
    padded = F.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    rows, columns = (
        (size - apart * (kernel - 1) - 1) // step + 1
        for size, kernel, apart, step in zip(padded.shape[2:], weight.shape[2:], dilation, stride, strict=True)
    )
    padded = padded.reshape(input.shape[0], groups, weight.shape[1], *padded.shape[2:])
    kernels = weight.reshape(groups, -1, *weight.shape[1:])

    def product(i: int, j: int) -> Tensor:
        top, left = i * dilation[0], j * dilation[1]
        bottom, right = top + stride[0] * (rows - 1) + 1, left + stride[1] * (columns - 1) + 1
        return kernels[..., i, j] @ padded[..., top : bottom : stride[0], left : right : stride[1]].flatten(-2)

    first, *others = (product(i, j) for i in range(weight.shape[2]) for j in range(weight.shape[3]))
    output = sum(others, first).reshape(input.shape[0], -1, rows, columns)
    return output if bias is None else output + bias[:, None, None]
