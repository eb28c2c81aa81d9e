"""The running averages of a cut network's norms, corrected by what the cut changed (`ekgfx.execution.averages`)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.axes import Axis
from ekgfx.data.batches import Inputs
from ekgfx.execution.averages import Statistics, corrected
from ekgfx.execution.subnetwork import slice_tensor
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.tracing.traced import TracedModel

Hook = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]


class Correction:
    """Corrects the norms of a cut network, batch by batch.

    The uncut network sees a batch first. In the cut one each norm then normalizes it by the averages of before,
    corrected by how what it gets differs from what it got there, so that the norms behind it get what they will get.
    `finish` writes what all batches together say. A norm that the uncut network does not call takes the batch's own.

    Attributes:
        seen: how many samples each norm of the cut network was called with.
        alone: those that there was nothing to compare with.
    """

    def __init__(self, source: TracedModel, kept: Mapping[Axis, Tensor], norms: Mapping[str, nn.Module]) -> None:
        """kept: what the cut network keeps of `source`. norms: those of the cut network, by name."""
        dims = {id(source.tensor(name)): dim for name, dim in source.weight_dims().items()}
        self.source, self.kept, self.norms = source, kept, norms
        self.seen, self.alone = dict.fromkeys(norms, 0), set[str]()
        self._uncut = {
            name: norm
            for name, norm in source.model.named_modules()
            if name in norms and norm._buffers.get("running_var") is not None
        }
        self._dims = {name: dims.get(id(norm._buffers["running_var"])) for name, norm in self._uncut.items()}
        self._old = {name: self._sliced(name, _averages(norm)) for name, norm in self._uncut.items()}
        self._full: dict[str, list[Statistics]] = {}
        self._sums: dict[str, tuple[Statistics, Statistics]] = {}

    @contextmanager
    def batch(self, inputs: Inputs) -> Iterator[None]:
        """Within, the cut network must see the batch, in evaluation mode."""
        self._full = {}
        with _before_calls(self._uncut, self._note), evaluation_mode(self.source.model):
            inputs.onto(self.source.model).into(self.source.model)
        with _before_calls(self.norms, self._correct):
            yield

    def finish(self) -> None:
        """Writes the running averages of every norm that was called."""
        for name, (full, cut) in self._sums.items():
            _write(self.norms[name], self._new(name, full, cut))

    def _note(self, name: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._full.setdefault(name, []).append(self._sliced(name, _of_batch(norm, args, kwargs)))

    def _correct(self, name: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cut = _of_batch(norm, args, kwargs)
        calls = self._full.get(name)
        if not calls:
            self.alone.add(name)
        full = calls.pop(0) if calls else cut
        full = _each(full, lambda value: value.to(cut.var.device))
        samples = len(args[0]) if args else 1
        self.seen[name] += samples
        share = samples / self.seen[name]
        before = self._sums.get(name, (full, cut))
        self._sums[name] = _mean(before[0], full, share), _mean(before[1], cut, share)
        _write(norm, self._new(name, full, cut))

    def _new(self, name: str, full: Statistics, cut: Statistics) -> Statistics:
        if name in self.alone:
            return cut
        old = _each(self._old[name], lambda value: value.to(cut.var.device))
        return corrected(old, full, cut, getattr(self.norms[name], "eps", 0.0))

    def _sliced(self, name: str, found: Statistics) -> Statistics:
        """What is kept of the uncut network's statistics."""
        dims = self._dims[name]
        return found if dims is None else _each(found, partial(slice_tensor, dims=dims, kept=self.kept))


def _each(found: Statistics, change: Callable[[Tensor], Tensor]) -> Statistics:
    return Statistics(change(found.mean), change(found.var))


def _mean(before: Statistics, now: Statistics, share: float) -> Statistics:
    return Statistics(torch.lerp(before.mean, now.mean, share), torch.lerp(before.var, now.var, share))


def _averages(norm: nn.Module) -> Statistics:
    """A copy, in the precision that sums are taken in; the mean of one that keeps none is 0."""
    mean, var = norm._buffers.get("running_mean"), norm._buffers["running_var"]
    assert var is not None  # `norms` have one
    wide = torch.float64 if var.device.type == "cpu" or var.dtype == torch.float64 else torch.float32
    mean = torch.zeros_like(var) if mean is None else mean
    return _each(Statistics(mean, var), lambda value: value.to(wide, copy=True))


def _write(norm: nn.Module, found: Statistics) -> None:
    for name, value in zip(("running_mean", "running_var"), found, strict=True):
        buffer = norm._buffers.get(name)
        if buffer is not None:
            buffer.copy_(value)


def _of_batch(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Statistics:
    """Statistics of what a norm is called with, as it takes them in training; the norm is left as it was."""
    before = [(value, value.clone()) for value in norm._buffers.values() if value is not None]
    momentum, training = norm.momentum, norm.training
    norm.momentum, norm.training = 1.0, True
    try:
        norm.forward(*args, **kwargs)
        return _averages(norm)
    finally:
        norm.momentum, norm.training = momentum, training
        for value, old in before:
            value.copy_(old)


@contextmanager
def _before_calls(norms: Mapping[str, nn.Module], call: Hook) -> Iterator[None]:
    handles = [
        norm.register_forward_pre_hook(
            lambda norm, args, kwargs, name=name: call(name, norm, args, kwargs), with_kwargs=True
        )
        for name, norm in norms.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
