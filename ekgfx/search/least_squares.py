"""Which channels the others can stand in for: what a repair could not give back of a cut.

Whoever reads a group of channels is linear in them, and is refitted after a cut (see docs/repair.md). What is lost then
is not what a channel carried, but what the kept ones cannot say in its place. With H = (G + λ·d·I)⁻¹, G the second
moments of a reader's inputs and W its weight, the removal of the inputs c costs

    ΔE = tr W_c (H_cc)⁻¹ W_cᵀ,   and then   W ← W − W_c (H_cc)⁻¹ H_c·,   H ← H − H_·c (H_cc)⁻¹ H_c·

Source: Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon (NeurIPS 1992), for the
squared error of each reader.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ekgfx.axes import Axis, axes, membership, positions
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.plan import Plan
from ekgfx.graph.propagation import Operation
from ekgfx.repair.forms import of_positions
from ekgfx.repair.moments import PRECISION, Moments
from ekgfx.repair.operators import LinearOperator, find_operators
from ekgfx.repair.walk import CHUNK
from ekgfx.search.importance import Scores
from ekgfx.search.importance_peers import magnitude
from ekgfx.search.problem import Problem
from ekgfx.search.reward import Knowledge

log = logging.getLogger("ekgfx")

POSITIONS = 40_000
"""Most output positions of a reader that its moments are of, over all batches."""
AT_ONCE = 1 / 32
"""Share of the channels that are left, which are removed together."""
RIDGE = 1.0
"""λ in inputs per position: a refit to few images cannot be trusted far."""


@dataclass(frozen=True)
class Reader:
    """What reads a group: G products of an O×D matrix with D inputs. gram: G×D×D, with the ridge; matrix: G×O×D;
    channel: G×D, the channel of each input, −1 for none of the group."""

    gram: Tensor
    matrix: Tensor
    channel: Tensor


def least_squares(problem: Problem, plan: Plan, knowledge: Knowledge | None) -> Scores:
    """The error at which each channel goes where the readers of its group are refitted after every removal, relative to
    what their outputs vary. Looks at the images alone, not at labels. See the module's text.

    Groups that no linear operator reads are ordered by the L1 norm of their weights, and named in the log.
    """
    network = Watched(problem, plan)
    kept = problem.traced.groups.kept(plan)
    reading: dict[str, list[tuple[LinearOperator, Tensor]]] = {name: [] for name in problem.groups}
    for operator in find_operators(network)[0]:
        for name, found in reading.items():
            channel = read_channels(network, operator, problem.traced.groups[name].axis, kept)
            if channel is not None:
                found.append((operator, channel))
    moments = network.watch({operator for found in reading.values() for operator, _ in found})
    scores, bare = {}, []
    for name, found in reading.items():
        size, own = problem.traced.groups[name].size, list(problem.kept(plan, name))
        scores[name] = torch.zeros(size, dtype=PRECISION)
        readers = [Reader(damped(moments[o.node], o.offset is not None), matrix_of(network, o), c) for o, c in found]
        if readers:
            scores[name][own] = removal_errors(readers, size)[own]
        else:
            bare.append(name)
    if bare:
        log.warning("no linear operator reads %s: ordered by the L1 norm of the weights", ", ".join(bare))
        norms = magnitude(problem, plan, knowledge)
        scores |= {name: norms[name] / norms[name].sum().clamp_min(1e-300) for name in bare}
    return scores


class Watched(SubNetwork):
    """A sub-network whose linear operators are watched as they compute: their inputs are not kept."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        like, self.problem = problem.network(plan), problem
        kept = problem.traced.groups.kept(plan)
        super().__init__(problem.traced, kept, weights=like.weights, **like.manner)
        self.looks: dict[fx.Node, Callable[[Mapping[str, Any], Any], None]] = {}

    def compute(self, operation: Operation, args: dict[str, Any], counts: Mapping[Axis, int], spare: bool) -> Any:
        given = dict(args)
        value = super().compute(operation, args, counts, spare)
        if operation.node in self.looks:
            self.looks[operation.node](given, value)
        return value

    def watch(self, operators: Iterable[LinearOperator]) -> dict[fx.Node, Moments]:
        """The moments of the operators' inputs over the validation batches."""
        found: dict[fx.Node, Moments] = {}
        most = -(-POSITIONS // max(len(self.problem.batches), 1))

        def looking(operator: LinearOperator) -> Callable[[Mapping[str, Any], Any], None]:
            nodes = (operator.input, operator.weight)
            name, weight = (next(n for n, v in operator.operation.args.items() if v is node) for node in nodes)

            def look(args: Mapping[str, Any], value: Any) -> None:
                grid = operator.form.grid(value)
                picks = of_positions(grid, most, torch.Generator().manual_seed(self.problem.seed)).to(value.device)
                for piece in picks.split(max(CHUNK // operator.form.matrix(args[weight])[:, 0].numel(), 16)):
                    x = operator.form.inputs(args[name], grid, piece).float()
                    if operator.node not in found:
                        found[operator.node] = Moments.empty(x.mean(0), 0)
                    found[operator.node].add(x, x[..., :0], x[..., :0])

            return look

        self.looks = {operator.node: looking(operator) for operator in operators}
        with torch.no_grad():
            for batch in self.problem.batches:
                batch.inputs.into(self)
        self.looks = {}
        return found


def damped(moments: Moments, offset: bool) -> Tensor:
    """The inputs' moments, about their means where an offset can make up for these, with the ridge."""
    gram = (moments.centered() if offset else moments.raw())[0] / max(moments.count, 1)
    d = gram.diagonal(dim1=1, dim2=2).mean(1)
    ridge = d * min(RIDGE * gram.shape[1] / max(moments.count, 1), 1.0) + torch.finfo(PRECISION).tiny
    return (gram + torch.diag_embed(ridge[:, None].expand(gram.shape[:2]))).cpu()


def matrix_of(network: SubNetwork, operator: LinearOperator) -> Tensor:
    """The operator's weight, G×O×D."""
    return operator.form.matrix(operator.entries.read(network.weights)).detach().to(PRECISION).cpu()


def read_channels(
    network: SubNetwork, operator: LinearOperator, axis: Axis, kept: Mapping[Axis, Tensor]
) -> Tensor | None:
    """G×D: the channel of `axis` that each input is of; None where the operator does not sum over the channels."""
    dims = network.graph.dims[operator.weight.name]
    shape = operator.entries.read(network.weights).shape
    for d, dim in enumerate(dims if isinstance(dims, tuple) else ()):
        if axis in set(axes(dim)):
            index = membership(dim, axis)[positions(dim, kept)]
            along = index.view(-1, *[1] * (len(shape) - d - 1)).expand(shape)
            table = operator.form.matrix(along)
            if bool((table == table[:, :1]).all()) and bool((table != table[:, :, :1]).any()):
                return table[:, 0]
    return None


def removal_errors(readers: Sequence[Reader], size: int) -> Tensor:
    """The error at which each of `size` channels goes, the cheapest first, never less than that of an earlier one; 0
    for channels that no reader has."""
    states = [Surgeon(reader, size) for reader in readers]
    left = torch.stack([state.present for state in states]).any(0)
    scores, worst = torch.zeros(size, dtype=PRECISION), 0.0
    while bool(left.any()):
        errors = torch.stack([state.errors() for state in states]).sum(0)
        errors[~left] = torch.inf
        gone = errors.argsort(stable=True)[: max(1, int(int(left.sum()) * AT_ONCE))]
        for channel in gone.tolist():
            worst = max(worst * (1 + 1e-12), float(errors[channel]))  # the order decides between equals
            scores[channel] = worst
        left[gone] = False
        for state in states if bool(left.any()) else ():
            state.remove(gone)
    return scores


class Surgeon:
    """A reader while channels are removed: H and W of the module's text, brought up to date."""

    def __init__(self, reader: Reader, size: int) -> None:
        groups, _, inputs = reader.matrix.shape
        counts = torch.stack([torch.bincount(row[row >= 0], minlength=size) for row in reader.channel])
        self.present, wide = counts.sum(0) > 0, int(counts.max())
        scale = float((reader.matrix @ reader.gram * reader.matrix).sum())
        self.matrix = torch.cat([reader.matrix, reader.matrix.new_zeros(*reader.matrix.shape[:2], wide)], 2)
        self.matrix /= max(scale, torch.finfo(PRECISION).tiny) ** 0.5
        spare = torch.eye(wide, dtype=PRECISION).expand(groups, wide, wide)  # inputs that channels with fewer have
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(reader.gram))
        self.inverse = torch.stack([torch.block_diag(*pair) for pair in zip(inverse, spare, strict=True)])
        self.inputs = torch.arange(inputs, inputs + wide).expand(groups, size, wide).clone()
        for g, row in enumerate(reader.channel):
            own = torch.nonzero(row >= 0).flatten()
            own = own[row[own].argsort(stable=True)]
            rank = torch.cat([torch.arange(count) for count in counts[g].tolist()])
            self.inputs[g, row[own], rank] = own

    def errors(self) -> Tensor:
        """ΔE of every channel by itself."""
        total = torch.zeros(self.inputs.shape[1], dtype=PRECISION)
        for inverse, matrix, own in zip(self.inverse, self.matrix, self.inputs, strict=True):
            blocks = inverse[own[:, :, None], own[:, None, :]]
            weights = matrix[:, own].permute(1, 2, 0)  # channels × inputs of each × outputs
            total += (torch.linalg.solve(blocks, weights) * weights).sum((1, 2))
        return total

    def remove(self, channels: Tensor) -> None:
        """Refit what is left."""
        for g, own in enumerate(self.inputs):
            gone = own[channels].flatten().unique()
            gone = gone[gone < self.matrix.shape[2] - own.shape[1]]
            if len(gone):
                inverse, matrix = self.inverse[g], self.matrix[g]
                back = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
                self.matrix[g] = matrix - matrix[:, gone] @ back
                self.inverse[g] = inverse - inverse[:, gone] @ back
                self.matrix[g, :, gone] = 0
                self.inverse[g, gone], self.inverse[g, :, gone] = 0, 0
                self.inverse[g, gone, gone] = 1
