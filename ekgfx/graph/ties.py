"""Widths that one number stands for.

A class's Python may know one head width and shape queries, keys and values by it; a configuration has one
`hidden_size` for all layers. Where one number stands for several dimensions, their axes shrink together: tied groups
keep the same *share* of their channels (which ones differs from group to group). That is exact also where the groups
have different sizes, as a head of 64 channels and its 32 rotary frequencies.

Of a dimension with several axes (heads × head width) next to one with a single axis (the stream), one number cannot say
how it is made up: the last axis shrinks, the others stay whole.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from types import MappingProxyType

from torch import nn

from ekgfx.axes import Axis, Expr, Prod, Sum, axes, resolve
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.groups import Groups


@dataclass(frozen=True)
class Width:
    """Dimensions that one number stands for. why: who says so, in words."""

    exprs: tuple[Expr, ...]
    why: str


@dataclass(frozen=True)
class Tie:
    """Groups that keep the same share of their channels, or one that shrinks by several channels at once.

    members: group → channels that go with one step of the tie. why: what ties them, in words.
    """

    members: Mapping[str, int]
    why: tuple[str, ...]

    @property
    def name(self) -> str:
        """That of its first group."""
        return next(iter(self.members))


@dataclass(frozen=True)
class Ties:
    """ties: groups that shrink together. held: group → why it stays whole."""

    ties: tuple[Tie, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)


def tied(
    groups: Groups, widths: Iterable[Width], held: Mapping[str, str], steps: Mapping[str, int] = MappingProxyType({})
) -> Ties:
    """What a series of widths asks of the groups. held: groups that stay whole for another reason. steps: group → in
    how many equal steps it may shrink, where that is not channel by channel."""
    union = _Union(groups, steps)
    for name, why in held.items():
        union.hold([groups[name].axis], why)
    for width in widths:
        _apply(union, width)
    return union.result()


def head_widths(graph: AxisGraph) -> list[Width]:
    """Dimensions that a module's Python shapes by one number: the arguments in the same place of its views, where they
    are equal and the module has not a number of its own for each of them."""
    found: dict[tuple[str, int, int, int], dict[tuple[Axis, ...], Expr]] = {}
    for view in graph.graphs:
        for operation in view.operations:
            for argument, exprs in operation.effect.sizes.items():
                given = operation.args.get(argument)
                if not isinstance(given, list | tuple) or isinstance(exprs, Expr) or len(given) != len(exprs):
                    continue
                for place, (number, expr) in enumerate(zip(given, exprs, strict=True)):
                    if number == expr.size and any(not axis.frozen for axis in axes(expr)):
                        key = operation.module, len(given), place, expr.size
                        found.setdefault(key, {})[tuple(axes(expr))] = expr
    widths = []
    for (name, _, _, size), known in found.items():
        numbers = vars(graph.model.get_submodule(name)).values()
        if len(known) > 1 and sum(type(number) is int and number == size for number in numbers) < len(known):
            widths.append(Width(tuple(known.values()), f"{name or 'the model'} shapes them by one number, {size}"))
    return widths


def role_widths(graph: AxisGraph) -> list[Width]:
    """The dimensions of equal parameters in repeated layers: those whose names differ in the layers' numbers alone."""
    roles: dict[tuple[str, int, int], list[Expr]] = {}
    repeated = set(_repeated(graph.model))
    for name, dims in graph.weight_dims().items():
        for d, dim in enumerate(dims):
            roles.setdefault((role_of(name, repeated), d, dim.size), []).append(dim)
    return [Width(tuple(exprs), f"role {role}") for (role, _, _), exprs in roles.items() if len(exprs) > 1]


def role_of(name: str, repeated: Iterable[str]) -> str:
    """A parameter's name with `*` for the numbers of layers in `repeated` containers."""
    parts = name.split(".")
    return ".".join("*" if ".".join(parts[:i]) in repeated else part for i, part in enumerate(parts))


def _repeated(model: nn.Module) -> Iterator[str]:
    """Containers whose children are numbered and of one class."""
    for name, module in model.named_modules():
        children = dict(module.named_children())
        alike = len(children) > 1 and len({*map(type, children.values())}) == 1
        if alike and all(child.isdecimal() for child in children):
            yield name


def factors(expr: Expr) -> list[Expr]:
    """What a dimension is a product of, the slowest first."""
    expr = resolve(expr)
    return list(expr.factors) if isinstance(expr, Prod) else [expr]


def _apply(union: "_Union", width: Width) -> None:
    made = [factors(expr) for expr in width.exprs]
    if len({tuple(part.size for part in parts) for parts in made}) == 1:
        for alike in zip(*made, strict=True):
            _one_share(union, alike, width.why)
        return
    lasts = []
    for parts in made:
        free = [part for part in parts if any(not axis.frozen for axis in axes(part))]
        lasts += free[-1:] or parts[-1:]
        for part in free[:-1]:
            union.hold(axes(part), width.why)
    _one_share(union, lasts, width.why)


def _one_share(union: "_Union", parts: Sequence[Expr], why: str) -> None:
    """All of these keep the same share: each is an axis, or a sum of such."""
    every = [axis for part in parts for axis in dict.fromkeys(axes(part))]
    simple = all(isinstance(term, Axis) for part in parts for term in _terms(part))
    if not simple or any(axis.frozen for axis in every):
        union.hold(every, why)
    else:
        union.join(every, why)


def _terms(expr: Expr) -> Sequence[Expr]:
    expr = resolve(expr)
    return expr.terms if isinstance(expr, Sum) else (expr,)


class _Union:
    def __init__(self, groups: Groups, steps: Mapping[str, int]) -> None:
        self.steps = steps
        self.names = {group.axis: group.name for group in groups.values()}
        self.groups = groups
        self.parent: dict[Axis, Axis] = {}
        self.why: dict[Axis, dict[str, None]] = {}
        self.held: dict[Axis, str] = {}

    def find(self, axis: Axis) -> Axis:
        while self.parent.get(axis, axis) is not axis:
            axis = self.parent[axis]
        return axis

    def join(self, some: Sequence[Axis], why: str) -> None:
        first = self.find(some[0])
        for axis in some:
            other = self.find(axis)
            if other is not first:
                self.parent[other] = first
                self.why.setdefault(first, {}).update(self.why.pop(other, {}))
                if other in self.held:
                    self.held.setdefault(first, self.held.pop(other))
        if len({*some}) > 1:
            self.why.setdefault(first, {})[why] = None

    def hold(self, some: Iterable[Axis], why: str) -> None:
        for axis in some:
            if not axis.frozen:
                self.held.setdefault(self.find(axis), why)

    def result(self) -> Ties:
        together: dict[Axis, list[str]] = {}
        for axis, name in self.names.items():
            together.setdefault(self.find(axis), []).append(name)
        ties, held = [], {}
        for root, names in together.items():
            step = gcd(*(gcd(self.groups[name].size, self.steps.get(name, 0)) for name in names))
            if root in self.held or step == 1:
                why = self.held.get(root, "no share of its channels but all of them suits what it is tied with")
                held.update(dict.fromkeys(names, why))
            elif len(names) > 1 or step < self.groups[names[0]].size:
                steps = {name: self.groups[name].size // step for name in names}
                ties.append(Tie(steps, tuple(self.why.get(root, {}))))
        return Ties(tuple(ties), held)
