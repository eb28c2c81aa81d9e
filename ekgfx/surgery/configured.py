"""What a model's own configuration can say of its widths.

Libraries build their models from a configuration, and load saved weights into a model that is built from the saved
configuration anew. So a pruned network can be taken back by `from_pretrained` only where some values of the
configuration build it. Which of its numbers stands for which dimensions is found by trying: the model is built again
without memory (on the meta device) with one number doubled, and what doubles is what it stands for.

A number may also split a dimension without changing it, as the number of heads splits the width into heads; then whole
heads go with the width, since a head's width is in the scale of its products. A number that changes other values of the
model than whole ones (such a scale) stays, for the model that is built anew would compute something else, unless the
scale is what it was once the numbers of heads in that width grow with it. Where a model cannot be built with one number
doubled, another one of the same value may have to be equal to it.
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ekgfx.axes import Axis, Expr, Prod, axes, count
from ekgfx.execution.subnetwork import SubNetwork, slice_weights
from ekgfx.graph.groups import Groups
from ekgfx.graph.plan import Plan
from ekgfx.graph.ties import Ties, Width, factors, tied
from ekgfx.graph.ways import undisturbed
from ekgfx.surgery.check import relative_error
from ekgfx.surgery.configurations import configuration, hold
from ekgfx.surgery.outline import factors_of
from ekgfx.surgery.rebuilt import (
    Field,
    Trial,
    built_anew,
    get,
    name_of,
    numbers_in,
    put,
    runs,
    saved_by,
    segments,
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


_KNOWN: WeakKeyDictionary[TracedModel, Described | None] = WeakKeyDictionary()


def description(traced: TracedModel) -> Described | None:
    """What the numbers of the model's configuration stand for; None where no configuration builds it."""
    if traced not in _KNOWN:
        _KNOWN[traced] = _describe(traced)
    return _KNOWN[traced]


