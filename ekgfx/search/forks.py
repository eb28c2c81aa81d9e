"""Where candidates leave the current network: which operators a cut changes, and what these read of the others.

A candidate differs from the current network in one unit: a group, or groups that are tied. Operators that the cut does
not reach give what they give in the current network, bit for bit, so a candidate computes the others alone, from the
values that they read.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ekgfx.axes import Axis, Expr, axes
from ekgfx.data.batches import Inputs
from ekgfx.execution.subnetwork import SubNetwork, slice_weights
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.blocks import Block
from ekgfx.graph.cost import evaluate, mac_table
from ekgfx.graph.liveness import last_reads


@dataclass(frozen=True)
class Fork:
    """How the candidates of one unit are computed.

    nodes: the operators that the cut changes, in order, and the placeholders that they read. reads: the other operators
    whose values they read. at: position in the graph where all of those are known. weights: parameters that are cut.
    dying: node → values of `nodes` and `reads` that nobody of `nodes` reads after it. stands: of a block that is
    dropped, the operator in whose place its input stands, and that input.
    """

    nodes: tuple[fx.Node, ...]
    reads: frozenset[str]
    at: int
    weights: frozenset[str]
    dying: Mapping[str, Sequence[str]]
    stands: tuple[str, str] | None = None


Cut = frozenset[Axis] | Block
"""What a candidate is without: positions of some axes, or the branch of a block."""


class Forks:
    """The fork of every unit in a graph."""

    def __init__(self, graph: AxisGraph) -> None:
        self.graph = graph
        self.order = {node.name: position for position, node in enumerate(graph.graph.nodes)}
        self._known: dict[Cut, Fork] = {}
        self._others: dict[int, Forks] = {}

    def on(self, graph: AxisGraph) -> "Forks":
        """The forks of the same model without some of its blocks; the last one's are kept."""
        if graph is self.graph:
            return self
        if id(graph) not in self._others:
            self._others = {id(graph): Forks(graph)}
        return self._others[id(graph)]

    def of(self, cut: Cut) -> Fork:
        """The fork of the axes that are cut together, or of a block that is dropped."""
        if cut not in self._known:
            self._known[cut] = self._of_block(cut) if isinstance(cut, Block) else self._of_axes(cut)
        return self._known[cut]

    @cached_property
    def operators(self) -> dict[str, fx.Node]:
        """The nodes that are computed, by name, in order."""
        return {node.name: node for node in self.graph.graph.nodes if node.op == "call_function"}

    @cached_property
    def output(self) -> fx.Node:
        """The node that holds the model's output."""
        *_, output = self.graph.graph.nodes
        return output

    def _of_axes(self, cut: frozenset[Axis]) -> Fork:
        changed: dict[str, fx.Node] = {}
        for node in self.operators.values():
            if any(source.name in changed for source in node.all_input_nodes) or cut & self._axes[node.name]:
                changed[node.name] = node
        weights = {name for name, dims in self.graph.weight_dims().items() if cut & _all_axes(dims)}
        return self._fork(changed, frozenset(weights))

    def _of_block(self, block: Block) -> Fork:
        changed: dict[str, fx.Node] = {}
        for node in self.operators.values():
            if any(source.name in changed or source.name == block.output for source in node.all_input_nodes):
                changed[node.name] = node
        join = self.graph.operation(self._nodes[block.join])
        assert join is not None
        return self._fork(changed, frozenset(), (block.output, join.args[block.trunk].name))

    def _fork(
        self, changed: Mapping[str, fx.Node], weights: frozenset[str], stands: tuple[str, str] | None = None
    ) -> Fork:
        read = {source.name for node in (*changed.values(), self.output) for source in node.all_input_nodes}
        if stands is not None:
            read = read - {stands[0]} | {stands[1]}
        reads = frozenset(read & self.operators.keys() - changed.keys())
        nodes = [node for node in self.graph.graph.nodes if node.name in changed or (node.name in read - reads)]
        dying = last_reads(nodes, stay={source.name for source in self.output.all_input_nodes})
        at = max((self.order[name] for name in reads), default=-1) + 1
        return Fork(tuple(nodes), reads, at, weights, dying, stands)

    @cached_property
    def _axes(self) -> dict[str, set[Axis]]:
        """Operator → axes of its output, of what it reads, and of its integer arguments."""
        dims = {node.name: _all_axes(self.graph.tensors.get(node.name, ())) for node in self.graph.graph.nodes}
        found = {}
        for name, node in self.operators.items():
            operation = self.graph.operation(node)
            sizes = _all_axes(list(operation.effect.sizes.values())) if operation is not None else set()
            found[name] = dims[name].union(sizes, *(dims[source.name] for source in node.all_input_nodes))
        return found

    # -- which of the current network's values are worth keeping ---------------------------------------------------

    def demanded(self, reads: Iterable[str], known: Iterable[str]) -> list[fx.Node]:
        """The nodes to compute, in order, to have the values `reads` where those in `known` are there already."""
        have, wanted = set(known), set()
        waiting = [name for name in reads if name not in have]
        while waiting:
            name = waiting.pop()
            if name not in wanted:
                wanted.add(name)
                node = self._nodes[name]
                waiting += [source.name for source in node.all_input_nodes if source.name not in have]
        return [self._nodes[name] for name in sorted(wanted, key=self.order.__getitem__)]

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph.graph.nodes}

    def effort(self, counts: Mapping[Axis, int]) -> dict[str, int]:
        """Operator → what it takes to compute for one sample: its MACs, and one for every value that it writes."""
        table, counts = self._mac_table, {**counts, self.graph.batch: 1}
        effort = {}
        for operation in self.graph.operations:
            written = evaluate(operation.effect.outputs, counts)
            effort[operation.name] = evaluate(table.get(operation.name, []), counts) + written
        return effort

    @cached_property
    def _mac_table(self) -> Any:
        return mac_table(self.graph)


