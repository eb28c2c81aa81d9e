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

from ekgfx.containers import Frame, tensors_in
from ekgfx.errors import PruneError
from ekgfx.graph import AxisGraph
from ekgfx.nodes import callers
from ekgfx.sliced import SubNetwork
from ekgfx.ways import undisturbed


@dataclass(frozen=True)
class Part:
    """What the module at `path` does: its operators, in order, between its arguments and what it returns.

    weights: placeholders of its weights → what the module itself calls them. inputs: nodes outside that it reads.
    constants: constants of the graph that it reads. arguments: (name, node) in the order of forward, no node for what
    holds no tensor, and the nodes in a row for what holds tensors but is none. frame and returned: what forward
    returns, without its tensors, and the nodes of these.
    """

    path: str
    nodes: list[fx.Node]
    weights: dict[str, str]
    inputs: list[fx.Node]
    constants: list[fx.Node]
    arguments: list[tuple[str, fx.Node | list[fx.Node | None] | None]]
    frame: Frame
    returned: list[fx.Node]


Call = tuple[tuple[Any, ...], dict[str, Any], Any]


def parts_of(graph: AxisGraph, paths: Sequence[str]) -> dict[str, Part | PruneError]:
    """Path → what the module does, from one run of the model and one of the graph on the example's inputs; or why that
    cannot be said: it is (in) a leaf, is called more than once or never, or takes or returns no values of the graph."""
    calls = _calls(graph, paths)
    nodes: dict[str, list[fx.Node]] = {path: [] for path in paths}
    for node in graph.graph.nodes:
        if node.op == "call_function":
            for path in nodes.keys() & callers(node):
                nodes[path].append(node)
    edges = {n.name for inside in nodes.values() for n in (*_outside(inside), *_results(inside))}
    args, kwargs = graph.example
    with torch.no_grad(), graph.way.entered(graph.model), undisturbed(graph.model):
        _, values = SubNetwork(graph, {}).run(args, kwargs, edges)
    found: dict[str, Part | PruneError] = {}
    for path, inside in nodes.items():
        try:
            found[path] = _part(graph, path, inside, calls.get(path), values)
        except PruneError as error:
            found[path] = error
    return found


def _calls(graph: AxisGraph, paths: Sequence[str]) -> dict[str, Call]:
    """Path → arguments and result of the module when the model runs on the example's inputs."""
    calls: dict[str, Call] = {}

    def note(path: str) -> Any:
        return lambda module, args, kwargs, output: calls.update({path: (args, kwargs, output)})

    hooks = [graph.model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
    args, kwargs = graph.example
    try:
        with torch.no_grad(), graph.way.entered(graph.model), undisturbed(graph.model):
            graph.model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _outside(nodes: list[fx.Node]) -> list[fx.Node]:
    """What the nodes read of others, in the order of first use."""
    body = set(nodes)
    return list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in body))


def _results(nodes: list[fx.Node]) -> list[fx.Node]:
    """The nodes that others read."""
    body = set(nodes)
    return [node for node in nodes if node.users.keys() - body]


def _part(graph: AxisGraph, path: str, nodes: list[fx.Node], called: Call | None, values: dict[str, Any]) -> Part:
    if any(f"{path}.".startswith(f"{name}.") for name in graph.leaves):
        raise PruneError(f"{path} is a leaf, which runs as it is")
    if any(f"{path}@" in name for node in nodes for name in _raw_callers(node)):
        raise PruneError(f"{path} is called more than once")
    if called is None:
        raise PruneError(f"{path} was not called")
    weights = _own_weights(graph, path)
    outside = [n for n in _outside(nodes) if n.name not in weights]
    inputs = [n for n in outside if n.name not in graph.constants]  # another module's weight may be an argument

    def find(value: Any, among: Sequence[fx.Node]) -> fx.Node | None:
        for node in among:
            own = values[node.name]
            if isinstance(own, Tensor) and own.shape == value.shape and own.dtype == value.dtype and _same(own, value):
                return node
        return None

    args, kwargs, returned = called
    names = _parameter_names(graph.model.get_submodule(path), len(args))
    given = [*zip(names, args, strict=False), *kwargs.items()]
    arguments: list[tuple[str, Any]] = []
    for name, value in given:
        taken = [find(tensor, inputs) for tensor in tensors_in(value)]
        arguments.append((name, (taken[0] if isinstance(value, Tensor) else taken) if taken else None))
    missing = {n.name for n in inputs} - {n.name for n in pytree.tree_leaves([node for _, node in arguments]) if n}
    known = [*reversed(_results(nodes)), *inputs]
    frame, tensors = Frame.of(returned)
    made = [node for tensor in tensors if (node := find(tensor, known)) is not None]
    if missing or len(made) < len(tensors):
        raise PruneError(f"the inputs and outputs of {path or 'the model'} are not all values of the graph")
    constants = [n for n in outside if n.name in graph.constants]
    return Part(path, nodes, weights, inputs, constants, arguments, frame, made)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, equal_nan=True) if a.is_floating_point() or a.is_complex() else torch.equal(a, b)


def _own_weights(graph: AxisGraph, path: str) -> dict[str, str]:
    """Placeholders of the weights of the module at `path` → what the module itself calls them."""
    module = graph.model.get_submodule(path)
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    local = {id(tensor): name for name, tensor in reversed(tensors)}
    start = f"{path}." if path else ""
    local |= {id(graph.tensor(name)): name[len(start) :] for name in graph.tables if name.startswith(start)}
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
