"""Evaluate a sub-network without surgery: the graph on sliced weights, integer arguments recomputed.

This is the one mechanism by which a sub-network is judged: the search runs it, surgery is checked against it.
"""

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from ekgfx.axes import Axis, Expr, axes, counted, positions, resolve
from ekgfx.execution.channels_last import batch_norm
from ekgfx.graph import opaque as leaf
from ekgfx.graph.arguments import arranged
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.in_place import in_place_twin
from ekgfx.graph.propagation import Operation
from ekgfx.graph.sizes import check_shapes

BATCH_NORM = torch.ops.aten.batch_norm.default
VIEW = torch.ops.aten.view.default
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
KERNELS = ("aten.conv", "aten.linear")  # operators whose weights the rescaling applies to


def has_batch_norm(graph: AxisGraph) -> bool:
    """Whether an operator takes statistics of the batch."""
    return any(operation.target is BATCH_NORM for operation in graph.operations)


class GraphRunner:
    """Runs an axis graph operator by operator; subclasses say on which weights, and what an operator computes.

    sources: nodes whose values gradients are taken of, whether or not anything that they come from asks for one.
    """

    sources: Collection[str] = ()

    def __init__(self, graph: AxisGraph, weights: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.weights = weights
        self.device = next((t.device for t in weights.values()), torch.device("cpu"))

    def compute(self, operation: Operation, args: dict[str, Any], counts: Mapping[Axis, int], spare: bool) -> Any:
        """The operator's value. spare: nobody else will read its first argument, which may be overwritten."""
        raise NotImplementedError

    def call(self, operation: Operation, args: Mapping[str, Any]) -> Any:
        """What an operator, or the module that it stands for, makes of the arguments."""
        if operation.target is leaf.OPERATOR:
            return self.graph.leaves.run(self.graph.model, args)
        return call(operation.target, args)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs)[0]

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, capture: Iterable[str] = ()
    ) -> tuple[Any, dict[str, Any]]:
        """The model's output, and the values of the nodes named in `capture` (still attached for autograd).

        Raises:
            PlanError: the inputs are not those that were traced, or the graph does not hold for their shapes.
        """
        wanted = set(capture)
        inputs = self.inputs(args, kwargs or {})
        *nodes, output = self.graph.graph.nodes
        dying = {at: [name for name in dead if name not in wanted] for at, dead in self.graph.last_uses.items()}
        values = self.follow(nodes, inputs, {}, dying)
        return self.output(output, values), {name: values[name] for name in wanted}

    def follow(
        self,
        nodes: Iterable[fx.Node],
        inputs: Mapping[str, Any],
        values: dict[str, Any],
        dying: Mapping[str, Iterable[str]],
    ) -> dict[str, Any]:
        """Computes `nodes`, in the order of the graph, from and into `values`, which is returned.

        inputs: the model's inputs by placeholder. dying: node → nodes whose values nobody reads after it.
        """
        graph, counts = self.graph, self.counts(inputs)
        ours: set[str] = set()
        for node in nodes:
            dead = dying.get(node.name, ())
            if node.op == "placeholder":
                values[node.name] = inputs[node.name] if node.name in inputs else self._weight(node.name)
            elif node.target is operator.getitem:
                values[node.name] = values[node.args[0].name][node.args[1]]  # type: ignore[union-attr,index]
            elif (operation := graph.operation(node)) is not None:
                loaded = {name: _load(value, values) for name, value in operation.args.items()}
                first = graph.overwritable.get(node.name)
                spare = (
                    first in ours
                    and first in dead
                    and (
                        not (torch.is_grad_enabled() and values[first].requires_grad)
                        or node.name in graph.overwritable_with_gradients
                    )
                )
                values[node.name] = self.compute(operation, loaded, counts, spare)
                ours.add(node.name)
            if node.name in self.sources and torch.is_grad_enabled() and not values[node.name].requires_grad:
                values[node.name].requires_grad_(values[node.name].is_floating_point())
            for name in dead:
                values.pop(name, None)
        return values

    def counts(self, inputs: Mapping[str, Any]) -> dict[Axis, int]:
        """Positions of the axes of the inputs at hand: the batch, and the sizes that are theirs alone."""
        found: dict[Axis, int] = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                for dim, size in zip(map(resolve, self.graph.dims[name]), value.shape, strict=True):
                    if isinstance(dim, Axis):
                        found.setdefault(dim, size)
        return found

    def _weight(self, placeholder: str) -> Tensor:
        name = self.graph.weights.get(placeholder)
        if name is None:
            return self.graph.constants[placeholder].to(self.device)
        return self.weights[name].to(self.device) if name in self.graph.tables else self.weights[name]

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The model's arguments by placeholder.

        Raises:
            PlanError: they are not those that were traced, or the graph does not hold for their shapes.
        """
        whole = self.graph.whole or self.graph  # which is what the model computes
        check_shapes(whole, args, kwargs, lambda: SubNetwork(whole, {}))
        return dict(zip(self.graph.inputs, arranged(self.graph, args, kwargs), strict=True))

    def output(self, node: fx.Node, values: Mapping[str, Any]) -> Any:
        """The model's output from the values that the graph's output node reads."""
        leaves = [_load(value, values) for value in cast(list[Any], node.args[0])]
        return self.graph.returned(leaves[len(leaves) - self.graph.out_spec.num_leaves :])


def _load(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, fx.Node):
        return values[value.name]
    if isinstance(value, list | tuple):
        return [_load(v, values) for v in value]
    return value


def call(target: Any, args: Mapping[str, Any]) -> Any:
    """Call an operator with its arguments by schema name."""
    if not isinstance(target, OpOverload):
        positional = [value for name, value in args.items() if name.isdigit()]
        return target(*positional, **{name: value for name, value in args.items() if not name.isdigit()})
    schema = target._schema.arguments
    return target(
        *(args[a.name] for a in schema if not a.kwarg_only), **{a.name: args[a.name] for a in schema if a.kwarg_only}
    )


def resize(operation: Operation, args: dict[str, Any], counts: Mapping[Axis, int]) -> dict[str, Any]:
    """The arguments with every integer that follows from an expression recomputed for the kept counts."""
    for name, expr in operation.effect.sizes.items():
        args[name] = counted(expr, counts)
    return args


class SubNetwork(GraphRunner):
    """The network that is left when every axis keeps the given positions; differentiable in weights and activations.

    Args:
        graph: the traced model; its current weights are sliced now.
        kept: axis → ascending kept positions (axes that are not named keep all).
        batch_stats: BatchNorm normalizes by the statistics of the batch; running averages are neither used nor changed.
        rescale: kernels of convolutions and linear layers keep the Frobenius norm that they had before slicing.
        weights: the sliced weights, where they are known already.
        amp: half precision that operators are autocast to; None computes in the weights' own.
        channels_last: memory format of four-dimensional weights; inputs are the caller's business.
    """

    def __init__(
        self,
        graph: AxisGraph,
        kept: Mapping[Axis, Tensor],
        *,
        batch_stats: bool = False,
        rescale: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        amp: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        weights = slice_weights(graph, kept, rescale=rescale) if weights is None else weights
        super().__init__(graph, in_channels_last(weights) if channels_last else weights)
        self.kept = {axis: len(index) for axis, index in kept.items()}
        self.batch_stats, self.amp, self.channels_last = batch_stats, amp, channels_last

    @property
    def manner(self) -> dict[str, Any]:
        """How it computes, as the arguments of a network that computes alike."""
        return {"batch_stats": self.batch_stats, "amp": self.amp, "channels_last": self.channels_last}

    def follow(self, *args: Any) -> dict[str, Any]:
        with nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp):
            return super().follow(*args)

    def counts(self, inputs: Mapping[str, Any]) -> dict[Axis, int]:
        return {**self.kept, **super().counts(inputs)}

    def compute(self, operation: Operation, args: dict[str, Any], counts: Mapping[Axis, int], spare: bool) -> Any:
        if self.batch_stats and operation.target is BATCH_NORM:
            normalized = batch_norm(args["input"], args["weight"], args["bias"], args["eps"], overwrite=spare)
            if normalized is not None:
                return normalized
            args |= {"running_mean": None, "running_var": None, "training": True}
        if args.get("device") is not None:
            args["device"] = self.device
        args = resize(operation, args, counts)
        if operation.target is VIEW:  # which asks for the memory order of the tracing; a kernel's may follow the widths
            return args["self"].reshape(args["size"])
        if spare and (result := overwritten(operation, args)) is not None:
            return result
        return self.call(operation, args)


def overwritten(operation: Operation, args: Mapping[str, Any]) -> Tensor | None:
    """The operator's value in the place of its first argument; None where it does not fit there."""
    twin, first, other = in_place_twin(operation.target), args.get("self"), args.get("other")
    if twin is None or not isinstance(first, Tensor):
        return None
    if isinstance(other, Tensor) and (other.dtype != first.dtype or other.shape != first.shape):
        return None
    return cast(Tensor, call(twin, args))


