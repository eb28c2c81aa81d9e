"""What is in a batch: the model's inputs, labels and sample indices, view by view and process by process.

A batch is `(images, labels, index)` with the latter two left out where there are none, the images alone, or a mapping,
as the data sets of transformers give it. Images are one tensor, a tuple of positional inputs, or a mapping of inputs by
name.
"""

import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.base.containers import mapped
from ekgfx.base.units import several
from ekgfx.distributed.team import Team
from ekgfx.errors import DataError
from ekgfx.execution.channels_last import channels_last

LABELS = ("labels", "label", "targets", "target")
INDEX = ("index", "indices", "idx")
"""Keys of labels and of sample indices in a batch that is a mapping; all others are inputs."""
HALF = (torch.float16, torch.bfloat16)


class Inputs(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, images: Any) -> "Inputs":
        """One tensor, a tuple or list of positional inputs, or a mapping of inputs by name."""
        if isinstance(images, Inputs):
            return images
        if isinstance(images, Mapping):
            return cls((), {str(name): _as_tensor(value) for name, value in images.items()})
        several = isinstance(images, tuple | list)
        return cls(tuple(map(_as_tensor, images)) if several else (_as_tensor(images),), {})

    @property
    def samples(self) -> int:
        """B, the length of the first tensor."""
        tensors = (value for value in pytree.tree_leaves(tuple(self)) if isinstance(value, Tensor) and value.ndim)
        return next((len(tensor) for tensor in tensors), 0)

    def into(self, network: Any) -> Any:
        """What a model, or anything else that is called as it is, makes of them.

        Raises DataError where a model fails whose weights are of another precision.
        """
        try:
            return network(*self.args, **self.kwargs)
        except RuntimeError as error:
            of_weights = precisions(network.parameters()) if isinstance(network, nn.Module) else set()
            others = precisions(pytree.tree_leaves(tuple(self))) - of_weights
            if not of_weights or not others:
                raise
            found, wanted = (sorted(map(str, dtypes)) for dtypes in (others, of_weights))
            raise DataError(
                f"a batch has numbers of {' and '.join(found)}, the weights of {type(network).__name__} are of "
                f"{' and '.join(wanted)}; convert the batch, such as images.to({wanted[0]})"
            ) from error

    def channels_last(self) -> "Inputs":
        """The same inputs, images with their channels last in memory."""

        def laid(place: str, value: Tensor) -> Tensor:
            return channels_last(value) if value.dim() == 4 else value

        return Inputs(mapped(self.args, laid), mapped(self.kwargs, laid))

    def onto(self, model: nn.Module) -> "Inputs":
        """The same inputs as a model takes them: on its device, in its half precision where all of it is in one, and
        one that is called otherwise than forward calls it by position.

        Raises DataError for inputs that its forward does not take.
        """
        device, half = device_of(model), half_of(model)

        def moved(place: str, value: Tensor) -> Tensor:
            dtype = half if half is not None and value.is_floating_point() else value.dtype
            return value if value.is_meta else value.to(device, dtype, non_blocking=True)

        args, kwargs = mapped(self.args, moved), mapped(self.kwargs, moved)
        parameters = inspect.signature(model.forward).parameters.values() if kwargs else ()
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        unknown = [name for name in kwargs if name not in named]
        if not unknown or any(p.kind is p.VAR_KEYWORD for p in parameters):
            return Inputs(args, kwargs)
        if len(named) == 1 and not args and _takes_a_mapping(parameters):
            return Inputs((kwargs,), {})
        if len(kwargs) == 1 and not args:
            return Inputs(tuple(kwargs.values()), {})
        raise DataError(
            f"the batch has {', '.join(map(repr, unknown))}, which {type(model).__name__}.forward does not take (it "
            f"takes {', '.join(named)}); name the inputs of a batch as forward does, leave out what it does not need, "
            "or give (inputs, labels)"
        )


def _takes_a_mapping(parameters: Iterable[inspect.Parameter]) -> bool:
    """Whether forward says that its first argument is a mapping: `batch: dict[str, Tensor]`."""
    said = next((p.annotation for p in parameters), None)
    kind = typing.get_origin(said) or said
    if isinstance(kind, str):  # of a file with postponed annotations
        return kind.partition("[")[0].rpartition(".")[2] in ("dict", "Dict", "Mapping")
    return isinstance(kind, type) and issubclass(kind, Mapping)


