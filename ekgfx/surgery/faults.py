"""Where a model fails that was run, and whose Python is to blame for it."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ekgfx.graph.axis_graph import Example
from ekgfx.graph.running import running_modules
from ekgfx.graph.ways import Way, undisturbed
from ekgfx.surgery.check import trains
from ekgfx.surgery.integers import STANDARD
from ekgfx.tracing.traced import TracedModel

CONTAINERS = (nn.Sequential.forward, nn.Module.forward)
"""Forwards that read nothing of the modules in them."""
Watch = AbstractContextManager[Any]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a cut module: the module whose Python does it (None if that is not known), and what.

    begun: where a run raises, the modules whose forward had begun, in order. way: which of the runs that is.
    """

    module: str | None
    text: str
    begun: tuple[str, ...] | None = None
    way: int = 0

    def hides(self, modules: Collection[str], before: "Problem | None") -> bool:
        """Whether a run raises before it shows what becomes of these modules, or sooner than it did before."""
        if self.begun is None:
            return False
        earlier = None if before is None or before.begun is None else (before.way, len(before.begun))
        if earlier is not None and (self.way, len(self.begun)) < earlier:
            return True
        return not any(module in modules for module in self.begun)


def failing(
    model: nn.Module, way: Way, example: Example, during: Callable[[list[str]], Watch] = lambda running: nullcontext()
) -> Problem | None:
    """The innermost module whose own forward raises when the model is run in a way, None if none does. during: what is
    open meanwhile, made of the modules that run at that time."""
    args, kwargs = example
    with (
        torch.no_grad(),
        way.entered(model),
        undisturbed(model),
        running_modules(model) as (running, begun),
        during(running),
    ):
        try:
            model(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever the user's forward raises; its place is what is wanted
            text, place = " ".join(str(error).split()), running[-1]
            text = f"{place or 'its forward'} raises {type(error).__name__}: {text}"
            return Problem(blamed(model, place), text, tuple(begun))
    return None


def blamed(model: nn.Module, path: str) -> str:
    """A standard layer does what its weights say: where it fails, the module that calls it gave it the wrong thing."""
    while path and isinstance(model.get_submodule(path), STANDARD):
        path = path.rpartition(".")[0]
    while path and type(model.get_submodule(path)).forward in CONTAINERS:
        path = path.rpartition(".")[0]
    return path


def training_error(model: nn.Module, source: TracedModel) -> str | None:
    """What a step of training raises, if it does."""
    try:
        trains(model, source.way, *source.example)
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # noqa: BLE001  whatever the user's forward raises
        return f"{type(error).__name__}: {error}"
    return None
