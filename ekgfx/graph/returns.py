"""What a model returns, as the export sees it: tensors in a row, whatever they were in, and which of them matter."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import compress
from typing import Any

from torch import Tensor, fx, nn

from ekgfx.base.containers import Frame, Slot
from ekgfx.errors import TraceError


@dataclass(frozen=True)
class Returns:
    """frame: the output without its tensors. choice: which of them matter, as asked for; () means all but those in
    `memory`: what the model gives out to be given back at the next call, as a decoder's cache."""

    frame: Frame
    choice: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()

    def mattering(self, values: Sequence[Any]) -> list[Any]:
        """Of the values that the graph gives those that matter: the last are the model's output, others are new values
        of buffers."""
        others = len(values) - len(self.frame.places)
        if self.choice:
            chosen = [any(_is_in(place, c) for c in self.choice) for place in self.frame.places]
        else:
            chosen = [place.partition(".")[0] not in self.memory for place in self.frame.places]
        return [*values[:others], *compress(values[others:], chosen)]


def as_choice(outputs: Any) -> tuple[str, ...]:
    """The places that `outputs=` asks for: a key, a field, an index, a glob, or several."""
    if outputs is None:
        return ()
    return tuple(map(str, (outputs,) if isinstance(outputs, str | int) else outputs))


class Holder(nn.Module):
    """Puts tensors into a value of the class that a module returned: the last step of the graph in its place."""

    NAME = "_returned"

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame

    def forward(self, *tensors: Tensor) -> Any:
        return self.frame.filled(tensors)


@contextmanager
def tensors_returned(model: nn.Module, choice: Sequence[str], strict: bool = True) -> Iterator[list[Returns]]:
    """While this is open, the model returns the tensors of its output alone, in a list; what they were in is in the
    list that this gives, once it has run.

    strict: raise TraceError when the output has nothing in a place of `choice`; otherwise such a place is left out, and
    all tensors matter where none of the places are there.
    """
    seen: list[Returns] = []

    def flattened(output: Any) -> list[Any]:
        frame, tensors = Frame.of(output)
        seen[:] = [_chosen(frame, choice, model, strict)]
        return tensors

    if isinstance(model, fx.GraphModule):  # export interprets its graph, without hooks
        with _graph_that_returns(model) as frame:
            seen[:] = [_chosen(frame, choice, model, strict)]
            yield seen
        return
    running: list[None] = []  # a method that stands in the forward's place may call the model itself

    def begins(module: nn.Module, inputs: Any) -> None:
        running.append(None)

    def ends(module: nn.Module, inputs: Any, output: Any) -> Any:
        running.pop()
        return output if running else flattened(output)

    handles = model.register_forward_pre_hook(begins, prepend=True), model.register_forward_hook(ends)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _graph_that_returns(model: fx.GraphModule) -> Iterator[Frame]:
    """While this is open, the graph returns the nodes of its output in a list; gives what they were in."""
    *_, output = model.graph.nodes
    value = output.args[0]
    frame, nodes = Frame.of(value, fx.Node)
    last = nodes[0] if isinstance(value, fx.Node) else None
    holder = model.get_submodule(str(last.target)) if last is not None and last.op == "call_module" else None
    if isinstance(holder, Holder) and last is not None:
        frame, nodes = holder.frame, list(last.args)
    try:
        output.args = (nodes,)
        yield frame
    finally:
        output.args = (value,)


def _chosen(frame: Frame, choice: Sequence[str], model: nn.Module, strict: bool) -> Returns:
    found = [place for place in choice if any(_is_in(known, place) for known in frame.places)]
    for place in choice:
        if strict and place not in found:
            raise TraceError(
                f"outputs={place!r} is not in what {type(model).__name__} returns: "
                f"{', '.join(frame.places) if any(frame.places) else 'one tensor'}"
            )
    return Returns(frame, tuple(found), _memory(frame, model))


def _memory(frame: Frame, model: nn.Module) -> tuple[str, ...]:
    """Entries of the output that are objects of a class of their own and bear the name of an argument."""
    try:
        taken = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return ()
    given = frame.value.items() if isinstance(frame.value, Mapping) else getattr(frame.value, "__dict__", {}).items()
    return tuple(
        name for name, value in given if name in taken and type(value) not in (Slot, tuple, list, dict, type(None))
    )


def _is_in(place: str, choice: str) -> bool:
    return fnmatchcase(place, choice) or place.startswith(f"{choice}.")
