"""Where a module's own Python cannot express the pruned network, its part of the graph takes its place.

Some forwards assume equalities between widths that pruning breaks (a reshape to the width of the stream instead of
heads × features, say). The smallest such module is replaced by an fx GraphModule: the same parameters under the same
names, trainable, any batch size, standard layers inside it still modules (so train() and eval() work); everything
around it keeps its class.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ekgfx import leaf
from ekgfx.attributes import STANDARD
from ekgfx.axes import Axis, Expr, Prod, Sum, axes, count
from ekgfx.containers import tensors_in
from ekgfx.errors import PruneError
from ekgfx.graph import AxisGraph, Operation
from ekgfx.returns import Holder
from ekgfx.signature import Part

LAYERS = (*STANDARD, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def replace_modules(root: nn.Module, parts: Sequence[Part], graph: AxisGraph, counts: Mapping[Axis, int]) -> nn.Module:
    """Put parts of the graph in the places of their modules in the cut model `root`; returns the new root.

    A module inside another one of them is part of that one's graph.
    """
    outermost = [part for part in parts if not any(_within(part.path, o.path) for o in parts if o is not part)]
    made = {part.path: _graph_module(root.get_submodule(part.path), part, graph, counts) for part in outermost}
    for path, module in made.items():
        if not path:
            return module
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, module)
    return root


def _within(path: str, outer: str) -> bool:
    return f"{path}.".startswith(f"{outer}." if outer else "")


def _graph_module(cut: nn.Module, part: Part, graph: AxisGraph, counts: Mapping[Axis, int]) -> fx.GraphModule:
    """A part of the graph as a module, over the weights of the cut version of its module."""
    new = fx.Graph()
    made: dict[str, Any] = {}
    for name, node in part.arguments:
        placeholder = new.placeholder(name) if node else new.placeholder(name, default_value=None)
        if isinstance(node, fx.Node):
            made[node.name] = placeholder
        elif node:
            inside = new.call_function(tensors_in, (placeholder,))
            for i, each in enumerate(node):
                if each is not None:
                    made[each.name] = new.call_function(operator.getitem, (inside, i))
    batch = _BatchSize(new, graph, part.inputs, made, counts)
    for name, constant in graph.constants.items():
        if any(node.name == name for node in part.constants):
            cut.register_buffer(f"_{name}", constant, persistent=False)
            made[name] = new.get_attr(f"_{name}")
    for node in part.nodes:
        made[node.name] = _copy(node, part, graph, new, made, batch)
    returned = [made[node.name] for node in part.returned]
    if part.frame.plain:
        new.output(part.frame.filled(returned))
    else:
        cut.add_module(Holder.NAME, Holder(part.frame))
        new.output(new.call_module(Holder.NAME, tuple(returned)))
    module = fx.GraphModule(cut, new, class_name=f"{type(cut).__name__}Graph")
    state = {**dict(cut.named_parameters()), **{n: t for n, t in cut.named_buffers() if n in cut.state_dict()}}
    for name, tensor in state.items():
        _keep(module, name, tensor)
    return module.train(cut.training)


def _keep(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Hold a tensor under its name also where the graph does not read it: it is part of the model's state."""
    *path, leaf = name.split(".")
    for step in path:
        if not hasattr(module, step):
            module.add_module(step, nn.Module())
        module = getattr(module, step)
    if not hasattr(module, leaf):
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, tensor)
        else:
            module.register_buffer(leaf, tensor)


class _BatchSize:
    """Integers of the new graph: constants, or multiples of the batch size read from an input."""

    def __init__(
        self, new: fx.Graph, graph: AxisGraph, inputs: list[fx.Node], made: dict[str, Any], counts: Mapping[Axis, int]
    ) -> None:
        self.new, self.counts, self.axis = new, counts, graph.batch
        self.size: fx.Node | None = None
        for node in inputs:
            for d, dim in enumerate(graph.dims.get(node.name, ())):
                if self.size is None and self._varies(dim):
                    length = new.call_function(torch.ops.aten.sym_size.int, (made[node.name], d))
                    self.size = self._times(length, count(dim, {**counts, self.axis: 1}), divide=True)

    def _varies(self, expr: Expr) -> bool:
        return any(axis is self.axis for axis in axes(expr))

    def _times(self, node: fx.Node, factor: int, divide: bool = False) -> fx.Node:
        return (
            node
            if factor == 1
            else self.new.call_function(operator.floordiv if divide else operator.mul, (node, factor))
        )

    def __call__(self, expr: Expr) -> int | fx.Node:
        if self.size is None or not self._varies(expr):
            return count(expr, self.counts)
        return self._times(self.size, count(expr, {**self.counts, self.axis: 1}))


def _copy(node: fx.Node, part: Part, graph: AxisGraph, new: fx.Graph, made: dict[str, Any], batch: _BatchSize) -> Any:
    """One operator of the old graph in the new one; a standard layer becomes a call of the layer itself."""
    operation = graph.operation(node)
    if operation is None:
        return (
            new.node_copy(node, lambda n: made[n.name]) if all(n.name in made for n in node.all_input_nodes) else None
        )
    if operation.target is leaf.OPERATOR:
        return _call_of_leaf(operation, part.path, graph, new, made)
    inputs = [n for n in node.all_input_nodes if n.name not in part.weights]
    alone = graph.operations_of[operation.module] == 1
    if alone and len(inputs) == 1 and operation.module != part.path and operation.module.startswith(part.path):
        inner = operation.module.removeprefix(part.path).removeprefix(".")
        if isinstance(graph.model.get_submodule(operation.module), LAYERS):
            return new.call_module(inner, (made[inputs[0].name],))
    return _recomputed(operation, part.weights, new, made, batch)


def _call_of_leaf(operation: Operation, path: str, graph: AxisGraph, new: fx.Graph, made: dict[str, Any]) -> fx.Node:
    """The leaf itself is called, with the example's arguments where they are no tensors."""
    inputs = [made[node.name] for node in operation.args["inputs"]]
    if not graph.leaves[operation.args["module"]][operation.args["number"]].arguments.plain:
        raise PruneError(f"{operation.args['module']} takes what a graph cannot make")
    positional, named = graph.leaves.arguments(operation.args, inputs)
    called = new.call_module(operation.args["module"].removeprefix(f"{path}." if path else ""), positional, named)
    return new.call_function(tensors_in, (called,))


def _recomputed(
    operation: Operation, own: Mapping[str, str], new: fx.Graph, made: dict[str, Any], batch: _BatchSize
) -> fx.Node:
    def load(value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value.name in own and value.name not in made:
                made[value.name] = new.get_attr(own[value.name])
            return made[value.name]
        return [load(v) for v in value] if isinstance(value, list | tuple) else value

    args = {name: load(value) for name, value in operation.args.items()}
    for name, expr in operation.effect.sizes.items():
        args[name] = batch(expr) if isinstance(expr, Axis | Sum | Prod) else [batch(e) for e in expr]
    schema = operation.target._schema.arguments
    positional = tuple(args[a.name] for a in schema if not a.kwarg_only)
    return new.call_function(operation.target, positional, {a.name: args[a.name] for a in schema if a.kwarg_only})
