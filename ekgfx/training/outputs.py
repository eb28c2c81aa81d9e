"""Where the logits are in what a model returns."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ekgfx.base.containers import tensors_by_place
from ekgfx.errors import DataError

Logits = Callable[[Any], Tensor] | str | int
"""How logits are found in a model's output: a function of it, or their place: a key, a field, an index, or several of
these joined by dots ("decoder.logits")."""

KNOWN = ("logits", "out")
"""Names of the logits in outputs of several tensors: of most model libraries, and of torchvision's segmentation."""


def finder(logits: Logits) -> Callable[[Any], Tensor]:
    """The function that finds the logits. A place in the output is no place in a bare tensor: that is taken as it is,
    since many models return their logits alone in evaluation and with others in training."""
    if callable(logits):
        return logits
    place = str(logits)

    def at_place(output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        found = tensors_by_place(output)
        if place not in found:
            raise DataError(f"logits={logits!r} is not in what the model returns, {shown(output)}")
        return found[place]

    return at_place


def logits_of(output: Any) -> Tensor:
    """The logits B × K × … in a model's output: the one float tensor with classes that is in it, or of several the one
    that is called logits or out.

    Raises DataError where that is none, or could be several; it names them.
    """
    if isinstance(output, Tensor):
        if output.dim() >= 2:
            return output
        raise DataError(
            f"the model returns {tuple(output.shape)}, not logits of shape batch × classes; pass logits=…, and loss=…"
        )
    found = {
        place: tensor
        for place, tensor in tensors_by_place(output).items()
        if tensor.is_floating_point() and tensor.dim() >= 2
    }
    if len(found) == 1:
        return next(iter(found.values()))
    for name in KNOWN:
        if name in found:
            return found[name]
    first = next(iter(found), "KEY")
    advice = repr(int(first) if first.isdecimal() else first)
    raise DataError(
        f"which tensor are the logits is not clear in what the model returns, {shown(output)}; pass logits={advice} "
        "(a key, a field, an index or a function), and loss=… where cross-entropy is not what it is trained with"
    )


def shown(output: Any) -> str:
    """An output's class, and its tensors by place, in one line."""
    found = [f"{place} {'×'.join(map(str, tensor.shape))}" for place, tensor in tensors_by_place(output).items()]
    more = f", … ({len(found)} in all)" if len(found) > 8 else ""
    return f"a {type(output).__name__} of {', '.join(found[:8]) or 'no tensor'}{more}"
