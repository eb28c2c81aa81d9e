"""The walk: operator by operator in the order of the graph, the dense network and the pruned one side by side.

Both are computed once, on all batches, up to the operator at hand; of each batch only what later operators read is
kept. The operator is refitted on what the pruned network, repaired so far, gives it, and both go on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ekgfx.axes import Axis
from ekgfx.data.batches import Inputs
from ekgfx.execution.subnetwork import SubNetwork, slice_tensor
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.liveness import last_reads
from ekgfx.graph.propagation import Operation
from ekgfx.repair.clamped import asked, find_clamp, line
from ekgfx.repair.forms import of_positions
from ekgfx.repair.marks import Marks
from ekgfx.repair.operators import LinearOperator
from ekgfx.repair.rearranged import weight_nodes
from ekgfx.repair.rows import Look, Pair, Rows
from ekgfx.repair.solve import Change
from ekgfx.repair.span import FEW, reduced, spanning
from ekgfx.repair.targets import find_stream, lacking

CHUNK = 16_000_000
"""Elements of a matrix of inputs that is in memory at a time."""
ELEMENTS = 200_000_000
LEAST_PER_INPUT = 20
KEPT = 100_000_000
"""Elements of the rows of one operator that stay in memory while it is looked at several times. Those of images that
are not fitted stay in any case: they are asked for most."""
LEAST_SHOWN = 0.05
"""Share of the positions at which an activation shows an output: where it shows fewer, little is known of it."""


@dataclass(frozen=True)
class LayerRepair:
    """What was done to one operator. Errors are squares of what its output (or the residual sum behind it) lacks, in
    the target's variance, on held-out images. done: nothing, the offset alone, or all; ridge: λ, where all was."""

    name: str
    before: float
    after: float
    done: Literal["nothing", "offset", "refit"]
    ridge: float | None
    positions: int
    seconds: float
    stream: bool


@dataclass(eq=False)
class Frontier:
    """A batch on its way through a network: how many nodes are done, and the values that later ones read."""

    network: SubNetwork
    inputs: Mapping[str, Any]
    done: int = 0
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """A batch on its way through both networks. held: it is not fitted."""

    dense: Frontier
    pruned: Frontier
    held: bool


def by_depth(graph: AxisGraph, constant: set[fx.Node]) -> list[fx.Node]:
    """The nodes that depend on the input, by the length of the longest way from it: of several branches that meet, the
    longest comes last, which can answer for most."""
    depth: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        if node not in constant and node.op != "output":
            depth[node] = 1 + max((depth[source] for source in node.all_input_nodes if source in depth), default=-1)
    return sorted(depth, key=depth.__getitem__)


class Bypassing(SubNetwork):
    """A sub-network some of whose operators return one of their arguments. What nobody reads then is computed all the
    same, so that it has the nodes of the uncut network."""

    def __init__(
        self, graph: AxisGraph, kept: Mapping[Axis, Tensor], weights: Mapping[str, Tensor], bypassed: Mapping[str, str]
    ) -> None:
        super().__init__(graph, kept, weights=weights)
        self.bypassed = bypassed

    def compute(self, operation: Operation, args: dict[str, Any], counts: Mapping[Axis, int], spare: bool) -> Any:
        if operation.name in self.bypassed:
            return args[self.bypassed[operation.name]].clone()  # which others may overwrite
        return super().compute(operation, args, counts, spare)


