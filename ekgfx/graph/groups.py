"""Channel groups: every axis that is still free after the rules have spoken, with all the places it cuts."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property

import torch
from torch import Tensor

from ekgfx.axes import Axis, axes, show
from ekgfx.base.markup import html_table
from ekgfx.base.units import human, several
from ekgfx.errors import PlanError
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.cost import Products, value_of
from ekgfx.graph.gates import Gate, gates_of
from ekgfx.graph.plan import FromMask, Plan
from ekgfx.graph.propagation import Operation


@dataclass(frozen=True)
class Place:
    """A dimension of a parameter that a group cuts; `layout` shows what else the dimension is made of."""

    parameter: str
    dim: int
    layout: str


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Coupled channels: cutting channel c of the group removes position c from every place at once.

    Attributes:
        name: the first producing parameter's module (`#k` tells several groups of one parameter apart).
        size: number of channels.
        producers: the weights that compute the group's channels anew, one entry per use (n_l of the paper).
        places: every parameter dimension that is cut.
        macs: MACs per sample of the layers that shrink with the group.
        gates: where the group's activations are read.
    """

    name: str
    size: int
    axis: Axis
    producers: tuple[str, ...]
    places: tuple[Place, ...]
    macs: int
    gates: tuple[Gate, ...]


@dataclass(frozen=True)
class FrozenPlace:
    """A parameter dimension (or the part of it) that cannot be cut, and why."""

    parameter: str
    dim: int
    size: int
    reason: str


