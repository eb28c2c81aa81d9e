"""What a model returns, as the export sees it: tensors in a row, whatever they were in, and which of them matter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import compress
from typing import Any

from torch import Tensor, nn

from ekgfx.containers import Frame
from ekgfx.errors import TraceError


@dataclass(frozen=True)
class Returns:
    """frame: the output without its tensors. choice: which of them matter, as asked for; () means all."""

    frame: Frame
    choice: tuple[str, ...] = ()

    def mattering(self, values: Sequence[Any]) -> list[Any]:
        """Of the values that the graph gives those that matter: the last are the model's output, others are new values
        of buffers."""
        others = len(values) - len(self.frame.places)
        chosen = [not self.choice or any(_is_in(place, c) for c in self.choice) for place in self.frame.places]
        return [*values[:others], *compress(values[others:], chosen)]


def as_choice(outputs: Any) -> tuple[str, ...]:
    """The places that `outputs=` asks for: a key, a field, an index, a glob, or several."""
    if outputs is None:
        return ()
    return tuple(map(str, (outputs,) if isinstance(outputs, str | int) else outputs))


@contextmanager
def tensors_returned(model: nn.Module, choice: Sequence[str]) -> Iterator[list[Returns]]:
    """While this is open, the model returns the tensors of its output alone, in a list; what they were in is in the
    list that this gives, once it has run.

    Raises TraceError when the output has nothing in a place of `choice`.
    """
    seen: list[Returns] = []

    def flattened(module: nn.Module, inputs: Any, output: Any) -> list[Tensor]:
        frame, tensors = Frame.of(output)
        for place in choice:
            if not any(_is_in(known, place) for known in frame.places):
                raise TraceError(
                    f"outputs={place!r} is not in what {type(model).__name__} returns: "
                    f"{', '.join(frame.places) or 'one tensor'}"
                )
        seen[:] = [Returns(frame, tuple(choice))]
        return tensors

    handle = model.register_forward_hook(flattened)
    try:
        yield seen
    finally:
        handle.remove()


def _is_in(place: str, choice: str) -> bool:
    return fnmatchcase(place, choice) or place.startswith(f"{choice}.")
