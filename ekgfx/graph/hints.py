"""What PyTorch asks of the values of tensors for the sake of speed alone, and need not ask while a graph is made."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.nn.modules import transformer

_ASKED = "_detect_is_causal_mask"


@contextlib.contextmanager
def masks_taken_as_they_are() -> Iterator[None]:
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
