"""A decoder's cache, where a cut leaves its attention unable to fill one.

A forward that was written from a graph knows tensors alone: what it should put into a cache on its way is lost. So a
model whose attention gets another forward is run without a cache from then on, and says so.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ekgfx.errors import EkgfxError
from ekgfx.tracing.trace import retrace
from ekgfx.tracing.traced import TracedModel

FLAG = "use_cache"
TOLD = (
    f"the pruned model runs without its cache (config.{FLAG} is False, and a call with one is refused): the cut needs "
    "another forward in modules that fill it; a plan in which their widths stay equal, as a search ties them, keeps it"
)


def without_memory(traced: TracedModel) -> TracedModel | None:
    """The model traced without its cache; None where it has none, or other groups then. To be called, and used, while
    `switched_off` is open."""
    if traced.returns is None or not traced.returns.memory:
        return None
    try:
        again = retrace(traced.model, traced)
    except EkgfxError:
        return None
    assert again.returns is not None
    return None if again.returns.memory or again.groups.digest != traced.groups.digest else again


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """While this is open, a model's configurations say that it keeps no cache."""
    known = [(holder, getattr(holder, FLAG)) for holder in _holders(model)]
    for holder, _ in known:
        setattr(holder, FLAG, False)
    try:
        yield
    finally:
        for holder, value in known:
            setattr(holder, FLAG, value)


def _holders(model: nn.Module) -> Iterator[Any]:
    """The configurations that modules hold, and those in them, as far as they speak of a cache."""
    seen: set[int] = set()
    left = [value for module in model.modules() for value in vars(module).values()]
    while left:
        value = left.pop()
        if id(value) not in seen and hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            seen.add(id(value))
            left += vars(value).values()
            if FLAG in vars(value):
                yield value
