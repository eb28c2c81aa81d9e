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
from ekgfx.sliced import SubNetwork


class Prefixes:
    """Which operators a change of a group leaves alone, and which of their values the others read."""

    def __init__(self, graph: AxisGraph) -> None:
        self.order = {node.name: number for number, node in enumerate(graph.graph.nodes)}
        self.starts: dict[Axis, int] = {}
        self.last_reads: dict[str, int] = {}
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
    """A sub-network that goes on from known values: operators before position `start` are not computed."""

    def __init__(self, problem: Problem, plan: Plan, order: Mapping[str, int], start: int, known: Mapping[str, Any]):
        kept = problem.traced.groups.kept(plan)
        super().__init__(problem.traced, kept, batch_stats=True, rescale=problem.rescale)
        self.order, self.start, self.known = order, start, known

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
    groups = problem.traced.groups
    starts = [prefixes.start(groups[group].axis) for group, _ in candidates]
    live = [prefixes.live(start) for start in starts]
    tallies = [Tally(problem.objective, problem.batches, knowledge) for _ in candidates]
    current = problem.network(plan)
    with torch.no_grad():
        for number, batch in enumerate(problem.batches):
            _, values = current.run(batch.inputs, capture=set().union(*live))
            for (_, candidate), start, names, tally in zip(candidates, starts, live, tallies, strict=True):
                known = {name: values[name] for name in names}
                network = Continued(problem, candidate, prefixes.order, start, known)
                tally.add(number, network(*batch.inputs))
    return [tally.evaluation() for tally in tallies]


def _axes_of(graph: AxisGraph, node: fx.Node) -> set[Axis]:
    dims = graph.dims.get(node.name, ())
    return {axis for dim in _flat(dims) for axis in axes(dim)}


def _flat(dims: Any) -> list[Any]:
    return [dim for listed in dims for dim in listed] if isinstance(dims, list) else list(dims)
