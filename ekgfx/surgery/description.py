"""What a model's own configuration can say of its widths.

Libraries build their models from a configuration, and load saved weights into a model that is built from the saved
configuration anew. So a pruned network can be taken back by `from_pretrained` only where some values of the
configuration build it. Which of its numbers stands for which dimensions is found by trying: the model is built again
without memory (on the meta device) with one number doubled, and what doubles is what it stands for. (Tripled, where two
widths would become equal, and a layer between them be left out.)

A number may also split a dimension without changing it, as the number of heads splits the width into heads; then whole
heads go with the width, since a head's width is in the scale of its products. A number that changes other values of the
model than whole ones (such a scale) stays, for the model that is built anew would compute something else, unless the
scale is what it was once the numbers of heads in that width grow with it. Where a model cannot be built with one number
doubled, another one of the same value may have to be equal to it.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ekgfx.axes import Axis, Expr, axes, count
from ekgfx.execution.subnetwork import SubNetwork, slice_weights
from ekgfx.graph.groups import Groups
from ekgfx.graph.ties import Ties, Width, tied
from ekgfx.surgery.check import relative_error
from ekgfx.surgery.configurations import configuration
from ekgfx.surgery.growing import Parts, equal_numbers, grown_by_one, of_several_axes, of_several_numbers
from ekgfx.surgery.outline import factors_of
from ekgfx.surgery.rebuilt import (
    Dimension,
    Field,
    Trial,
    built_anew,
    get,
    name_of,
    numbers_in,
    put,
    runs,
    saved_by,
    shell,
)
from ekgfx.tracing.traced import TracedModel


@dataclass(frozen=True)
class Described:
    """What the numbers of a configuration stand for. parts: number → what grows with it. held: group → why it stays
    whole: no number can say how wide it is. steps: group → in how many equal steps the configuration lets it shrink."""

    parts: Mapping[Field, Sequence[Expr]]
    held: Mapping[str, str]
    steps: Mapping[str, int] = field(default_factory=dict)

    @property
    def widths(self) -> list[Width]:
        """Every number as the dimensions that it stands for."""
        return [Width(tuple(parts), f"config.{name_of(number)}") for number, parts in self.parts.items()]

    def ties(self, groups: Groups, others: Sequence[Width] = ()) -> Ties:
        """What the configuration asks of the groups, with other widths that hold as well."""
        return tied(groups, [*others, *self.widths], self.held, self.steps)

    def numbers(self, config: Any, counts: Mapping[Axis, int]) -> dict[Field, int]:
        """What the numbers are when the axes keep `counts` positions."""
        return {f: get(config, f) * count(parts[0], counts) // parts[0].size for f, parts in self.parts.items()}


FAILS, UNLIKE = "raises ", "loading state_dict"
"""How a fault is told of a model that does not run, and what is in it where it has other weights."""
_KNOWN: WeakKeyDictionary[TracedModel, Described | None] = WeakKeyDictionary()


def description(traced: TracedModel) -> Described | None:
    """What the numbers of the model's configuration stand for; None where no configuration builds it."""
    if traced not in _KNOWN:
        _KNOWN[traced] = _describe(traced)
    return _KNOWN[traced]


def _describe(traced: TracedModel) -> Described | None:
    model = traced.model
    config = configuration(model)
    if config is None:
        return None
    built, dims = shell(model, config), traced.weight_dims()
    sizes_of = {name: tuple(dim.size for dim in exprs) for name, exprs in dims.items()}
    if built is None or any(built.shapes[name] != sizes_of[name] for name in dims.keys() & built.shapes.keys()):
        return None
    trial = Trial(model, built)
    found, chosen = _read(traced, config, trial)
    if found.held and chosen:  # another number than the one that was taken may say a width
        other, _ = _read(traced, config, trial, chosen)
        found = min(found, other, key=lambda each: len(each.held))
    return found


def _read(
    traced: TracedModel, config: Any, trial: Trial, later: frozenset[Field] = frozenset()
) -> tuple[Described, frozenset[Field]]:
    """What the numbers stand for, and which of them were taken for a width that others say as well: those of `later`
    where there is no other."""
    dims, found = traced.weight_dims(), Parts()
    places = {(p.parameter, p.dim): dims[p.parameter][p.dim] for g in traced.groups.values() for p in g.places}
    sizes = {part.size for expr in places.values() for part in runs(expr)}
    numbers = {number: old for number, old in numbers_in(config) if old in sizes}
    equal = equal_numbers(numbers, trial)
    numbers = {number: old for number, old in numbers.items() if number not in equal.values()}
    times = {number: trial.times(number, old) for number, old in numbers.items()}

    def more(number: Field, by: int) -> dict[Field, int]:
        """A number so many times, with the one that has to be equal to it."""
        return {field: by * get(config, field) for field in (number, equal.get(number)) if field is not None}

    tried = {number: more(number, by) for number, by in times.items()}
    grows = {number: _powers(trial.grown(tried[number]), by) for number, by in times.items()}
    splitting = {n: old for n, old in numbers.items() if 1 not in grows[n].values() and trial.splits(tried[n])}
    fixed = later | frozenset(  # that say more than widths, with whatever number of heads
        number
        for number, by in times.items()
        if trial.others(tried[number]) and all(trial.others(tried[number] | more(heads, by)) for heads in splitting)
    )
    several = grown_by_one(places, numbers, grows, fixed, found)
    partners = of_several_axes(several, splitting, times, found)
    for number in numbers:
        if number in found.parts and number not in splitting and trial.others(tried[number] | partners.get(number, {})):
            partners |= of_several_numbers(number, times[number], more, trial, found)
    follow = {*splitting, *(other for others in partners.values() for other in others)}  # with the width they are in
    for number in found.parts.keys() & numbers.keys() - follow:
        if changed := trial.others(tried[number] | partners.get(number, {})):
            for part in found.parts[number]:
                found.hold(axes(part), f"config.{name_of(number)} also says {changed}")
    saved = saved_by(traced.model)
    for name, exprs in dims.items():
        if name not in saved:  # the library computes it anew when it builds the model
            found.hold((axis for expr in exprs for axis in axes(expr)), f"{name} is not saved")
    named = {group.axis: group.name for group in traced.groups.values()}
    held = {named[axis]: why for axis, why in found.held.items() if axis in named}
    parts = found.all()
    parts |= {other: parts[number] for number, other in equal.items() if number in parts}
    return _checked(traced, Described(parts, held), trial), frozenset(found.chosen)