class Groups(Mapping[str, ChannelGroup]):
    """All channel groups of a model by name, in the order in which the network produces them."""

    def __init__(
        self,
        groups: tuple[ChannelGroup, ...],
        frozen: tuple[FrozenPlace, ...],
        prunable_share: float,
        gone: Collection[str] = (),
    ) -> None:
        """gone: names of groups that went with residual blocks, of which plans may still speak."""
        self._groups = {group.name: group for group in groups}
        self.gone = frozenset(gone)
        self.frozen = frozen
        self.prunable_share = prunable_share

    def __getitem__(self, name: str) -> ChannelGroup:
        try:
            return self._groups[name]
        except KeyError:
            near = get_close_matches(name, self._groups, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"no channel group {name!r} in this model{hint}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def __str__(self) -> str:
        rows = [
            f"{g.name:40} {g.size:6}  {len(g.producers):3} producers  {len(g.places):3} places" for g in self.values()
        ]
        return "\n".join(rows) or "no channel groups"

    def __repr__(self) -> str:
        number = several(len(self), "group")
        return f"Groups({number}, {self.prunable_share:.0%} of the parameters in tensors that they cut)"

    def _repr_html_(self) -> str:
        rows = [(g.name, g.size, len(g.producers), len(g.places), human(g.macs)) for g in self.values()]
        return html_table(("group", "channels", "producers", "places", "MACs governed"), rows, caption=repr(self))

    @cached_property
    def digest(self) -> str:
        """Hash of names, sizes and places: two models with one digest can take the same plans."""
        rows = [[g.name, g.size, [[p.parameter, p.dim, p.layout] for p in g.places]] for g in self.values()]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def widths(self, plan: Plan | None) -> dict[str, int]:
        """Kept channels per group under a plan."""
        kept = plan.kept if plan else {}
        return {name: len(kept.get(name, range(group.size))) for name, group in self.items()}

    def kept(self, plan: Plan | None) -> dict[Axis, Tensor]:
        """A plan as kept positions per axis; groups that keep all are left out.

        Raises:
            PlanError: the plan belongs to another model, or its indices are not ascending, in range and at least one.
        """
        if plan is None:
            return {}
        if plan.structure and plan.structure != self.digest:
            raise PlanError(
                f"the plan was made for another model (structure {plan.structure}, this model has {self.digest})"
            )
        kept = {}
        for name, indices in plan.kept.items():
            if name in self.gone:
                continue
            group = self[name]
            if not indices:
                raise PlanError(f"the plan keeps no channel of {name!r}; keep at least one")
            if isinstance(indices, FromMask) and indices.length != group.size:
                raise PlanError(f"the plan's mask of {name!r} has {indices.length} entries, the group {group.size}")
            if list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= group.size:
                raise PlanError(f"the plan's indices of {name!r} are not ascending numbers below {group.size}")
            if len(indices) < group.size:
                kept[group.axis] = torch.tensor(indices)
        return kept


def left_of(groups: Groups, graph: AxisGraph) -> Groups:
    """The groups of a model as far as a graph without some of its blocks has them, under their names and digest."""
    nodes = {operation.name for operation in graph.operations}
    found = []
    for group in groups.values():
        places = tuple(place for place in group.places if place.parameter not in graph.gone)
        producers = tuple(name for name in group.producers if name not in graph.gone)
        gates = tuple(gate for gate in group.gates if gate.node in nodes)
        if places:
            found.append(replace(group, places=places, producers=producers, gates=gates))
    left = Groups(
        tuple(found),
        tuple(place for place in groups.frozen if place.parameter not in graph.gone),
        groups.prunable_share,
        groups.keys() - {group.name for group in found},
    )
    vars(left)["digest"] = groups.digest
    return left


def find_groups(graph: AxisGraph, macs_of: Mapping[str, Products]) -> Groups:
    """Collect the free axes of all parameters into groups. macs_of: the graph's `mac_table`."""
    dims = graph.weight_dims()
    parameters = {name for name, _ in graph.model.named_parameters()}
    places: dict[Axis, list[Place]] = {}
    frozen: list[FrozenPlace] = []
    for name in (n for n in dims if n in parameters):
        for d, dim in enumerate(dims[name]):
            for axis in dict.fromkeys(axes(dim)):
                if axis.frozen:
                    if axis.size > 1:
                        frozen.append(FrozenPlace(name, d, axis.size, axis.frozen))
                elif axis.size > 1:
                    places.setdefault(axis, []).append(Place(name, d, show(dim)))
    producers = _producers(graph)
    order = {axis: i for i, axis in enumerate(dict.fromkeys([*(a for a in producers if a in places), *places]))}
    named = _names({axis: producers.get(axis, []) for axis in order}, places)
    macs = _governed_macs(graph, macs_of)
    groups = tuple(
        ChannelGroup(
            name=named[axis],
            size=axis.size,
            axis=axis,
            producers=tuple(name for name, _ in producers.get(axis, ())),
            places=tuple(places[axis]),
            macs=macs.get(axis, 0),
            gates=gates_of(graph, axis, [operation for _, operation in producers.get(axis, ())]),
        )
        for axis in order
    )
    return Groups(groups, tuple(frozen), _prunable_share(graph, places))


def _producers(graph: AxisGraph) -> dict[Axis, list[tuple[str, Operation]]]:
    """Axis → (weight, operator) pairs that compute it anew, in graph order."""
    found: dict[Axis, list[tuple[str, Operation]]] = {}
    for operation in graph.operations:
        if operation.effect.produces is None:
            continue
        argument, expr = operation.effect.produces
        weight = graph.root_weight(operation.args[argument])
        if weight is not None:
            for axis in dict.fromkeys(axes(expr)):
                if not axis.frozen and axis.size > 1:
                    found.setdefault(axis, []).append((weight, operation))
    return found


def _names(
    producers: Mapping[Axis, list[tuple[str, Operation]]], places: Mapping[Axis, list[Place]]
) -> dict[Axis, str]:
    base = {
        axis: (made[0][0] if made else places[axis][0].parameter).removesuffix(".weight")
        for axis, made in producers.items()
    }
    shared: dict[str, list[Axis]] = {}
    for axis, name in base.items():
        shared.setdefault(name, []).append(axis)
    return {
        axis: name if len(shared[name]) == 1 else f"{name}#{shared[name].index(axis)}" for axis, name in base.items()
    }


def _governed_macs(graph: AxisGraph, macs_of: Mapping[str, Products]) -> dict[Axis, int]:
    total: dict[Axis, int] = {}
    for products in macs_of.values():
        for product in products:
            value = value_of([product], {graph.batch: 1})
            for axis in {a for e in product for a in axes(e)}:
                total[axis] = total.get(axis, 0) + value
    return total


def _prunable_share(graph: AxisGraph, places: Mapping[Axis, list[Place]]) -> float:
    """Share of the model's parameters that lie in tensors which some group cuts."""
    cut = {place.parameter for found in places.values() for place in found}
    sizes = {name: parameter.numel() for name, parameter in graph.model.named_parameters()}
    total = sum(sizes.values())
    return sum(sizes[name] for name in cut) / total if total else 0.0
