"""The images of a repair: gathered, those that teach nothing left out, and divided into a part to fit on and a part to
judge by."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ekgfx.errors import DataError
from ekgfx.training.evaluation import to_device

EVERY = 5
"""Every fifth image is held out."""


@dataclass(frozen=True)
class Images:
    """Arguments of the model, batch by batch: to fit on and to judge by. mirrored: the first left for right, where that
    is asked for; notes: which images were left out, and why; digest: of the images that are used."""

    fit: list[tuple[Any, ...]]
    mirrored: list[tuple[Any, ...]]
    held: list[tuple[Any, ...]]
    used: int
    held_out: int
    notes: tuple[str, ...]
    digest: str


def gather(
    images: Tensor | Iterable[Any], batch_size: int, most: int, device: torch.device, mirrored: bool = False
) -> Images:
    """The first `most` images.

    Args:
        batch_size: 0 where the model has no batch dimension, and every batch is what it takes.
        images: B × …; or batches, each a tensor, a tuple `(images, …)` of which the rest is not looked at, or a tuple
            whose first element is itself a tuple of the model's arguments.

        mirrored: whether the images to fit on are wanted left for right as well.

    Raises:
        DataError: inputs come by name, or are no images that could be mirrored.
    """
    single: list[tuple[Any, ...]] = []
    bad = flat = twice = 0
    seen: dict[str, None] = {}
    for batch in [images] if isinstance(images, Tensor) else images:
        first = batch if isinstance(batch, Tensor) else None if isinstance(batch, Mapping) else batch[0]
        if first is None or isinstance(first, Mapping):
            raise DataError(
                "repair takes a model's inputs in order, a tensor or a tuple of them, not by name: "
                "give batches as ((first, second), …)"
            )
        args = tuple(first) if isinstance(first, tuple | list) else (first,)
        for one in _singles([args]) if batch_size else [args]:
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
    to_fit, to_judge = ([to_device(args, device) for args in _batched(part, batch_size)] for part in (fit, held))
    whole = hashlib.sha256("".join(seen).encode()).hexdigest()[:16]
    other = [_mirror(args) for args in to_fit] if mirrored else []
    return Images(to_fit, other, to_judge, len(single), len(held), tuple(notes), whole)


def _mirror(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Every image (B × C × H × W) left for right."""
    if not any(_is_image(t) for t in pytree.tree_leaves(args)):
        raise DataError("mirrored takes images, B × channels × height × width, and there are none; leave it out")
    flipped: tuple[Any, ...] = pytree.tree_map(lambda t: t.flip(3) if _is_image(t) else t, args)
    return flipped


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()


def _one(args: tuple[Any, ...], i: int) -> tuple[Any, ...]:
    one: tuple[Any, ...] = pytree.tree_map_only(Tensor, lambda t: t[i : i + 1], args)
    return one


def _digest(tensors: list[Tensor]) -> str:
    """Of what is in the tensors, bit for bit."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _constant(t: Tensor) -> bool:
    """Whether a tensor of real numbers has one value throughout (in every channel)."""
    return t.is_floating_point() and t.ndim > 2 and bool((t.flatten(2).amax(2) == t.flatten(2).amin(2)).all())


def _singles(batches: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [_one(args, i) for args in batches for i in range(len(args[0]))]


def _batched(single: Sequence[tuple[Any, ...]], size: int) -> list[tuple[Any, ...]]:
    """As few batches as may be, as equal as can be: a small one at the end would count for more than its images."""
    if not size:
        return list(single)
    count = -(-len(single) // size)
    ends = [len(single) * i // count for i in range(count + 1)] if count else []
    return [_joined(single[start:end]) for start, end in pairwise(ends)]


def _joined(part: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    if len(part) == 1:
        return part[0]
    flat = [pytree.tree_flatten(one) for one in part]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    leaves = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    joined: tuple[Any, ...] = pytree.tree_unflatten(leaves, flat[0][1])
    return joined