def in_channels_last(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Four-dimensional weights with their channels last in memory, others as they are."""
    return {
        name: weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight
        for name, weight in weights.items()
    }


def slice_weights(
    graph: AxisGraph, kept: Mapping[Axis, Tensor], *, rescale: bool = False, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Parameters and buffers of the graph (all, or those in `names`) with only the kept positions; uncut ones are the
    model's own tensors."""
    return {name: cut for name, _, cut in slices(graph, kept, rescale=rescale, names=names)}


def slices(
    graph: AxisGraph, kept: Mapping[Axis, Tensor], *, rescale: bool = False, names: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """As `slice_weights`, one after the other: name, the model's own tensor, and what is kept of it."""
    kernels = kernel_names(graph) if rescale else set()
    for name, dims in graph.weight_dims().items():
        if names is not None and name not in names:
            continue
        full = graph.tensor(name)
        cut = slice_tensor(full, dims, kept)
        if name in kernels and cut is not full:
            cut = cut * (full.norm() / cut.norm().clamp_min(1e-12))
        yield name, full, cut


def slice_tensor(tensor: Tensor, dims: Iterable[Expr], kept: Mapping[Axis, Tensor]) -> Tensor:
    """The kept positions of every dimension, in the same memory format; the tensor itself where nothing is cut."""
    cut = tensor
    for d, dim in enumerate(dims):
        if any(axis in kept for axis in axes(dim)):
            cut = cut.index_select(d, positions(dim, kept).to(tensor.device))
    channels_last = CHANNELS_LAST.get(tensor.ndim)
    if cut is tensor or channels_last is None or tensor.is_contiguous():
        return cut
    return cut.contiguous(memory_format=channels_last) if tensor.is_contiguous(memory_format=channels_last) else cut


def kernel_names(graph: AxisGraph) -> set[str]:
    """Parameters that are, as they stand, the weight of a convolution or a linear layer."""
    names = set()
    for operation in graph.operations:
        weight = operation.args.get("weight")
        if str(operation.target).startswith(KERNELS) and isinstance(weight, fx.Node) and weight.name in graph.weights:
            names.add(graph.weights[weight.name])
    return names