class Keeper:
    """Keeps values of the current network, as many as fit, for its candidates to go on from.

    kept: the values by number of the batch and node.
    """

    def __init__(
        self,
        forks: Forks,
        cuts: Collection[Cut],
        counts: Mapping[Axis, int],
        shares: Sequence[float],
        budget: int,
    ) -> None:
        """cuts: of every unit. counts: kept positions per axis. shares: every batch's part of the samples.
        budget: in bytes, for all batches."""
        self.forks, self.counts, self.shares, self.budget = forks, counts, shares, budget
        self.wanted = set().union(*(forks.of(cut).reads for cut in cuts)) if budget else set()
        self.ahead = [forks.of(cut) for cut in cuts]
        self.kept: dict[int, dict[str, Any]] = {}

    def take(self, number: int, values: Mapping[str, Any]) -> None:
        """Keeps what is worth it of a batch's values; from then on `wanted` names no others."""
        if self.wanted and not self.kept:
            room = int(self.budget * self.shares[number])
            self.wanted = worth_keeping(self.forks, self.ahead, values, self.counts, room)
        self.kept[number] = {name: pytree.tree_map_only(Tensor, Tensor.detach, values[name]) for name in self.wanted}


def worth_keeping(
    forks: Forks, ahead: Sequence[Fork], values: Mapping[str, Any], counts: Mapping[Axis, int], budget: int
) -> set[str]:
    """Which of the current network's values to keep for its candidates within `budget` bytes.

    ahead: the forks of all groups. values: what they read. Keeping all that a fork reads saves the operators between
    the fork before it and this one; the forks that save most per byte come first. Views of one tensor count once.
    """
    effort, order = forks.effort(counts), forks.order
    by_place = sorted({fork.reads: fork for fork in ahead}.values(), key=lambda fork: fork.at)
    saved, before = {}, 0
    for fork in by_place:
        saved[fork.reads] = sum(work for name, work in effort.items() if before <= order[name] < fork.at)
        before = fork.at
    chosen: set[str] = set()
    held: dict[int, int] = {}

    def added(reads: frozenset[str]) -> dict[int, int]:
        storages = {at: size for name in reads for at, size in storages_of(values[name]).items()}
        return {at: size for at, size in storages.items() if at not in held}

    for reads in sorted(saved, key=lambda reads: -saved[reads] / (1 + sum(added(reads).values()))):
        more = added(reads)
        if sum(held.values()) + sum(more.values()) <= budget:
            held |= more
            chosen |= reads
    return chosen


