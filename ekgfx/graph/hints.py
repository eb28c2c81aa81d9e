"""What Python does that has no graph, though operators do the same: while a graph is made, they do it.

PyTorch compares a mask's values for the sake of speed alone. `tensor.data` is read and written beside the operators, as
where a second network follows the first one (`theirs.data = theirs.data * 0.99 + ours.data * 0.01`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode

_ASKED = "_detect_is_causal_mask"


_DATA: Any = torch.Tensor.data
_READ, _WRITTEN = _DATA.__get__, _DATA.__set__


@contextlib.contextmanager
def by_operators() -> Iterator[None]:
    """While this is open, a model can be exported that compares masks, or reads and writes `tensor.data`."""
    with _masks_taken_as_they_are(), _DataByOperators():
        yield


class _DataByOperators(TorchFunctionMode):
    """`tensor.data` is `tensor.detach()`, and what is assigned to it is copied into the tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _READ:
            return args[0].detach()
        if func == _WRITTEN and _fits(*args):
            with torch.no_grad():
                args[0].copy_(args[1])
            return None
        return func(*args, **(kwargs or {}))


def _fits(tensor: Tensor, value: Tensor) -> bool:
    return (tensor.shape, tensor.dtype, tensor.device) == (value.shape, value.dtype, value.device)


@contextlib.contextmanager
def _masks_taken_as_they_are() -> Iterator[None]:
    """While this is open, `nn.Transformer` does not compare a mask with the causal one, which has no graph.

    That it is causal is a hint for a faster kernel: without it the mask is applied as any other is. A hint that the
    caller gives is passed on. Source: `torch.nn.modules.transformer._detect_is_causal_mask`.
    """
    compare = getattr(transformer, _ASKED, None)
    if compare is None:
        yield
        return

    def unasked(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    setattr(transformer, _ASKED, unasked)
    try:
        yield
    finally:
        setattr(transformer, _ASKED, compare)
