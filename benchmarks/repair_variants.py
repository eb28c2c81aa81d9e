"""What was tried to make a repair better, and is not in the package: ResNet-20 on CIFAR-10, at half of its MACs.

    python benchmarks/repair_variants.py --images cifar10:DIR --weights resnet20-cifar10.safetensors \
        --output benchmarks/results/repair_variants.jsonl

per output: λ is chosen for each output by itself, since the sum over outputs is ruled by those whose targets are large.
own ridge: so it is, and half of the ridge is in proportion to each input's own second moment instead of to their mean.
half the variance, whole variance: per output, and the outputs, whose variance a regression shrinks, get the targets'
back (by half: its square root). pooled: per output, and held-out images are fitted as well, once λ is chosen without
them; what judges is then no longer held out. mirrored: `ekgfx.repair(..., mirrored=True)`.

300 training images are repaired on, accuracy, loss and KL divergence from the unpruned network are those of the first
3,000 test images. A line of the output is one network; one that is there is not measured again.
"""

import argparse
import functools
import importlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import repair as bench
import torch
from common import Lines, chosen, environment
from torch import Tensor

import ekgfx
from ekgfx import data as datasets
from ekgfx.data.batches import Inputs
from ekgfx.models import resnet20_cifar
from ekgfx.models.weights import load_weights
from ekgfx.repair.judge import Judge
from ekgfx.repair.moments import Moments
from ekgfx.repair.operators import shifted
from ekgfx.repair.solve import Refit, _first, _offset, _solve, refit
from ekgfx.repair.walk import Pair
from ekgfx.training.evaluation import evaluate

PLANS = ("L1, uniform", "random, uniform")
refitting = importlib.import_module("ekgfx.repair.refitting")


def per_output(fit: Moments, held: Moments, offset: bool, own: float = 0.0) -> Refit | None:
    """As `refit`, but every output has the λ that is best for it. own: share of the ridge by an input's own moment."""
    gram, cross, _ = fit.centered() if offset else fit.raw()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    d = own * diagonal + (1 - own) * diagonal.mean(1, keepdim=True)
    held_gram, held_cross, squares = held.centered() if offset else held.raw()
    change = torch.zeros_like(cross)
    shift = torch.zeros_like(fit.rest) if offset else None
    best, ridge = torch.full_like(squares, math.inf), torch.full_like(squares, math.inf)

    def take(new: Tensor, moved: Tensor | None, at: float) -> float:
        """Takes it for the outputs that it is better for; their share."""
        nonlocal best, change, shift, ridge
        error = squares + (new * (new @ held_gram - 2 * held_cross)).sum(2)
        if moved is not None:
            error = error + held.count * (_offset(held, new) - moved).square()
        better = error.clamp_min(0) < best
        best, ridge = torch.where(better, error.clamp_min(0), best), torch.where(better, at, ridge)
        change = torch.where(better[:, :, None], new, change)
        shift = None if shift is None or moved is None else torch.where(better, moved, shift)
        return float(better.double().mean())

    def at(value: float) -> float:
        new = _solve(gram, cross, value * d)
        return 0.0 if new is None else take(new, _offset(fit, new) if offset else None, value)

    take(torch.zeros_like(cross), None if shift is None else torch.zeros_like(shift), math.inf)
    start = best.clone()
    if offset:
        take(torch.zeros_like(cross), _offset(fit, torch.zeros_like(cross)), math.inf)
    at(first := _first(fit))
    for factor in (0.1, 10.0):
        value = first
        while 1e-13 < value * factor < 1e3:
            value *= factor
            if at(value) < 0.05:
                break
    if not bool((best < start).any()):
        return None
    scale = held.scale or 1
    middle = float(ridge.median())
    return Refit(change, shift, middle, 0, 0, float(start.sum()) / scale, float(best.sum()) / scale)


def pooled(pair: Pair) -> Moments:
    """Of the fitted and the held-out positions."""
    names = (field.name for field in fields(Moments) if field.name != "shift")
    return replace(pair.fit, **{name: getattr(pair.fit, name) + getattr(pair.held, name) for name in names})


