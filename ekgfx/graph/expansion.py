"""Spell operators that have no rule in operators that have one, where PyTorch itself does: losses, distances, and what
else is defined by others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from ekgfx.graph.functional import replace_in_place
from ekgfx.rules import lookup

IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd


def expand(graph: fx.Graph) -> fx.Graph:
    """Replace, in place, every operator without a rule by those that PyTorch defines it with, if all of these have
    one. What is left has no rule, and keeps whole what touches it.

    Example:
        `aten.mse_loss(a, b)` becomes `aten.mean(aten.pow(aten.sub(a, b), 2))`.
    """
    unknown = [node for node in graph.nodes if isinstance(node.target, OpOverload) and lookup(node.target) is None]
    definitions = {op: how for op, how in decomposition_table.items() if unknown and not _known(op)}
    for node in unknown:
        implicit = node.target.has_kernel_for_dispatch_key(IMPLICIT)
        definition = node.target.decompose if implicit else definitions.get(node.target)
        spelled = None if definition is None else _spelled(node, definition, definitions)
        if spelled is not None:
            _put(graph, node, spelled)
    return graph


def _known(op: Any) -> bool:
    return isinstance(op, OpOverload) and lookup(op) is not None


def _spelled(node: fx.Node, definition: Callable[..., Any], definitions: dict[Any, Any]) -> fx.Graph | None:
    """The graph of an operator's definition, with a placeholder for each of the node's input nodes; None where it
    can't be followed, or some operator in it has no rule."""
    inputs = node.all_input_nodes
    if not all(isinstance(source.meta.get("val"), Tensor) for source in inputs):
        return None

    def run(*values: Tensor) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return definition(*args, **kwargs)

    try:
        spelled = make_fx(run, definitions)(*(source.meta["val"] for source in inputs)).graph
    except Exception:  # noqa: BLE001  definitions may ask for values, or for what fake tensors do not have
        return None
    (output,) = spelled.find_nodes(op="output")
    if not isinstance(output.args[0], fx.Node) or not replace_in_place(spelled):
        return None
    calls = [inner.target for inner in spelled.nodes if inner.op not in ("placeholder", "output")]
    return spelled if calls and all(map(_known, calls)) else None


def _put(graph: fx.Graph, node: fx.Node, spelled: fx.Graph) -> None:
    """Put a graph in the place of a node, each of its operators where the node was: in its module, on its line."""
    places = iter(node.all_input_nodes)
    done: dict[fx.Node, Any] = {inner: next(places) for inner in spelled.find_nodes(op="placeholder")}
    with graph.inserting_before(node):
        for inner in spelled.nodes:
            if inner.op != "call_function":
                continue
            done[inner] = graph.node_copy(inner, done.__getitem__)
            done[inner].meta = {**node.meta, "val": inner.meta["val"]}
    (output,) = spelled.find_nodes(op="output")
    node.replace_all_uses_with(done[output.args[0]])
    graph.erase_node(node)
