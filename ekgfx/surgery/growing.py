"""Which parts of a model's dimensions grow with which numbers of its configuration."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod

from ekgfx.axes import Axis, Expr, Prod, axes
from ekgfx.graph.ties import factors
from ekgfx.surgery.rebuilt import Field, Trial, name_of, segments, terms


class Parts:
    """What was found: number → parts of dimensions that grow with it; single: parts that a number says alone; whole:
    number → dimensions that it says with several parts, of which the others say all but one; chosen: numbers taken for
    a width that others say as well."""

    def __init__(self) -> None:
        self.parts: dict[Field, list[Expr]] = {}
        self.single: dict[Expr, None] = {}
        self.whole: dict[Field, list[list[Expr]]] = {}
        self.held: dict[Axis, str] = {}
        self.chosen: set[Field] = set()

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


def grown_by_one(
    places: Mapping[tuple[str, int], Expr],
    numbers: Mapping[Field, int],
    grows: Mapping[Field, Mapping[tuple[str, int], int]],
    fixed: Collection[Field],
    found: Parts,
) -> list[tuple[Field, list[Expr]]]:
    """Notes what parts of the dimensions grow with one number each (`fixed` ones say more than widths). Returns those
    of several free axes with their number: it does not say how they are made up.

    grows: number → dimensions that change with it: 1 where they grow as it does, -1 where they shrink so, 0 otherwise.

    Of a dimension that shrinks as another number grows, one part is a width divided by that number, as a head's width
    is one by the number of heads: it stays. One that is concatenated grows by a part: another dimension says what each
    part is."""
    several: list[tuple[Field, list[Expr]]] = []
    concatenated: list[tuple[str, Expr]] = []
    for place, expr in places.items():
        fields, divided, parted = _growing(numbers, {n: grows[n][place] for n in numbers if place in grows[n]})
        split = None if parted else segments(expr, fields, fixed)
        if split is None:
            if parted and len(terms(expr)) > 1:
                concatenated.append((place[0], expr))
                continue
            told = "several numbers say parts of" if fields or parted else "no number says the width of"
            found.hold(axes(expr), f"config: {told} {place[0]}")
            continue
        if {number for number, _ in split} < fields.keys():
            found.chosen |= {number for number, _ in split}
        for number, part in split:
            free = [f for f in factors(part) if any(not axis.frozen for axis in axes(f))]
            if number == divided:
                found.hold(axes(part), f"config.{name_of(number)} says it for each of several parts")
            elif len(free) > 1:
                several.append((number, free))
            else:
                found.add(number, part if free == [] else free[0])
    said = {axis for part in found.single for axis in axes(part)}
    said |= {axis for _, parts in several for part in parts for axis in axes(part)}
    for name, expr in concatenated:
        found.hold(set(axes(expr)) - said, f"config: several numbers say parts of {name}")
    return several


def _growing(numbers: Mapping[Field, int], by: Mapping[Field, int]) -> tuple[dict[Field, int], Field | None, bool]:
    """Of a dimension that changes `by` some numbers: those that it grows with, the one of them whose width is divided
    by others, which then counts as divided, and whether it grows by a part alone."""
    fields = {number: numbers[number] for number, power in by.items() if power == 1}
    among = prod(numbers[number] for number, power in by.items() if power == -1)
    parted = 0 in by.values()
    divided = max(fields, key=lambda number: fields[number]) if among > 1 and fields else None
    if divided is not None:
        parted |= fields[divided] % among > 0
        fields[divided] //= among
    return fields, divided, parted


def of_several_axes(
    several: Sequence[tuple[Field, list[Expr]]],
    splitting: Mapping[Field, int],
    times: Mapping[Field, int],
    found: Parts,
) -> dict[Field, dict[Field, int]]:
    """Notes which axis of a dimension of several moves with its number: the only one that no other number says, or the
    heads, where a number says how many (keys and the query heads of each are heads together). Returns, by number, the
    numbers of heads that grow with it, so many `times` as it is tried with."""
    partners: dict[Field, dict[Field, int]] = {}
    alone = set(found.single)
    for number, free in several:
        unknown = [part for part in free if part not in alone]
        lead = free[: free.index(unknown[0]) + 1] if unknown else []
        heads = {g: old for g, old in splitting.items() if lead and old == prod(part.size for part in lead)}
        if len(unknown) > 1 and heads:
            moving = Prod(tuple(lead)) if len(lead) > 1 else lead[0]
            found.add(next(iter(heads)), moving)
            partners.setdefault(number, {}).update({next(iter(heads)): times[number] * next(iter(heads.values()))})
        else:
            moving = unknown[-1] if unknown else free[-1]
            lead = [moving]
        for part in unknown:
            if part not in lead:
                found.hold(axes(part), f"config.{name_of(number)} does not say how it is made up")
        if len(unknown) > 1:
            found.add(number, moving)
        else:
            found.whole.setdefault(number, []).append(free)
    return partners


def of_several_numbers(
    number: Field, by: int, more: Callable[[Field, int], Mapping[Field, int]], trial: Trial, found: Parts
) -> dict[Field, dict[Field, int]]:
    """The numbers of heads with which a width grows so that nothing else changes; notes that what is left of the
    dimensions that they split, the width of a head, stays.

    by: how many times it is tried with; more: a number so many times, with what has to be equal to it."""
    dimensions = found.whole.get(number, [])
    heads = {g for g, own in found.parts.items() for free in dimensions if g != number and {*own} & {*free}}
    growing = {field: value for head in heads for field, value in more(head, by).items()}
    together = {**more(number, by), **growing}
    if not growing or trial.others(together) or not trial.grown(together):
        return {}
    said = {part for head in heads for part in found.parts[head]}
    for free in found.whole.pop(number):
        for part in free:
            if part in said:
                found.add(number, part)
            else:
                found.hold(axes(part), f"config.{name_of(number)} grows by whole heads")
    return {number: growing}


def equal_numbers(numbers: Mapping[Field, int], trial: Trial) -> dict[Field, Field]:
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
