"""Where a module's own Python cannot express the pruned network, its part of the graph takes its place.

Some forwards assume equalities between widths that pruning breaks (a reshape to the width of the stream instead of
heads × features, say). The smallest such module is replaced by an fx GraphModule: the same parameters under the same
names, trainable, any batch size, standard layers inside it still modules (so train() and eval() work); everything
around it keeps its class.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ekgfx import leaf
from ekgfx.attributes import STANDARD
from ekgfx.axes import Axis, Expr, Prod, Sum, axes, count
from ekgfx.errors import PruneError
from ekgfx.graph import AxisGraph, Operation
from ekgfx.leaf import evaluation_mode
from ekgfx.nodes import callers
from ekgfx.sliced import SubNetwork

LAYERS = (*STANDARD, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def replace_module(root: nn.Module, path: str, graph: AxisGraph, counts: Mapping[Axis, int]) -> nn.Module:
    """Put the graph of the module at `path` in its place in the cut model `root`; returns the new root.

    Raises:
        PruneError: the module is called several times, or its inputs and outputs are not all tensors of the graph.
    """
    replaced = graph_module(root.get_submodule(path), path, graph, counts)
    if not path:
        return replaced
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, replaced)
    return root


def graph_module(cut: nn.Module, path: str, graph: AxisGraph, counts: Mapping[Axis, int]) -> fx.GraphModule:
    """The part of the graph that the module at `path` runs, over the weights of its cut version."""
    if any(f"{path}.".startswith(f"{name}.") for name in graph.leaves):
        raise PruneError(f"{path} is a leaf, which runs as it is")
    inside = [node for node in graph.graph.nodes if node.op == "call_function" and path in callers(node)]
    if any(f"{path}@" in name for node in inside for name in _raw_callers(node)):
        raise PruneError(f"{path} is called more than once")
    body, own = set(inside), _own_weights(graph, path)
    outside = [n for n in graph.graph.nodes if n not in body and body & n.users.keys() and n.name not in own]
    inputs = [n for n in outside if n.name not in graph.constants]  # another module's weight may be an argument
    results = [n for n in inside if n.users.keys() - body]
    arguments, output = _signature(graph, path, inputs, results)

    new = fx.Graph()
    made: dict[str, Any] = {}
    for name, node in arguments:
        placeholder = new.placeholder(name) if node else new.placeholder(name, default_value=None)
        if node:
            made[node.name] = placeholder
    batch = _BatchSize(new, graph, inputs, made, counts)
    for name, constant in graph.constants.items():
        if any(n.name == name for n in outside):
            cut.register_buffer(f"_{name}", constant, persistent=False)
            made[name] = new.get_attr(f"_{name}")
    for node in inside:
        made[node.name] = _copy(node, path, graph, own, new, made, batch)
    new.output(pytree.tree_map_only(fx.Node, lambda n: made[n.name], output))
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


def _own_weights(graph: AxisGraph, path: str) -> dict[str, str]:
    """Placeholders of the weights of the module at `path` → what the module itself calls them."""
    module = graph.model.get_submodule(path)
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    local = {id(tensor): name for name, tensor in reversed(tensors)}
    return {
        placeholder: local[id(graph.tensor(name))]
        for placeholder, name in graph.weights.items()
        if id(graph.tensor(name)) in local
    }


def _raw_callers(node: fx.Node) -> list[str]:
    return [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _signature(
    graph: AxisGraph, path: str, inputs: list[fx.Node], results: list[fx.Node]
) -> tuple[list[tuple[str, fx.Node | None]], Any]:
    """Forward's arguments as (name, node), and its output with nodes for tensors: run both, compare by value."""
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen.update(args=args, kwargs=kwargs, output=output)

    module = graph.model.get_submodule(path)
    args, kwargs = graph.example
    handle = module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad(), evaluation_mode(graph.model):
        graph.model(*args, **kwargs)
        handle.remove()
        _, values = SubNetwork(graph, {}).run(args, kwargs, [n.name for n in (*inputs, *results)])

    def find(value: Any, nodes: list[fx.Node]) -> fx.Node | None:
        for node in nodes:
            known = values[node.name]
            if (
                isinstance(known, Tensor)
                and known.shape == value.shape
                and torch.allclose(known, value, equal_nan=True)
            ):
                return node
        return None

    if not seen:
        raise PruneError(f"{path} was not called")
    names = list(_parameter_names(module, len(seen["args"])))
    arguments = [
        (n, find(v, inputs) if isinstance(v, Tensor) else None) for n, v in zip(names, seen["args"], strict=False)
    ]
    arguments += [(n, find(v, inputs) if isinstance(v, Tensor) else None) for n, v in seen["kwargs"].items()]
    missing = {n.name for n in inputs} - {node.name for _, node in arguments if node}
    output = pytree.tree_map_only(Tensor, lambda t: find(t, [*reversed(results), *inputs]), seen["output"])
    if missing or any(leaf is None for leaf in pytree.tree_leaves(output)):
        raise PruneError(f"the inputs and outputs of {path or 'the model'} are not all values of the graph")
    return arguments, output


def _parameter_names(module: nn.Module, positional: int) -> list[str]:
    code = type(module).forward.__code__
    names = list(code.co_varnames[1 : code.co_argcount])
    return names + [f"arg_{i}" for i in range(len(names), positional)]


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


def _copy(
    node: fx.Node,
    path: str,
    graph: AxisGraph,
    own: Mapping[str, str],
    new: fx.Graph,
    made: dict[str, Any],
    batch: _BatchSize,
) -> Any:
    """One operator of the old graph in the new one; a standard layer becomes a call of the layer itself."""
    operation = graph.operation(node)
    if operation is None:
        return (
            new.node_copy(node, lambda n: made[n.name]) if all(n.name in made for n in node.all_input_nodes) else None
        )
    if operation.target is leaf.OPERATOR:
        return _call_of_leaf(operation, path, graph, new, made)
    inputs = [n for n in node.all_input_nodes if n.name not in own]
    alone = graph.operations_of[operation.module] == 1
    if alone and len(inputs) == 1 and operation.module != path and operation.module.startswith(path):
        inner = operation.module.removeprefix(path).removeprefix(".")
        if isinstance(graph.model.get_submodule(operation.module), LAYERS):
            return new.call_module(inner, (made[inputs[0].name],))
    return _recomputed(operation, own, new, made, batch)


def _call_of_leaf(operation: Operation, path: str, graph: AxisGraph, new: fx.Graph, made: dict[str, Any]) -> fx.Node:
    """The leaf itself is called, with the example's arguments where they are no tensors."""
    inputs = [made[node.name] for node in operation.args["inputs"]]
    positional, named = graph.leaves.arguments(operation.args, inputs)
    called = new.call_module(operation.args["module"].removeprefix(f"{path}." if path else ""), positional, named)
    return new.call_function(leaf.tensors_of, (called,))


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
