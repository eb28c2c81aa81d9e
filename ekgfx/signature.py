"""What part of a graph a module runs, and which values of the graph its forward is given and returns.

The graph knows operators, not calls. So the model is run once with a hook on every module in question, and the graph
once; an argument or a result is the node that has the same value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ekgfx.errors import PruneError
from ekgfx.graph import AxisGraph
from ekgfx.leaf import evaluation_mode
from ekgfx.nodes import callers
from ekgfx.sliced import SubNetwork


@dataclass(frozen=True)
class Part:
    """The operators of the module at `path`, in order.

    weights: placeholders of its weights → what the module itself calls them. inputs: nodes outside that it reads.
    constants: those of them that are constants of the graph. results: its nodes that others read.
    """

    path: str
    nodes: list[fx.Node]
    weights: dict[str, str]
    inputs: list[fx.Node]
    constants: list[fx.Node]
    results: list[fx.Node]


@dataclass(frozen=True)
class Signature:
    """arguments: (name, node) in the order of forward, no node for what is no tensor. output: what forward returns,
    with nodes in place of tensors."""

    arguments: list[tuple[str, fx.Node | None]]
    output: Any


def part_of(graph: AxisGraph, path: str) -> Part:
    """The part of the graph that the module at `path` runs.

    Raises:
        PruneError: the module is (in) a leaf, or is called more than once.
    """
    if any(f"{path}.".startswith(f"{name}.") for name in graph.leaves):
        raise PruneError(f"{path} is a leaf, which runs as it is")
    nodes = [node for node in graph.graph.nodes if node.op == "call_function" and path in callers(node)]
    if any(f"{path}@" in name for node in nodes for name in _raw_callers(node)):
        raise PruneError(f"{path} is called more than once")
    body, weights = set(nodes), _own_weights(graph, path)
    outside = [n for n in graph.graph.nodes if n not in body and body & n.users.keys() and n.name not in weights]
    constants = [n for n in outside if n.name in graph.constants]
    inputs = [n for n in outside if n.name not in graph.constants]  # another module's weight may be an argument
    return Part(path, nodes, weights, inputs, constants, [n for n in nodes if n.users.keys() - body])


def observe(graph: AxisGraph, parts: Sequence[Part]) -> dict[str, Signature]:
    """Path → the module's signature, from one run of the model and one of the graph on the example's inputs.

    Raises:
        PruneError: a module was not called, or not all it is given and returns are values of the graph.
    """
    calls: dict[str, tuple[tuple, dict[str, Any], Any]] = {}

    def note(path: str) -> Any:
        return lambda module, args, kwargs, output: calls.update({path: (args, kwargs, output)})

    hooks = [graph.model.get_submodule(p.path).register_forward_hook(note(p.path), with_kwargs=True) for p in parts]
    args, kwargs = graph.example
    try:
        with torch.no_grad(), evaluation_mode(graph.model):
            graph.model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    wanted = {node.name for part in parts for node in (*part.inputs, *part.results)}
    with torch.no_grad():
        _, values = SubNetwork(graph, {}).run(args, kwargs, wanted)
    return {part.path: _signature(graph, part, calls.get(part.path), values) for part in parts}


def _signature(graph: AxisGraph, part: Part, called: Any, values: dict[str, Any]) -> Signature:
    if called is None:
        raise PruneError(f"{part.path} was not called")

    def find(value: Any, nodes: Sequence[fx.Node]) -> fx.Node | None:
        for node in nodes:
            known = values[node.name]
            if (
                isinstance(known, Tensor)
                and known.shape == value.shape
                and torch.allclose(known, value, equal_nan=True)
            ):
                return node
        return None

    args, kwargs, returned = called
    names = _parameter_names(graph.model.get_submodule(part.path), len(args))
    given = [*zip(names, args, strict=False), *kwargs.items()]
    arguments = [(name, find(value, part.inputs) if isinstance(value, Tensor) else None) for name, value in given]
    missing = {n.name for n in part.inputs} - {node.name for _, node in arguments if node}
    output = pytree.tree_map_only(Tensor, lambda t: find(t, [*reversed(part.results), *part.inputs]), returned)
    if missing or any(leaf is None for leaf in pytree.tree_leaves(output)):
        raise PruneError(f"the inputs and outputs of {part.path or 'the model'} are not all values of the graph")
    return Signature(arguments, output)


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


def _parameter_names(module: nn.Module, positional: int) -> list[str]:
    code = type(module).forward.__code__
    names = list(code.co_varnames[1 : code.co_argcount])
    return names + [f"arg_{i}" for i in range(len(names), positional)]
