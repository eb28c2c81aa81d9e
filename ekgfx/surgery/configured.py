"""The configuration of a pruned network, where some values of the model's own describe it."""

import copy
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from ekgfx.axes import count
from ekgfx.graph.plan import Plan
from ekgfx.graph.ties import Ties
from ekgfx.graph.ways import undisturbed
from ekgfx.surgery.check import relative_error
from ekgfx.surgery.configurations import configuration, hold
from ekgfx.surgery.description import description
from ekgfx.surgery.rebuilt import Trial, built_anew, get, put, shell
from ekgfx.tracing.traced import TracedModel


def configuration_of(traced: TracedModel, plan: Plan) -> Any | str | None:
    """A copy of the model's configuration that builds the network which a plan leaves; a sentence where no values of it
    do; None where no configuration builds the model."""
    described = description(traced)
    if described is None:
        kind = type(traced.model)
        loads = configuration(traced.model) is not None and hasattr(kind, "from_pretrained")
        return f"{kind.__name__} could not be built from its own" if loads else None
    fault = _broken(traced, described.ties(traced.groups), plan)
    if plan.dropped:
        fault = f"{plan.dropped[0]} would have to stay"
    if fault is not None:
        return fault
    config = copy.deepcopy(configuration(traced.model))
    counts = {axis: len(kept) for axis, kept in traced.groups.kept(plan).items()}
    for number, value in described.numbers(config, counts).items():
        put(config, number, value)
    built = shell(traced.model, config)
    if built is None:
        return f"{type(traced.model).__name__} cannot be built with the configuration of the cut"
    for name, exprs in traced.weight_dims().items():
        wanted = tuple(count(expr, counts) for expr in exprs)
        if built.shapes.get(name, wanted) != wanted:
            return f"{name} would be {built.shapes[name]}, not {wanted}"
    return config


def numbers_of(traced: TracedModel, plan: Plan) -> dict[tuple[str, str], tuple[int, int]]:
    """Module and attribute → a whole number as it is, and as it is in a model that is built for the widths of a plan.

    A run of the example may not need such a number, as that of query heads for each key where a kernel finds it itself;
    another call does, as with a mask. What depends on a width that the configuration cannot say is left as it is.
    """
    described = description(traced)
    if described is None or plan.dropped:
        return {}
    config, counts = configuration(traced.model), {axis: len(kept) for axis, kept in traced.groups.kept(plan).items()}
    built = shell(traced.model, config)
    if built is None:
        return {}
    trial = Trial(traced.model, built)
    shares = {f: {Fraction(count(p, counts), p.size) for p in parts} for f, parts in described.parts.items()}
    said = {f: get(config, f) * share for f, (share, *others) in shares.items() if not others and share != 1}
    made = trial.whole({f: int(number) for f, number in said.items() if number == int(number)})
    unsaid = [f for f, some in shares.items() if len(some) > 1 or said.get(f, Fraction()).denominator > 1]
    others: set[tuple[str, str]] = set()
    for changed in (trial.whole({f: 2 * get(config, f)}) for f in unsaid):
        if changed is None:
            return {}
        others |= changed.keys()
    return {place: (built.whole[place], new) for place, new in (made or {}).items() if place not in others}


def configure(pruned: nn.Module, config: Any | str | None, source: TracedModel | None = None) -> str:
    """Let a cut model hold the configuration that `configuration_of` found; what to tell its user, "" for nothing.

    source: the model before the cut, where it is to be tried whether a model that is built anew computes the same.
    """
    if config is None:
        return ""
    kind = type(pruned).__name__
    help = f"ekgfx.save and ekgfx.load keep it, {kind}.from_pretrained does not; search(uniform_layers=True) finds such"
    if isinstance(config, str):
        return f"no configuration of {kind} describes this cut: {config}; {help}"
    known = configuration(pruned)
    hold(pruned, config)
    if source is None:
        return ""
    try:
        off = _off(pruned, built_anew(pruned, config), source)
    except Exception as error:  # noqa: BLE001  whatever the library raises of what it is given
        off = f"raises {type(error).__name__}: {' '.join(str(error).split())}"
    if off:
        hold(pruned, known)
        return f"no configuration of {kind} describes this cut: a model that is built anew {off}; {help}"
    return ""


def _off(pruned: nn.Module, anew: nn.Module, source: TracedModel) -> str:
    """How the output of a model that was built anew differs from the cut one's; "" where it does not."""
    args, kwargs = source.example
    with torch.no_grad(), source.way.entered(pruned), source.way.entered(anew), undisturbed(pruned):
        error = relative_error(anew(*args, **kwargs), pruned(*args, **kwargs))
    return "" if error <= 1e-3 else f"computes something else (by {error:.1e})"


def _broken(traced: TracedModel, ties: Ties, plan: Plan) -> str | None:
    """What of a plan the ties do not allow, in words."""
    widths = traced.groups.widths(plan)
    for name, why in ties.held.items():
        if widths[name] != traced.groups[name].size:
            return f"{name} would have to stay whole ({why})"
    for tie in ties.ties:
        steps = {name: widths[name] / step for name, step in tie.members.items()}
        if len({*steps.values()}) > 1:
            other = next(name for name in steps if steps[name] != steps[tie.name])
            return (
                f"{tie.name} keeps {widths[tie.name]} channels and {other} {widths[other]}, and one number stands for "
                f"both ({tie.why[0]})"
            )
    return None
