"""Evaluating many candidates at once: what comes before the first operator that one touches is not computed again."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ekgfx.axes import Axis, axes
from ekgfx.graph import AxisGraph, Operation
from ekgfx.plan import Plan
from ekgfx.search.problem import Problem
from ekgfx.search.reward import Evaluation, Knowledge, Tally
from ekgfx.sliced import GraphRunner, SubNetwork, slice_weights


class Prefixes:
    """Which operators a change of a group leaves alone, and which of their values the others read; and which weights it
    cuts."""

    def __init__(self, graph: AxisGraph) -> None:
        self.order = {node.name: number for number, node in enumerate(graph.graph.nodes)}
        self.starts: dict[Axis, int] = {}
        self.last_reads: dict[str, int] = {}
        self.weights: dict[Axis, set[str]] = {}
        for name, dims in graph.weight_dims().items():
            for axis in {axis for dim in dims for axis in axes(dim)}:
                self.weights.setdefault(axis, set()).add(name)
        for operation in graph.operations:
            position = self.order[operation.name]
            for node in (operation.node, *operation.node.all_input_nodes):
                for axis in _axes_of(graph, node):
                    self.starts.setdefault(axis, position)
            self.last_reads[operation.name] = max(self._readers(operation.node), default=position)

    def start(self, axis: Axis) -> int:
        """Position in the graph of the first operator that a cut of `axis` changes."""
        return self.starts.get(axis, 0)

    def live(self, start: int) -> set[str]:
        """Operators before `start` whose values are read at or after it."""
        return {name for name, last in self.last_reads.items() if self.order[name] < start <= last}

    def _readers(self, node: fx.Node) -> list[int]:
        """Positions of the nodes that read a value, through the reads of its elements."""
        readers: list[int] = []
        for user in node.users:
            readers += self._readers(user) if user.target is operator.getitem else [self.order[user.name]]
        return readers


class Continued(SubNetwork):
    """A sub-network that differs from the current one in one group, and goes on from its values: operators before
    position `start` are not computed. It shares the weights that the group does not cut."""

    def __init__(self, problem: Problem, current: SubNetwork, prefixes: Prefixes, group: str, plan: Plan) -> None:
        axis = problem.traced.groups[group].axis
        kept = problem.traced.groups.kept(plan)
        cut = slice_weights(problem.traced, kept, rescale=problem.rescale, names=prefixes.weights.get(axis, ()))
        GraphRunner.__init__(self, problem.traced, {**current.weights, **cut})  # SubNetwork's would cut all weights
        self.kept = {axis: len(index) for axis, index in kept.items()}
        self.batch_stats = current.batch_stats
        self.order, self.start = prefixes.order, prefixes.start(axis)
        self.live = prefixes.live(self.start)
        self.known: Mapping[str, Any] = {}

    def compute(self, operation: Operation, args: dict[str, Any], counts: Mapping[Axis, int]) -> Any:
        if self.order[operation.name] < self.start:
            return self.known.get(operation.name, _UNREAD)
        return super().compute(operation, args, counts)


class _Unread:
    """Stands for a value that nobody reads; its elements are not read either."""

    def __getitem__(self, index: Any) -> "_Unread":
        return self


_UNREAD = _Unread()


def evaluate_candidates(
    problem: Problem,
    prefixes: Prefixes,
    plan: Plan,
    candidates: Sequence[tuple[str, Plan]],
    knowledge: Knowledge | None,
) -> list[Evaluation]:
    """The reward (eq. 4) of sub-networks that differ from the current one, `plan`, in one group each.

    candidates: (group, plan of the sub-network). The current network runs once per batch; every candidate goes on from
    the values before its group's first operator.
    """
    current = problem.network(plan)
    networks = [Continued(problem, current, prefixes, group, candidate) for group, candidate in candidates]
    tallies = [Tally(problem.objective, problem.batches, knowledge) for _ in candidates]
    with torch.no_grad():
        for number, batch in enumerate(problem.batches):
            _, values = current.run(batch.inputs, capture=set().union(*(network.live for network in networks)))
            for network, tally in zip(networks, tallies, strict=True):
                network.known = values
                tally.add(number, network(*batch.inputs))
    return [tally.evaluation() for tally in tallies]


def _axes_of(graph: AxisGraph, node: fx.Node) -> set[Axis]:
    dims = graph.dims.get(node.name, ())
    return {axis for dim in _flat(dims) for axis in axes(dim)}


def _flat(dims: Any) -> list[Any]:
    return [dim for listed in dims for dim in listed] if isinstance(dims, list) else list(dims)