def on_all(found: Refit, pair: Pair, matrix: Tensor) -> Refit:
    """The refit at that λ on all images."""
    if math.isinf(found.ridge):
        return found
    every = pooled(pair)
    gram, cross, _ = every.centered()
    change = _solve(gram, cross, found.ridge * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    return found if change is None else replace(found, change=change, offset=_offset(every, change))


def restored(found: Refit, pair: Pair, matrix: Tensor, power: float = 1.0) -> Refit:
    """The outputs' variance is the targets', by at most three times the deviation."""
    every = pooled(pair)
    gram, _, _ = every.centered()
    new = matrix.double() + found.change
    has = ((new @ gram) * new).sum(2).clamp_min(0)
    wanted = every.target_squares - every.target.square() / every.count
    gain = torch.where(has > 1e-9 * wanted, (wanted / has.clamp_min(1e-300)).sqrt(), 1.0).clamp(1.0, 3.0) ** power
    change = new * gain[:, :, None] - matrix.double()
    return replace(found, change=change, offset=_offset(every, change))


Fit = Callable[[Moments, Moments, bool], Refit | None]
Then = Callable[[Refit, Pair, Tensor], Refit]
VARIANTS: dict[str, tuple[Fit, Then | None]] = {
    "as it is": (refit, None),
    "mirrored": (refit, None),
    "per output": (per_output, None),
    "own ridge": (functools.partial(per_output, own=0.5), None),
    "half the variance": (per_output, functools.partial(restored, power=0.5)),
    "whole variance": (per_output, restored),
    "pooled": (per_output, on_all),
}


@contextmanager
def varied(fit: Fit, then: Then | None) -> Iterator[None]:
    """Operators are refitted so; the last one, whose output no norm follows, keeps its variance."""

    def repair_operators(walk: Any, operators: Any, progress: Any, on_layer: Any) -> list[Any]:
        done = []
        operators = sorted(operators, key=lambda operator: walk.order[operator.node])
        for number, operator in enumerate(operators):
            pair = walk.measure(operator, number)
            found = None if pair.exact else fit(pair.fit, pair.held, operator.offset is not None)
            if found is None:
                continue
            matrix = operator.form.matrix(walk.constants[walk.pruned][operator.weight.name])
            last = operator is operators[-1] and getattr(then, "func", then) is restored
            if then is not None and operator.offset is not None and not last:
                found = then(found, pair, matrix)
            walk.take(shifted(operator, walk.pruned.weights, found.change, found.offset))
            done.append(refitting._record(operator.name, pair, found, 0.0))
        return done

    package = importlib.import_module("ekgfx.repair")
    own, package.repair_operators = package.repair_operators, repair_operators  # type: ignore[attr-defined]
    try:
        yield
    finally:
        package.repair_operators = own  # type: ignore[attr-defined]


def prepare(asked: argparse.Namespace) -> tuple[bench.Subject, Judge]:
    """The network, its images, and the judge on test images."""
    model = resnet20_cifar().eval()
    load_weights(model, Path(asked.weights))
    normal: Any = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    data = datasets.load(asked.images, mean=normal[0], std=normal[1], seed=0)
    order = torch.randperm(data.size("train"), generator=torch.Generator().manual_seed(asked.seed))[: asked.count]
    seen = [(batch.images, batch.labels) for batch in data.loader("train", 64, subset=order)]
    tested = torch.arange(asked.test_images)
    traced = ekgfx.trace(model, torch.randn(2, 3, 32, 32))
    subject = bench.Subject(traced, data, seen, asked, lambda: data.loader("test", 250, subset=tested))
    return subject, Judge(model, [Inputs.of(batch.images) for batch in subject.test()])


def main() -> None:
    asked = arguments()
    torch.set_num_threads(1)
    prepared, lines = functools.cache(lambda: prepare(asked)), Lines(asked.output)
    for name in asked.plans:
        for variant in asked.variants:
            key = {"plan": name, "variant": variant, **chosen(asked, "keep", "count", "test_images", "seed")}
            if key in lines:
                continue
            subject, judge = prepared()
            plan, started = subject.plan(name), time.process_time()
            pruned = ekgfx.prune(subject.traced.model, plan, subject.traced).eval()
            how = {"most": asked.count, "seed": asked.seed, "mirrored": variant == "mirrored"}
            with varied(*VARIANTS[variant]):
                found = ekgfx.repair(pruned, subject.traced, plan, subject.images, **how)
            seconds = round(time.process_time() - started, 1)
            score, apart = evaluate(pruned, subject.test()), judge(pruned)
            row = {"accuracy": score.accuracy, "loss": score.loss, "kl": apart.error, "held_out": found.after.error}
            lines.add({**key, **row, "batch_norm": found.batch_norm, "cpu_seconds": seconds, **environment()})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", required=True, help="data SPEC")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--plans", type=lambda text: text.split(";"), default=list(PLANS))
    parser.add_argument("--variants", type=lambda text: text.split(";"), default=list(VARIANTS))
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--test-images", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.history = ""
    return asked


if __name__ == "__main__":
    main()
