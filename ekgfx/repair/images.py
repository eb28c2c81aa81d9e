"""The images of a repair: gathered, those that teach nothing left out, and divided into a part to fit on and a part to
judge by."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.data.batches import Inputs, each_batch, unpacked
from ekgfx.errors import DataError

EVERY = 5
"""Every fifth image is held out."""


@dataclass(frozen=True)
class Images:
    """The model's inputs, batch by batch: to fit on and to judge by. notes: which images were left out, and why;
    digest: of the images that are used."""

    fit: list[Inputs]
    held: list[Inputs]
    used: int
    held_out: int
    notes: tuple[str, ...]
    digest: str


def gather(images: Tensor | Iterable[Any], batch_size: int, most: int, model: nn.Module) -> Images:
    """The first `most` images.

    Args:
        batch_size: 0 where the model has no batch dimension, and every batch is what it takes.
        images: B × …; or batches, as `ekgfx.data.batches.unpacked` takes them, of which only the inputs are looked at:
            a tensor, a tuple of them, or a mapping by name.
        model: what takes them: they go to its device, and to its half precision where it is in one.

    Raises:
        DataError: the model takes no inputs of these names, or one has another length than the others, so that samples
            cannot be told apart.
    """
    single: list[Inputs] = []
    bad = flat = twice = 0
    seen: dict[str, None] = {}
    for batch in [images] if isinstance(images, Tensor) else each_batch(images):
        inputs = Inputs.of(unpacked(batch)[0])
        for one in _singles(inputs) if batch_size else [inputs]:
            tensors = [t for t in pytree.tree_leaves(one) if isinstance(t, Tensor)]
            key = _digest(tensors)
            if not all(bool(torch.isfinite(t).all()) for t in tensors):
                bad += 1
            elif all(_constant(t) for t in tensors):
                flat += 1
            elif key in seen:
                twice += 1
            else:
                seen[key] = None
                single.append(one)
            if len(single) == most:
                break
        if len(single) == most:
            break
    apart = set(range(EVERY - 1, len(single), EVERY)) or set(range(1, len(single))[-1:])  # of few, the last
    fit, held = ([one for i, one in enumerate(single) if (i in apart) is taken] for taken in (False, True))
    notes = [
        f"{count} image{'s' if count > 1 else ''} left out: {why}"
        for count, why in ((bad, "not finite"), (flat, "of one value throughout"), (twice, "seen already"))
        if count
    ]
    to_fit, to_judge = ([inputs.onto(model) for inputs in _batched(part, batch_size)] for part in (fit, held))
    whole = hashlib.sha256("".join(seen).encode()).hexdigest()[:16]
    return Images(to_fit, to_judge, len(single), len(held), tuple(notes), whole)


def _digest(tensors: list[Tensor]) -> str:
    """Of what is in the tensors, bit for bit."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _constant(t: Tensor) -> bool:
    """Whether a tensor of real numbers has one value throughout (in every channel)."""
    return t.is_floating_point() and t.ndim > 2 and bool((t.flatten(2).amax(2) == t.flatten(2).amin(2)).all())


def _singles(inputs: Inputs) -> list[Inputs]:
    """Sample by sample."""
    count = inputs.samples
    for t in pytree.tree_leaves(inputs):
        if isinstance(t, Tensor) and (not t.ndim or len(t) != count):
            raise DataError(
                f"an input of shape {tuple(t.shape)} beside {count} samples: a repair takes inputs sample by sample; "
                "give it once for every sample, or let the model make it"
            )
    leaves, spec = pytree.tree_flatten(inputs)
    return [
        pytree.tree_unflatten([t[i : i + 1] if isinstance(t, Tensor) else t for t in leaves], spec)
        for i in range(count)
    ]


def _batched(single: Sequence[Inputs], size: int) -> list[Inputs]:
    """As few batches as may be, as equal as can be: a small one at the end would count for more than its images."""
    if not size:
        return list(single)
    count = -(-len(single) // size)
    ends = [len(single) * i // count for i in range(count + 1)] if count else []
    return [_joined(single[start:end]) for start, end in pairwise(ends)]


def _joined(part: Sequence[Inputs]) -> Inputs:
    joined: Inputs = pytree.tree_map(
        lambda *values: torch.cat(values) if isinstance(values[0], Tensor) else values[0], *part
    )
    return joined