def configuration_of(traced: TracedModel, plan: Plan) -> Any | str | None:
    """A copy of the model's configuration that builds the network which a plan leaves; a sentence where no values of it
    do; None where no configuration builds the model."""
    described = description(traced)
    if described is None:
        return None
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
    another call does, as with a mask. Widths that no configuration can say are left as they are.
    """
    described = description(traced)
    if described is None or plan.dropped:
        return {}
    config, counts = configuration(traced.model), {axis: len(kept) for axis, kept in traced.groups.kept(plan).items()}
    built = shell(traced.model, config)
    shares = {f: {Fraction(count(p, counts), p.size) for p in parts} for f, parts in described.parts.items()}
    sure = {f: get(config, f) * share for f, (share, *others) in shares.items() if not others and share != 1}
    made = None if built is None else Trial(traced.model, built).of({f: int(n) for f, n in sure.items() if n == int(n)})
    if built is None or made is None:
        return {}
    return {place: (old, new) for place, old in built.whole.items() if (new := made.whole.get(place, old)) != old}


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


def _describe(traced: TracedModel) -> Described | None:
    model = traced.model
    config = configuration(model)
    if config is None:
        return None
    built, dims = shell(model, config), traced.weight_dims()
    sizes_of = {name: tuple(dim.size for dim in exprs) for name, exprs in dims.items()}
    if built is None or any(built.shapes[name] != sizes_of[name] for name in dims.keys() & built.shapes.keys()):
        return None
    trial, found = Trial(model, built), _Parts()
    places = {(p.parameter, p.dim): dims[p.parameter][p.dim] for g in traced.groups.values() for p in g.places}
    sizes = {part.size for expr in places.values() for part in runs(expr)}
    numbers = {number: old for number, old in numbers_in(config) if old in sizes}
    equal = _equal(numbers, trial)
    numbers = {number: old for number, old in numbers.items() if number not in equal.values()}
    twice = {n: {n: 2 * old} | ({equal[n]: 2 * old} if n in equal else {}) for n, old in numbers.items()}
    grows = {number: trial.grown(twice[number]) for number in numbers}
    fixed = frozenset(number for number in numbers if trial.others(twice[number]))
    several = _grown_by_one(places, numbers, grows, fixed, found)
    splitting = {
        number: old for number, old in numbers.items() if not grows[number] and trial.splits({number: 2 * old})
    }
    partners = _of_several_axes(several, splitting, found)
    for number in numbers:
        if number in found.parts and number not in splitting and trial.others(twice[number] | partners.get(number, {})):
            partners |= _of_several_numbers(number, twice, trial, found)
    follow = {*splitting, *(other for others in partners.values() for other in others)}  # with the width they are in
    for number in found.parts.keys() & numbers.keys() - follow:
        if changed := trial.others(twice[number] | partners.get(number, {})):
            for part in found.parts[number]:
                found.hold(axes(part), f"config.{name_of(number)} also says {changed}")
    saved = saved_by(model)
    for name, exprs in dims.items():
        if name not in saved:  # the library computes it anew when it builds the model
            found.hold((axis for expr in exprs for axis in axes(expr)), f"{name} is not saved")
    named = {group.axis: group.name for group in traced.groups.values()}
    held = {named[axis]: why for axis, why in found.held.items() if axis in named}
    parts = found.all()
    parts |= {other: parts[number] for number, other in equal.items() if number in parts}
    return _checked(traced, Described(parts, held), trial)


def _equal(numbers: Mapping[Field, int], trial: Trial) -> dict[Field, Field]:
    """Numbers that cannot grow alone, as where modules would be missing, with one of the same value that makes up for
    it."""
    found: dict[Field, Field] = {}
    for number, old in numbers.items():
        if trial.grown({number: 2 * old}) or number in found.values():
            continue
        unable = (o for o, same in numbers.items() if same == old and o != number and not trial.grown({o: 2 * old}))
        together = (o for o in unable if o not in found and trial.grown({number: 2 * old, o: 2 * old}))
        other = next(together, None)
        if other is not None:
            found[number] = other
    return found


def _of_several_numbers(
    number: Field, twice: Mapping[Field, Mapping[Field, int]], trial: Trial, found: "_Parts"
) -> dict[Field, dict[Field, int]]:
    """The numbers of heads with which a width grows so that nothing else changes; notes that what is left of the
    dimensions that they split, the width of a head, stays."""
    dimensions = found.whole.get(number, [])
    heads = {g for g, own in found.parts.items() for free in dimensions if g != number and {*own} & {*free}}
    growing = {field: value for head in heads & twice.keys() for field, value in twice[head].items()}
    if not growing or trial.others({**twice[number], **growing}) or not trial.grown({**twice[number], **growing}):
        return {}
    said = {part for head in heads for part in found.parts[head]}
    for free in found.whole.pop(number):
        for part in free:
            if part in said:
                found.add(number, part)
            else:
                found.hold(axes(part), f"config.{name_of(number)} grows by whole heads")
    return {number: growing}


def _grown_by_one(
    places: Mapping[tuple[str, int], Expr],
    numbers: Mapping[Field, int],
    grows: Mapping[Field, Mapping[tuple[str, int], bool]],
    fixed: Collection[Field],
    found: "_Parts",
) -> list[tuple[Field, list[Expr]]]:
    """Notes what parts of the dimensions grow with one number each (`fixed` ones say more than widths). Returns those
    of several free axes with their number: it does not say how they are made up."""
    several: list[tuple[Field, list[Expr]]] = []
    for place, expr in places.items():
        fields = {number: old for number, old in numbers.items() if grows[number].get(place) is True}
        parted = any(grows[number].get(place) is False for number in numbers)
        split = None if parted else segments(expr, fields, fixed)
        if split is None:
            told = "several numbers say parts of" if fields or parted else "no number says the width of"
            found.hold(axes(expr), f"config: {told} {place[0]}")
        for number, part in split or ():
            free = [f for f in factors(part) if any(not axis.frozen for axis in axes(f))]
            if len(free) > 1:
                several.append((number, free))
            else:
                found.add(number, part if free == [] else free[0])
    return several


def _of_several_axes(
    several: Sequence[tuple[Field, list[Expr]]], splitting: Mapping[Field, int], found: "_Parts"
) -> dict[Field, dict[Field, int]]:
    """Notes which axis of a dimension of several moves with its number: the only one that no other number says, or the
    heads, where a number says how many. Returns, by number, the numbers of heads that grow with it."""
    partners: dict[Field, dict[Field, int]] = {}
    alone = set(found.single)
    for number, free in several:
        unknown = [part for part in free if part not in alone]
        heads = {g: old for g, old in splitting.items() if unknown and old == unknown[0].size}
        if len(unknown) > 1 and heads:
            moving = unknown[0]
            found.add(next(iter(heads)), moving)
            partners.setdefault(number, {}).update({next(iter(heads)): 2 * next(iter(heads.values()))})
        else:
            moving = unknown[-1] if unknown else free[-1]
        for part in unknown:
            if part is not moving:
                found.hold(axes(part), f"config.{name_of(number)} does not say how it is made up")
        if len(unknown) > 1:
            found.add(number, moving)
        else:
            found.whole.setdefault(number, []).append(free)
    return partners


def _checked(traced: TracedModel, found: Described, trial: "Trial") -> Described:
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
        most = next((n for n in range(each, 1, -1) if each % n == 0 and takes((names, n - 1, n))), 1)
        bound += [names] if most < each else []
        steps |= dict.fromkeys(names, most)
        fault = "" if most == 1 else _another(traced, found, names, most)
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
        return f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if off <= 1e-3 and numbers[0] != numbers[1]:  # a scale whose effect is small on these weights
        old, new = next((pair for pair in zip(*numbers, strict=False) if pair[0] != pair[1]), (numbers[0], numbers[1]))
        return f"computes with other numbers ({new} for {old})"[:200]
    return "" if off <= 1e-3 else f"computes something else (by {off:.1e})"


def _sliced(traced: TracedModel, kept: Mapping[Axis, Tensor], weights: Mapping[str, Tensor]) -> Any:
    """The output of the sliced graph, on weights that stay as they are."""
    own = {name: tensor.clone() for name, tensor in weights.items()}
    return SubNetwork(traced, kept, weights=own)(*traced.example[0], **traced.example[1])


class _Parts:
    """What was found: number → parts of dimensions that grow with it; single: parts that a number says alone; whole:
    number → dimensions that it says with several parts, of which the others say all but one."""

    def __init__(self) -> None:
        self.parts: dict[Field, list[Expr]] = {}
        self.single: dict[Expr, None] = {}
        self.whole: dict[Field, list[list[Expr]]] = {}
        self.held: dict[Axis, str] = {}

    def add(self, number: Field, part: Expr) -> None:
        self.parts.setdefault(number, []).append(part)
        self.single[part] = None

    def hold(self, some: Iterable[Axis], why: str) -> None:
        for axis in some:
            if not axis.frozen:
                self.held.setdefault(axis, why)

    def all(self) -> dict[Field, list[Expr]]:
        made = {number: [Prod(tuple(parts)) for parts in each] for number, each in self.whole.items()}
        return {number: [*self.parts.get(number, []), *made.get(number, [])] for number in {**self.parts, **made}}


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