def storages_of(value: Any) -> dict[int, int]:
    """Memory behind all tensors in a value: address → bytes."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


class Walk:
    """The current network on its way through one batch. It stops where candidates leave, computes nothing that none of
    them reads or that was kept, and forgets what none of those to come reads."""

    def __init__(
        self, forks: Forks, network: SubNetwork, inputs: Inputs, ahead: Sequence[Fork], kept: Mapping[str, Any]
    ) -> None:
        """ahead: the forks to come, by `at`. kept: values that are known already, by node."""
        self.network, self.inputs = network, network.inputs(*inputs)
        reads = set().union(*(fork.reads for fork in ahead))
        self.left = forks.demanded(reads, kept)
        self.values = {name: kept[name] for name in reads & kept.keys()} | {
            source.name: kept[source.name]
            for node in self.left
            for source in node.all_input_nodes
            if source.name in kept
        }
        self.order = forks.order
        self._last: dict[str, float] = {}
        for node in self.left:
            for used in (node, *node.all_input_nodes):
                self._last[used.name] = self.order[node.name]
        for fork in ahead:
            for name in fork.reads:
                self._last[name] = max(self._last.get(name, 0), fork.at - 0.5)

    def to(self, fork: Fork) -> dict[str, Any]:
        """Goes on to where `fork` leaves; the values that it reads. Forks must come in the order of `at`."""
        while self.left and self.order[self.left[0].name] < fork.at:
            node = self.left.pop(0)
            self.network.follow([node], self.inputs, self.values, {})
            self._forget(self.order[node.name])
        self._forget(fork.at - 1)
        return {name: self.values[name] for name in fork.reads}

    def _forget(self, position: int) -> None:
        """Drops what nobody reads after the node at `position`."""
        for name in [name for name in self.values if self._last[name] <= position]:
            del self.values[name]


class Branch(SubNetwork):
    """A sub-network that differs from the current one in one unit. It shares the weights that the unit does not cut,
    and computes from the current network's values on."""

    def __init__(
        self, current: SubNetwork, forks: Forks, cut: Cut, kept: Mapping[Axis, Tensor], *, rescale: bool
    ) -> None:
        """cut: of the unit. kept: as in `SubNetwork`, all that the candidate keeps."""
        self.fork, self._end = forks.of(cut), forks.output
        sliced = slice_weights(current.graph, kept, rescale=rescale, names=self.fork.weights)
        super().__init__(current.graph, kept, weights={**current.weights, **sliced}, **current.manner)

    def go_on(self, inputs: Inputs, read: Mapping[str, Any]) -> Any:
        """The model's output for a batch. read: the current network's values that the fork reads."""
        values, given = dict(read), self.inputs(*inputs)
        if self.fork.stands is not None:
            place, input = self.fork.stands
            values[place] = values[input] if input in values else given[input]
        self.follow(self.fork.nodes, given, values, self.fork.dying)
        return self.output(self._end, values)


def _all_axes(dims: Any) -> set[Axis]:
    """The axes in an expression, or in any nesting of them."""
    if isinstance(dims, Expr):
        return set(axes(dims))
    return set().union(*map(_all_axes, dims)) if isinstance(dims, list | tuple) else set()