class Walk:
    """Both networks on all batches, up to the operator at hand.

    Args:
        graph: the traced model.
        kept: axis → kept positions.
        weights: of the pruned network; replaced as operators are refitted.
        fit, held: arguments of the model, batch by batch; the second are never fitted.
        positions: most output positions of an operator that are used, over all batches of `fit`.
        bypassed: operators of the pruned network that return one of their arguments, as the sum of a block does whose
            branch is gone, with that argument's name.
    """

    def __init__(
        self,
        graph: AxisGraph,
        kept: Mapping[Axis, Tensor],
        weights: dict[str, Tensor],
        fit: Sequence[Inputs],
        held: Sequence[Inputs],
        positions: int,
        seed: int,
        bypassed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.graph, self.kept, self.positions, self.seed = graph, kept, positions, seed
        self.dense = SubNetwork(graph, {})
        self.pruned = Bypassing(graph, kept, weights, bypassed)
        self.constant = weight_nodes(graph)
        self.nodes = by_depth(graph, set(self.constant))
        self.order = {node: i for i, node in enumerate(self.nodes)}
        *_, output = graph.graph.nodes
        self.dying = last_reads(self.nodes, stay={source.name for source in output.all_input_nodes})
        self.constants = {net: net.follow(self.constant, {}, {}, {}) for net in (self.dense, self.pruned)}
        self.marks = Marks()
        self.batches = [
            Batch(Frontier(self.dense, self._values(inputs)), Frontier(self.pruned, self._values(inputs)), held)
            for part, held in ((fit, False), (held, True))
            for inputs in part
        ]

    def _values(self, inputs: Inputs) -> dict[str, Any]:
        return self.dense.inputs(*inputs)

    def advance(self, frontier: Frontier, end: int) -> None:
        """Computes a network on a batch up to the node of that number, which is left out."""
        constants = self.constants[frontier.network]
        frontier.values.update(constants)
        nodes = self.nodes[frontier.done : end]
        frontier.network.follow(nodes, frontier.inputs, frontier.values, self.dying)
        for name in constants:
            frontier.values.pop(name, None)
        frontier.done = end

    def mark(self, operator: LinearOperator) -> None:
        """Keeps what the pruned network has computed before an operator whose weight others use as well."""
        for batch in self.batches:
            self.advance(batch.pruned, self.order[operator.node])
        self.marks.keep(self.order[operator.node], [batch.pruned.values for batch in self.batches])

    def unmark(self, operator: LinearOperator) -> None:
        """Drops what was kept before the operator."""
        self.marks.drop(self.order[operator.node])

    def rewind(self, operator: LinearOperator) -> None:
        """Computes the pruned network anew from an operator on: the weight, which it had used already, is another one
        now."""
        start = self.marks.before(self.order[operator.node])
        for number, batch in enumerate(self.batches):
            end, batch.pruned.done = batch.pruned.done, start
            batch.pruned.values = self.marks.values(start, number)
            for at in self.marks.after(start):
                self.advance(batch.pruned, at)
                self.marks.renew(at, number, batch.pruned.values)
            self.advance(batch.pruned, end)

    def take(self, new: Mapping[str, Tensor]) -> None:
        """Goes on with other weights."""
        self.pruned.weights = {**self.pruned.weights, **new}
        self.constants[self.pruned] = self.pruned.follow(self.constant, {}, {}, {})

    # -- one operator ----------------------------------------------------------------------------------------------

    def look(self, operator: LinearOperator, number: int) -> Look:
        """Where the operator is, and what it is asked for."""
        constant = set(self.constant)
        stream = find_stream(self.graph, operator.node, constant, self.order)
        clamp = find_clamp(self.graph, operator.node, constant, self.order)
        matrix = operator.form.matrix(self.constants[self.pruned][operator.weight.name])
        fits = sum(not batch.held for batch in self.batches)
        limit = max(ELEMENTS // matrix[:, 0].numel(), LEAST_PER_INPUT * matrix.shape[2])
        return Look(operator, number, stream, clamp, matrix, -(-min(self.positions, limit) // fits), KEPT)

    def span(self, look: Look) -> Tensor | None:
        """A basis of what the operator reads at the positions to fit on; None where these are many. Where nothing is
        lacking in the first batch, that of the others is not asked for, as in `measure`."""
        fits = [i for i, batch in enumerate(self.batches) if not batch.held]
        found: list[Tensor] = []
        for i in fits:
            first = not found
            self._advance_to(look, self.batches[i])
            grid = look.operator.form.grid(self.batches[i].dense.values[look.operator.node.name])
            if first and min(prod(grid), look.most) * len(fits) > FEW * look.matrix.shape[2]:
                return None
            rows = list(self._computed(look, self.batches[i], i))
            found += [piece.x for piece in rows]
            if first and all(piece.exact for piece in rows):
                break
        return spanning(found)

    def measure(self, look: Look, pair: Pair | None = None) -> Pair:
        """Moments of what the operator reads and lacks, added to those of other uses of its weight.

        Where it lacks nothing on the first batch, the others are not looked at.
        """
        alone = pair is None
        for i, batch in enumerate(self.batches):
            for rows in self._rows(look, i):
                pair = pair or Pair.empty(look, rows)
                (pair.held if batch.held else pair.fit).add(rows.x, rows.r, rows.t)
            if alone and i == 0 and pair is not None and pair.exact:
                break
        assert pair is not None  # there is a batch
        return pair

    def passed_on(self, look: Look, pair: Pair, refit: Change | None, held: bool) -> Pair:
        """Moments of what is lacking behind the activation, once the operator is changed so.

        Of an output that is hidden at a part of the positions, what is lacking is taken in the share of the others: its
        Gram matrix is about as much smaller. pair: what `measure` found; held: only on images that are never fitted.
        """
        found = Pair(pair.fit.lacking_otherwise(), pair.held.lacking_otherwise(), pair.stream, pair.precision)
        change, offset = (None, None) if refit is None else refit
        shown = torch.zeros_like(pair.fit.rest)
        for i, batch in enumerate(self.batches):
            for rows in self._rows(look, i) if batch.held or not held else ():
                r = rows.r if change is None else rows.r - (rows.x.movedim(1, 0) @ change.to(rows.r).mT).movedim(0, 1)
                r = r if offset is None else r - offset.to(r)
                assert look.clamp is not None and rows.gain is not None and rows.rest is not None  # it hides something
                lacks, passed = asked(look.clamp, r, rows.t, rows.gain, rows.rest)
                (found.held if batch.held else found.fit).add_lack(rows.x, lacks)
                shown += 0 if batch.held else passed.sum(0)
        if not held:
            share = (shown / found.fit.count).clamp(min=LEAST_SHOWN)
            found.fit.in_share(share)
            found.held.in_share(share)
        return found

    def _rows(self, look: Look, index: int) -> Iterator[Rows]:
        """What there is at some positions of a batch, piece by piece; the same ones each time."""
        if index in look.known:
            yield from look.known[index]
            return
        batch = self.batches[index]
        found: list[Rows] = []
        for rows in self._computed(look, batch, index):
            if look.clamp is not None and (batch.held or look.room > 0):
                found.append(rows)
                look.room -= rows.size
            yield rows
        if look.clamp is not None and (batch.held or look.room > 0):
            look.known[index] = found

    def _computed(self, look: Look, batch: Batch, index: int) -> Iterator[Rows]:
        operator, stream, matrix, gains = look.operator, look.stream, look.matrix, look.gains
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + look.number) * 1_000_003 + index)
        form, node, kept, dims = operator.form, operator.node, self.kept, self.graph.dims
        constants = self.constants[self.pruned]
        self._advance_to(look, batch)
        target = slice_tensor(batch.dense.values[node.name], dims[node.name], kept)
        grid, source = form.grid(target), batch.pruned.values[operator.input.name]
        if stream is not None:
            other = stream.other.name
            missing = slice_tensor(batch.dense.values[other], dims[other], kept) - batch.pruned.values[other]
            target = target + lacking(stream, node, self.pruned, target, missing, constants, batch.pruned.inputs, gains)
        wide = torch.promote_types(matrix.dtype, torch.float32)  # of half precision nothing would be left
        matrix = matrix.to(wide)
        bias = 0 if operator.bias is None else constants[operator.bias.name].reshape(len(matrix), -1)
        picks = of_positions(grid, look.most, generator).to(target.device)
        behind: tuple[Tensor, ...] = ()
        if look.clamp is not None:
            behind = line(look.clamp, node, self.pruned, target, constants, batch.pruned.values)
        for piece in picks.split(max(CHUNK // matrix[:, 0].numel(), 16)):
            x, t = form.inputs(source, grid, piece).to(wide), form.outputs(target, piece).to(wide)
            r = t - (x.movedim(1, 0) @ matrix.mT).movedim(0, 1) - bias
            yield Rows(reduced(x, look.basis), r, t, *(form.outputs(each, piece).to(wide) for each in behind))

    def _advance_to(self, look: Look, batch: Batch) -> None:
        end = self.order[look.operator.node]
        self.advance(batch.dense, end + 1)
        self.advance(batch.pruned, end)
