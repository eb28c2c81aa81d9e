"""The masked oracle: the uncut network with zeros in place of what a plan cuts, which a sliced one must equal."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from ekgfx.axes import ONE, Axis, Dims, Expr, Prod, Sum, axes, count, resolve
from ekgfx.execution.subnetwork import GraphRunner, resize
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.plan import Plan
from ekgfx.graph.propagation import Operation
from ekgfx.graph.ways import seeded
from ekgfx.rules.registry import is_dims
from ekgfx.surgery.check import relative_error
from ekgfx.tracing.traced import TracedModel


class MaskedNetwork(GraphRunner):
    """The uncut network with the pruned entries of every weight set to zero.

    Where a value depends on which positions take part (a layer norm), it is taken over the kept ones. Where a product
    has no weight in it, what is cut of its factors contributes nothing (it need not be zero, as a weight's is).
    Everything else runs exactly as in the original, so agreement with the sliced graph shows that the cut is right.
    """

    def __init__(self, graph: AxisGraph, kept: Mapping[Axis, Tensor]) -> None:
        weights = {name: mask_tensor(graph.tensor(name), dims, kept) for name, dims in graph.weight_dims().items()}
        super().__init__(graph, weights)
        self.kept = kept

    def compute(self, operation: Operation, args: dict[str, Any], counts: Mapping[Axis, int], spare: bool) -> Any:
        if not operation.effect.statistics:
            if not self._weighted(operation):
                for name, which, dim in operation.effect.sums:
                    args[name] = self._silenced(args[name], operation.args[name], which, dim, counts)
            return self.call(operation, resize(operation, args, counts))
        cut = {name: self._gather(value, operation.call.args[name], counts) for name, value in args.items()}
        kept = {axis: len(index) for axis, index in self.kept.items()}
        result = self.call(operation, resize(operation, cut, {**kept, **counts}))
        outputs = operation.effect.outputs
        if isinstance(result, list | tuple):
            return [_scatter(value, dims, self.kept, counts) for value, dims in zip(result, outputs, strict=True)]
        return _scatter(result, outputs[0], self.kept, counts)

    def _weighted(self, operation: Operation) -> bool:
        """Whether one factor of an operator's products is a weight as it stands: what is cut of that is zero."""
        produces = operation.effect.produces
        factor = operation.args[produces[0]] if produces else None
        return isinstance(factor, fx.Node) and factor.name in self.graph.weights

    def _silenced(self, value: Any, node: Any, which: int | None, dim: int, counts: Mapping[Axis, int]) -> Any:
        """An argument with what is cut of one dimension (of one of its tensors) set to zero."""
        if which is not None:
            return [
                self._silenced(v, n, None, dim, counts) if i == which else v
                for i, (v, n) in enumerate(zip(value, node, strict=True))
            ]
        dims = self.graph.dims[node.name]
        only = tuple(e if d == dim % len(dims) else ONE for d, e in enumerate(dims))
        return mask_tensor(value, only, self.kept, counts)

    def _gather(self, value: Any, dims: Any, counts: Mapping[Axis, int]) -> Any:
        if isinstance(value, Tensor) and is_dims(dims):
            for d, dim in enumerate(dims):
                if any(axis in self.kept for axis in axes(dim)):
                    value = value.index_select(d, stays(dim, self.kept, counts).nonzero().flatten())
        return value


def _scatter(value: Tensor, dims: Dims, kept: Mapping[Axis, Tensor], counts: Mapping[Axis, int]) -> Tensor:
    if not dims:
        return value
    full = value.new_zeros([count(dim, counts) for dim in dims])
    rows = [stays(dim, kept, counts).nonzero().flatten() for dim in dims]
    full[torch.meshgrid(*rows, indexing="ij")] = value
    return full


def mask_tensor(
    tensor: Tensor, dims: Dims, kept: Mapping[Axis, Tensor], counts: Mapping[Axis, int] = MappingProxyType({})
) -> Tensor:
    """The tensor with every position that is not kept set to zero. counts: sizes that are not the traced ones."""
    for d, dim in enumerate(dims):
        if any(axis in kept for axis in axes(dim)):
            shape = [-1 if i == d else 1 for i in range(tensor.ndim)]
            mask = stays(dim, kept, counts).view(shape).to(tensor.device)
            tensor = torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype))
    return tensor


def stays(expr: Expr, kept: Mapping[Axis, Tensor], counts: Mapping[Axis, int]) -> Tensor:
    """For every position of the uncut dimension whether it is kept. counts: sizes of axes that are not the traced ones,
    as the batch's."""
    match resolve(expr):
        case Axis() as axis if axis in kept:
            return torch.zeros(axis.size, dtype=torch.bool).index_fill(0, kept[axis], True)
        case Axis() as axis:
            return torch.ones(counts.get(axis, axis.size), dtype=torch.bool)
        case Sum(terms):
            return torch.cat([stays(term, kept, counts) for term in terms])
        case Prod(factors):
            mask = torch.ones(1, dtype=torch.bool)
            for factor in factors:
                mask = (mask[:, None] & stays(factor, kept, counts)).flatten()
            return mask


def check_masked(
    traced: TracedModel, plan: Plan, inputs: tuple, named: Mapping[str, Any] = MappingProxyType({})
) -> float:
    """Relative error between the sliced graph and the masked original, on the given inputs.

    Args:
        traced: the traced model, in float64 for an error that is rounding alone.
        plan: the plan that both follow.
        inputs: what the model is called with.
        named: what it is called with by name.

    Example:
        >>> from ekgfx.verify import check_masked
        >>> check_masked(traced, plan, (images,))
    """
    networks = traced.subnetwork(plan), MaskedNetwork(traced.left_by(plan), traced.groups.kept(plan))
    outputs = []
    for network in networks:
        with torch.no_grad(), seeded(traced.model):  # both draw the same random numbers
            outputs.append(network(*inputs, **named))
    return relative_error(*outputs)