def each_batch(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches. Raises DataError for what is no series of batches, such as one batch."""
    kind = type(batches).__name__
    if isinstance(batches, Tensor | np.ndarray | Mapping | str):
        raise DataError(f"one {kind} is no series of batches; give a list of batches, such as [(images, labels)]")
    if hasattr(batches, "loader"):
        raise DataError(f"a {kind} gives its batches with .loader('train', batch_size); pass that")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise DataError(f"a {kind} is no series of batches; give a DataLoader, or a list of (images, labels)")
    return iter(batches)


def unpacked(batch: Any) -> tuple[Any, Any, Tensor]:
    """Images, labels and sample indices of a batch; labels None and no indices where it has none.

    Raises DataError for what is no batch.
    """
    images, labels, index = batch, None, None
    if isinstance(batch, Mapping):
        rest = dict(batch)
        labels, index = _taken(rest, LABELS), _taken(rest, INDEX)
        images = rest
    elif isinstance(batch, tuple | list):
        images, labels, index = (*batch, None, None, None)[:3]
    elif not isinstance(batch, Tensor | np.ndarray):
        raise DataError(f"a {type(batch).__name__} is no batch; use (images, labels, index), images or a mapping")
    if images is None or (isinstance(images, tuple | list | Mapping) and not len(images)):
        raise DataError("a batch has no inputs; use (images, labels, index), images or a mapping with inputs")
    return images, as_labels(labels), _as_index(index)


def as_labels(labels: Any) -> Any:
    """Labels as losses take them: numbers as a tensor, whole ones of 64 bits; anything else (boxes, say) as it is."""
    labels = _as_tensor(labels)
    plain = isinstance(labels, tuple | list) and labels
    if plain and all(isinstance(each, int | float | np.number) or _scalar(each) for each in labels):
        labels = torch.as_tensor([each.item() if isinstance(each, Tensor) else each for each in labels])
    if isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.dtype == torch.bool):
        return labels.long()
    return labels


def _scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _taken(rest: dict[Any, Any], keys: Iterable[str]) -> Any:
    """The first of `keys` that is there, taken out of a mapping."""
    return next((rest.pop(key) for key in keys if key in rest), None)


def _as_tensor(value: Any) -> Any:
    return torch.as_tensor(value) if isinstance(value, np.ndarray) else value


def _as_index(index: Any) -> Tensor:
    found = as_labels(index)
    whole = isinstance(found, Tensor) and found.dtype == torch.long and found.ndim == 1
    return found if whole else torch.empty(0, dtype=torch.long)


def side_by_side(images: Any, model: nn.Module) -> tuple[Inputs, int]:
    """V views as one batch of V·B, so that BatchNorm sees all of them; and B."""
    if isinstance(images, Mapping):
        views = [Inputs.of({name: value[view] for name, value in images.items()}) for view in range(_length(images))]
    else:
        views = [Inputs.of(view) for view in images]
    views = [view.onto(model) for view in views]
    joined: Inputs = pytree.tree_map(
        lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *views
    )
    return joined, views[0].samples


def _length(images: Mapping[str, Any]) -> int:
    return min(len(value) for value in images.values())


def views_in(batch: Any, views: int, asked: bool) -> int:
    """How many views of each sample a batch shows: `views`, or one where it is no stack of so many.

    asked: the caller named that number.

    Raises:
        DataError: it did, and the batch shows another one.
    """
    images, labels, index = unpacked(batch)
    samples = len(index) or (len(labels) if isinstance(labels, Tensor) and labels.ndim else None)
    stacked = isinstance(images, Tensor | Mapping)
    tensors = [leaf for leaf in pytree.tree_leaves(images) if isinstance(leaf, Tensor) and leaf.ndim]
    count = len(tensors[0]) if stacked and tensors else len(images)
    each = {tensor.shape[stacked] if tensor.ndim > stacked else 0 for tensor in tensors}
    if count == views and (samples is None or each <= {samples}):
        return views
    if asked and views > 1:
        shown = f"images of {tuple(tensors[0].shape)}" if stacked and tensors else several(count, "image")
        raise DataError(
            f"a batch has {shown}, which are not {views} views of each sample: stack as many augmented ones, "
            "V × B × …, or train with views=1"
        )
    return 1


def of_view(output: Any, samples: int, view: int) -> Any:
    """One view's part of every tensor in an output."""

    def part(place: str, tensor: Tensor) -> Tensor:
        return tensor[view * samples : (view + 1) * samples] if tensor.ndim else tensor

    return mapped(output, part)


def own_share(batch: Any, views: int, mates: Team) -> tuple[Any, Any, Tensor]:
    """This process's part of a batch."""
    images, labels, index = unpacked(batch)

    def part(value: Any, dim: int = 0) -> Any:
        def cut(whole: Tensor) -> Tensor:
            return whole.movedim(dim, 0)[mates.part(whole.shape[dim])].movedim(0, dim)

        return pytree.tree_map_only(Tensor, cut, value)

    stacked = views > 1 and isinstance(images, Tensor | Mapping)
    return part(images, 1 if stacked else 0), part(labels), part(index)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def half_of(model: nn.Module) -> torch.dtype | None:
    """The half precision that all of a model's parameters are in; None where they are not."""
    dtypes = precisions(model.parameters())
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return dtype if dtype in HALF else None


def precisions(values: Iterable[Any]) -> set[torch.dtype]:
    """The floating types among these tensors."""
    return {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}


def to_device(value: Any, device: torch.device) -> Any:
    """A value with all tensors in it on `device`."""
    return mapped(value, lambda _, tensor: tensor.to(device, non_blocking=True))