def _powers(grown: Mapping[Dimension, Fraction], by: int) -> dict[Dimension, int]:
    """The dimensions that change where a number grows so many times: 1 as it does, -1 as its inverse, 0 otherwise."""
    return {place: (factor == by) - (factor * by == 1) for place, factor in grown.items()}


def _checked(traced: TracedModel, found: Described, trial: Trial) -> Described:
    """In how many steps what the configuration ties can shrink: it may refuse numbers, as a width that is no multiple
    of the number of heads. Of two that cannot shrink independently, the one of fewer channels stays whole."""
    groups, held = traced.groups, dict(found.held)
    steps: dict[str, int] = {}
    bound: list[list[str]] = []  # those of which some numbers are refused, which may depend on others

    def takes(*shrunk: tuple[Sequence[str], int, int]) -> bool:
        """Whether it takes numbers for groups with such a share (numerator and denominator) of their channels."""
        counts = {groups[n].axis: groups[n].size * a // b for names, a, b in shrunk for n in names}
        return trial.of(found.numbers(configuration(traced.model), counts)) is not None

    ties = found.ties(groups)
    together = [list(tie.members) for tie in ties.ties]
    together += [[name] for name in groups if name not in ties.held and not any(name in names for names in together)]
    for names in together:
        each = gcd(*(groups[name].size for name in names))
        most, fault = 1, ""
        for n in (n for n in range(each, 1, -1) if each % n == 0 and takes((names, n - 1, n))):
            most, fault = n, _another(traced, found, names, n)
            if not fault.startswith(FAILS) or UNLIKE in fault:
                break  # else a kernel may take multiples alone
        bound += [names] if most < each else []
        steps |= dict.fromkeys(names, most)
        if fault:
            held |= dict.fromkeys(names, f"a {type(traced.model).__name__} that is built so {fault}")
    together.sort(key=lambda names: -groups[names[0]].size)
    for i, names in enumerate(together):
        for others in together[i + 1 :] if names in bound else ():
            n, m = steps[names[0]], steps[others[0]]
            if not all(takes((names, n - 1, n), (others, k, m)) for k in range(max(1, m - 16), m)):
                held |= dict.fromkeys(others, f"config takes no other number for it where {names[0]} shrinks")
    return Described(found.parts, held, {name: n for name, n in steps.items() if n < groups[name].size})


def _another(traced: TracedModel, found: Described, names: Sequence[str], steps: int) -> str:
    """How a model that is built with other numbers, in which these groups are a step smaller, differs from the network
    that is left by such a cut: it may know a number that no shape shows, as a factor of its outputs."""
    kept = {g.axis: torch.arange(g.size // steps, g.size) for g in (traced.groups[name] for name in names)}
    config = copy.deepcopy(configuration(traced.model))
    for number, value in found.numbers(config, {axis: len(index) for axis, index in kept.items()}).items():
        put(config, number, value)
    weights, model = slice_weights(traced, kept), traced.model
    sliced = {id(traced.tensor(name)): cut for name, cut in weights.items()}  # which may have several names
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    try:
        anew = built_anew(model, config, {name: sliced.get(id(tensor), tensor) for name, tensor in named})
        with torch.no_grad(), traced.way.entered(anew):
            off = relative_error(anew(*traced.example[0], **traced.example[1]), _sliced(traced, kept, weights))
        numbers = [factors_of(each, traced.way, traced.example) for each in (model, anew)]
    except Exception as error:  # noqa: BLE001  whatever the library raises of what it is given
        return f"{FAILS}{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if off <= 1e-3 and numbers[0] != numbers[1]:  # a scale whose effect is small on these weights
        old, new = next((pair for pair in zip(*numbers, strict=False) if pair[0] != pair[1]), (numbers[0], numbers[1]))
        return f"computes with other numbers ({new} for {old})"[:200]
    return "" if off <= 1e-3 else f"computes something else (by {off:.1e})"


def _sliced(traced: TracedModel, kept: Mapping[Axis, Tensor], weights: Mapping[str, Tensor]) -> Any:
    """The output of the sliced graph, on weights that stay as they are."""
    own = {name: tensor.clone() for name, tensor in weights.items()}
    return SubNetwork(traced, kept, weights=own)(*traced.example[0], **traced.example[1])
