"""BatchNorm's running statistics for a network that was cut: corrected by what the cut changed, or estimated anew."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ekgfx.axes import Axis
from ekgfx.data.batches import Inputs, each_batch, unpacked
from ekgfx.data.mixing import Mixture, warn
from ekgfx.errors import DataError, PlanError
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.graph.plan import rounds_of
from ekgfx.surgery.correction import Correction
from ekgfx.tracing.traced import TracedModel, check_traced

log = logging.getLogger("ekgfx")

Model = TypeVar("Model", bound=nn.Module)
AVERAGES = ("running_mean", "running_var")


def calibrate(
    model: Model, batches: Iterable[Any], *, traced: TracedModel | None = None, limit: int | None = None
) -> Model:
    """Let the running statistics of every norm that has some (BatchNorm and its like) fit a cut network, in place.

    A cut changes what a norm gets, and the running averages are still those of before: evaluate nothing before this, or
    before training. With `traced` the averages of before are corrected by what the cut changed on the batches: they
    stay those of the images that the model was trained on, augmented as they were then. Without it they are replaced by
    the batches' own: the mean of their mean and variance, weighted by their samples.
    Only these change: no weight does, and everything but the norms is in evaluation mode. No labels are needed; where
    the batches have some, a warning is logged if they are sorted by class, since every batch should look like the data.

    Args:
        model: the pruned network, on any device; each module is put back in its own mode.
        batches: un-augmented training images in mixed order: tensors, `(inputs, ...)` or dictionaries. Inputs may be a
            tensor, a tuple of arguments, or a dictionary of keyword arguments. Some 1,000 images in batches of 64 or
            more will do. Where the model has no such norm, they are not read.
        traced: the model that `ekgfx.prune` made this one of, traced, with its weights as they were then.
        limit: at most this many batches.

    Returns:
        The model itself.

    Raises:
        DataError: there is no batch, a batch is too small to have statistics, or statistics are not finite. The model
            is as it was.
        PlanError: the model was not made of the traced one.

    Example:
        >>> pruned = ekgfx.prune(model, plan, traced)
        >>> ekgfx.calibrate(pruned, data.loader("train", 256), traced=traced, limit=4)
    """
    if traced is not None:
        check_traced(traced, "calibrate")
        if not rounds_of(model):
            raise PlanError("calibrate(traced=...) takes what ekgfx.prune made of the traced model; leave traced out")
        if model is traced.model:
            raise PlanError("the traced model itself was cut, and tells no more of what it was; leave traced out")
    kept = None if traced is None else traced.groups.kept(rounds_of(model)[-1])
    norms = estimated(model, batches, traced, kept, limit)
    what = (
        f"corrected the running statistics of {norms} norms" if norms else "no norm has running statistics to correct"
    )
    log.info("%s: %s", type(model).__name__, what)
    return model


def estimated(
    model: nn.Module,
    batches: Iterable[Any],
    source: TracedModel | None = None,
    kept: Mapping[Axis, Tensor] | None = None,
    limit: int | None = None,
    among: Collection[str] | None = None,
) -> int:
    """As `calibrate`, where the kept positions of the uncut model are at hand. Returns the number of norms.

    among: modules that alone are looked at.
    """
    averaging = {
        name: module for name, module in model.named_modules() if averages(module) and (among is None or name in among)
    }
    norms = {name: module for name, module in averaging.items() if hasattr(module, "momentum")}
    _say_kept([name for name in averaging if name not in norms], "have no momentum to estimate them by")
    if not norms:
        return 0
    mixture, known, number = Mixture(), None, 0
    correction = None if source is None else Correction(source, kept or {}, norms)
    with evaluation_mode(model), torch.no_grad(), _estimating(norms, correction) as (seen, seeing):
        for number, batch in enumerate(islice(each_batch(batches), limit), 1):
            given, labels, _ = unpacked(batch)
            inputs = Inputs.of(given)
            try:
                with seeing(inputs):
                    output = inputs.onto(model).into(model)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise DataError(f"batch {number} is too small to have statistics; give larger batches") from error
            mixture.see(labels)
            known = output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None
        if not number:
            raise DataError("there is no batch to calibrate on")
        if correction is not None:
            correction.finish()
        _check_finite({name: norm for name, norm in norms.items() if seen[name]})
    warn("the batches to calibrate on", mixture.fault(known))
    _say_kept([name for name in norms if not seen[name]], "are not run in evaluation")
    if correction is not None and correction.alone:
        log.warning(f"estimated anew, since the uncut model does not run them: {', '.join(sorted(correction.alone))}")
    return sum(map(bool, seen.values()))


def averages(module: nn.Module) -> dict[str, Tensor]:
    """The running averages that a module keeps itself."""
    return {name: value for name in AVERAGES if (value := module._buffers.get(name)) is not None}


def _say_kept(names: Sequence[str], reason: str) -> None:
    if names:
        listed = ", ".join(names[:3]) + (" ..." if names[3:] else "")
        log.warning(f"{len(names)} norms keep their old running statistics, since they {reason}: {listed}")


Seeing = Callable[[Inputs], AbstractContextManager[None]]


@contextmanager
def _estimating(
    norms: Mapping[str, nn.Module], correction: Correction | None
) -> Iterator[tuple[Mapping[str, int], Seeing]]:
    """Yields how many samples each norm was called with, and what a batch is seen within. The norms' state is put back
    where that fails."""
    before = [
        (value, value.clone()) for norm in norms.values() for value in norm._buffers.values() if value is not None
    ]
    try:
        if correction is not None:
            yield correction.seen, correction.batch
        else:
            with _averaging(norms) as seen:
                yield seen, lambda inputs: nullcontext()
    except BaseException:
        for value, old in before:
            value.copy_(old)
        raise


@contextmanager
def _averaging(norms: Mapping[str, nn.Module]) -> Iterator[Mapping[str, int]]:
    """The norms average over all samples that they are called with; yields how many those were."""
    seen = dict.fromkeys(norms, 0)
    momenta = {name: norm.momentum for name, norm in norms.items()}

    def before_call(norm: nn.Module, inputs: tuple[Any, ...], name: str) -> None:
        if not seen[name]:
            for key, value in norm._buffers.items():
                if value is not None and key in (*AVERAGES, "num_batches_tracked"):
                    value.fill_(key == "running_var")  # what is not finite would stay so
        samples = len(inputs[0]) if inputs else 1
        seen[name] += samples
        norm.momentum = samples / seen[name]  # type: ignore[assignment]  # torch's stubs know modules and tensors alone

    handles = [
        norm.register_forward_pre_hook(lambda norm, inputs, name=name: before_call(norm, inputs, name))
        for name, norm in norms.items()
    ]
    try:
        for norm in norms.values():
            norm.training = True  # not what is inside of it, such as dropout
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            norm.momentum = momenta[name]


def _check_finite(norms: Mapping[str, nn.Module]) -> None:
    for name, norm in norms.items():
        if not all(value.isfinite().all() for value in averages(norm).values()):
            raise DataError(f"the statistics of {name} are not finite; check the images and the weights for NaN")
