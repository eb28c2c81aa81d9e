"""What goes into a model and what comes out of it, by name: shared by the exporter, the parity check and the timing."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.base.containers import tensors_by_place
from ekgfx.errors import ExportError

PRECISION = "ekgfx.precision"
"""Metadata of a file: what it computes in."""

Given = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""The inputs of a model: one tensor, several by position, or by the names of its forward's parameters."""


def as_inputs(example_inputs: Tensor | Sequence[Tensor], names: Sequence[str] = ()) -> tuple[Tensor, ...]:
    """The inputs of a model as a tuple of tensors, the first of which has the batch as its dim 0 (see `batched`).

    names: what they are called, where they are given by name.

    Raises ExportError for anything else.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    for place, value in zip(names or range(len(inputs)), inputs, strict=True):
        if not isinstance(value, Tensor):
            raise ExportError(
                f"input {place} is a {type(value).__name__}; ONNX takes tensors only: wrap the model in a module "
                "whose forward takes tensors and makes the other arguments itself"
            )
    if not any(value.ndim for value in inputs):
        raise ExportError("no input has a batch dimension; give example inputs whose dim 0 is the batch")
    if not batch_size(inputs):
        raise ExportError("dim 0 of the inputs has the size 0; give a batch of one or more")
    return inputs


def with_names(given: Given) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The inputs as of `as_inputs`, and their names; () where they are given by position."""
    if isinstance(given, Mapping):
        return as_inputs(tuple(given.values()), tuple(given)), tuple(given)
    return as_inputs(given), ()


def called(model: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> Any:
    """What a model makes of its inputs; names: of those that are given by name, () for none."""
    return model(**dict(zip(names, inputs, strict=True))) if names else model(*inputs)


def batch_size(inputs: Sequence[Tensor]) -> int:
    """The size of dim 0 of the first input that has one."""
    return next(value.shape[0] for value in inputs if value.ndim)


def batched(inputs: Sequence[Tensor]) -> list[bool]:
    """Of each input whether its dim 0 is the batch: it is as long as the first one's. Others are tables or numbers, the
    same for every batch."""
    batch = batch_size(inputs)
    return [value.ndim > 0 and len(value) == batch for value in inputs]


def with_batch(inputs: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
    """The same samples over and over until there are `batch` of them (or the first `batch` of them)."""
    index = torch.arange(batch) % batch_size(inputs)
    return tuple(
        value[index.to(value.device)] if free else value for value, free in zip(inputs, batched(inputs), strict=True)
    )


def input_names(model: nn.Module, count: int) -> list[str]:
    """The first `count` parameter names of the model's forward; a *args parameter gives args_0, args_1, …"""
    names: list[str] = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{name}_{i}" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
    if len(names) < count:
        raise ExportError(
            f"{type(model).__name__}.forward takes {len(names)} positional inputs ({', '.join(names)}), "
            f"but {count} were given"
        )
    return names[:count]


def named_tensors(output: object) -> dict[str, Tensor]:
    """The tensors in a model's output by their place in it.

    A lone tensor is "output"; in a list they are "output_0", "output_1", …; in a dict they have their keys, nested
    places joined by "_". Other values (None, numbers) are left out: they are the same for every input.
    """
    found: dict[str, Tensor] = {}
    for place, tensor in tensors_by_place(output).items():
        name = place.replace(".", "_")
        found[f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name] = tensor
    if not found:
        raise ExportError(f"the model returns no tensor but {type(output).__name__}; return the tensors to export")
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
