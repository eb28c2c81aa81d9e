"""Which INT8 file is the best one? Told by images that it was not calibrated on, without labels."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from ekgfx.base.units import several
from ekgfx.data.batches import Inputs
from ekgfx.errors import ExportError
from ekgfx.repair.images import gather
from ekgfx.repair.judge import Judge, Judgement

from .exporter import write
from .int8 import METHODS, SCOPES, Quantizer, Recipe, scratch, understood, with_inputs
from .latency import clock_of, interleave
from .processor import no_integer_unit
from .providers import provider
from .runners import onnx_runner
from .session import feeds, open_session

IMAGES = 128
"""Images that are used: every other one to calibrate on, the rest to judge by."""
ENOUGH = 0.01
"""A loss below which nothing more is tried, and by which a faster file may be worse than the best one."""
SHOWN = 2
"""Images on which all values are compared."""


@dataclass(frozen=True)
class Trial:
    """One quantization. loss: the share of held-out images for which it says another class than the fp32 file, or the
    squared difference of the outputs in their own squares where they are no classes; error: that, or the KL divergence;
    ms: of a run at batch 1, None where it was not timed."""

    method: str
    scope: str
    kept: tuple[str, ...]
    loss: float
    error: float | None
    ms: float | None = None


@dataclass(frozen=True)
class Int8:
    """What became INT8, and how well. agreement: with the fp32 file on images that were held out, None where the
    outputs are no classes; kept: layers with weights that stay in floating point; tried: every quantization; notes:
    what is to be known, in one line each."""

    method: str
    scope: str
    kept: tuple[str, ...]
    agreement: float | None
    error: float | None
    images: int
    held_out: int
    tried: tuple[Trial, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = f"INT8: {self.scope}, ranges by {self.method}, from {several(self.images, 'image')}"
        if self.kept:
            said += f"; in floating point: {', '.join(self.kept)}"
        if self.agreement is not None:
            return f"{said}; {self.agreement:.1%} of {self.held_out} others get the answer of fp32"
        shown = "no number" if self.error is None else f"{self.error:.1e}"
        return f"{said}; squared difference from fp32 on {self.held_out} others {shown}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def to_int8(
    file: str | os.PathLike[str],
    path: str | os.PathLike[str],
    images: Tensor | Iterable[Any],
    *,
    most: int = IMAGES,
    threads: int = 1,
    output: str | None = None,
    methods: Sequence[str] = tuple(METHODS),
    scopes: Sequence[str] = tuple(SCOPES),
    on_trial: Callable[[Trial], None] | None = None,
) -> Int8:
    """Write an fp32 file of `to_onnx` again in INT8, by onnxruntime's static quantization.

    Half of the images give the ranges of the values, the other half chooses: first which operators become INT8 (the
    fastest of those that lose no more than 1% over the best), then how ranges are found, then, where more than 1% of
    the answers still differ, which layers stay in floating point (those that add most noise, as long as that helps).

    Args:
        file: fp32, its batch size free.
        path: the INT8 file; inputs and outputs stay fp32.
        images: B×…, or batches of them (a tensor, or a tuple that begins with one; the rest is not looked at). Labels
            are not needed.
        most: images that are used at most.
        threads: CPU threads; 0 for all.
        output: name of the output that is judged by; by default all.
        methods: how ranges may be found, of `int8.METHODS`.
        scopes: which operators may become INT8, of `int8.SCOPES`.
        on_trial: called with each quantization, for progress.

    Returns:
        What was chosen, how many answers are those of the fp32 file, and what was tried.

    Raises:
        ExportError: there are no two images, onnxruntime cannot quantize the file or run the result, or no quantization
            gives numbers.

    Example:
        >>> made = ekgfx.export.to_int8("net.onnx", "net-int8.onnx", images, methods=["min-max"], scopes=["products"])
        >>> print(made.agreement)
    """
    file, path = Path(file), Path(path)
    fit, held, notes = _halves(images, most)
    if not held:
        raise ExportError(
            f"INT8 needs images to calibrate on and others to judge by, and there are {len(fit)}; give more"
        )
    if doubt := no_integer_unit():
        notes = (*notes, doubt)
    with scratch() as folder:
        search = _Search(
            Quantizer(file, [inputs.args for inputs in fit], Path(folder), threads),
            Judge(onnx_call(file, threads, output), held),
            output,
        )
        search.told = on_trial
        best = search.scope(scopes)
        best = search.method(best, [name for name in methods if name != best.recipe.method])
        best = search.keeping(best)
        if best.judged.error is None:
            raise ExportError(f"the INT8 file of {file} gives values that are no numbers; export it in fp32")
        write(ir.from_proto(onnx.load(best.path)), path)
        recipe, judged, kept = best.recipe, best.judged, tuple(search.quantizer.kept(best.recipe))
    return Int8(
        recipe.method,
        recipe.scope,
        kept,
        judged.agreement,
        judged.error,
        len(fit),
        len(held),
        tuple(search.trials),
        notes,
    )


@dataclass(frozen=True)
class _Made:
    recipe: Recipe
    path: Path
    judged: Judgement

    @property
    def loss(self) -> float:
        if self.judged.error is None:
            return float("inf")
        return self.judged.error if self.judged.agreement is None else 1 - self.judged.agreement

    @property
    def rank(self) -> tuple[float, float]:
        """Less is better: answers first, then how far the outputs are off."""
        return self.loss, float("inf") if self.judged.error is None else self.judged.error


class _Search:
    """The quantizations of one file that were tried."""

    def __init__(self, quantizer: Quantizer, judge: Judge, output: str | None) -> None:
        self.quantizer, self.judge, self.output = quantizer, judge, output
        self.trials: list[Trial] = []
        self.told: Callable[[Trial], None] | None = None

    def made(self, recipe: Recipe) -> _Made:
        path = self.quantizer.folder / f"{len(self.trials)}.onnx"
        self.quantizer(recipe, path)
        with understood(f"the INT8 file of {self.quantizer.file} does not run ({recipe})"):
            judged = self.judge(onnx_call(path, self.quantizer.threads, self.output))
        made = _Made(recipe, path, judged)
        trial = Trial(recipe.method, recipe.scope, tuple(self.quantizer.kept(recipe)), made.loss, made.judged.error)
        self.trials.append(trial)
        if self.told is not None:
            self.told(trial)
        return made

    def scope(self, scopes: Sequence[str]) -> _Made:
        """The fastest of those that are hardly worse than the best one."""
        different = {self.quantizer.covers(scope): scope for scope in reversed(scopes)}
        found = [self.made(Recipe(scope=scope)) for scope in reversed(different.values())]
        good = [made for made in found if made.loss <= min(other.loss for other in found) + ENOUGH]
        if len(good) == 1:
            return good[0]
        times = self.clocked(good)
        for made, ms in zip(good, times, strict=True):
            number = found.index(made)
            self.trials[number] = replace(self.trials[number], ms=ms)
        return good[int(np.argmin(times))]

    def clocked(self, made: Sequence[_Made]) -> list[float]:
        place, threads, inputs = provider("cpu"), self.quantizer.threads, self.judge.calls[0].args
        runners = {
            str(one.path): onnx_runner(one.path, place, "int8", inputs, threads=threads, cpu_fallback=False)
            for one in made
        }
        times = interleave(runners, runs=20, seconds=5.0, warmup=2, clock=clock_of(threads, on_cpu=True))
        return [float(np.median(times[str(one.path)])) * 1e3 for one in made]

    def method(self, best: _Made, methods: Sequence[str]) -> _Made:
        """The ranges of most agreement."""
        others = [self.made(replace(best.recipe, method=method)) for method in methods]
        return min((best, *others), key=lambda made: made.rank)

    def keeping(self, best: _Made) -> _Made:
        """Ever more of the noisiest layers in floating point, while that helps."""
        if best.loss <= ENOUGH:
            return best
        noisy = self.quantizer.noisiest(best.path, [inputs.args for inputs in self.judge.calls[:SHOWN]])
        count = 1
        while best.loss > ENOUGH and count <= max(1, len(noisy) // 2):
            keep = with_inputs(self.quantizer.model, noisy[:count])
            other = self.made(replace(best.recipe, keep=keep))
            if other.loss >= best.loss and count > 1:
                break
            best = min(best, other, key=lambda made: made.rank)
            count *= 2
        return best


def onnx_call(file: Path, threads: int, output: str | None = None) -> Callable[..., list[Tensor]]:
    """The file as a function of tensors; output: the name of the one that is wanted, None for all."""
    session = open_session(file, threads=threads)
    names = None if output is None else [output]

    def run(*inputs: Tensor) -> list[Tensor]:
        return [torch.as_tensor(value) for value in session.run(names, feeds(session, inputs))]

    return run


def _halves(images: Tensor | Iterable[Any], most: int) -> tuple[list[Inputs], list[Inputs], tuple[str, ...]]:
    """To calibrate on and to judge by, one sample each, and what was left out."""
    found = gather(images, 1, most, torch.nn.Identity())  # a file takes them on the CPU, by position
    single = [*found.fit, *found.held]
    return single[::2], single[1::2], found.notes
