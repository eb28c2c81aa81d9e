"""Which operators of a functional graph may write their result over what they read."""

from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ekgfx.rules.registry import Memory, memory_of


@cache
def in_place_twin(op: Any) -> OpOverload | None:
    """aten.relu.default → aten.relu_.default, where the operator's rule says that it may overwrite what it reads."""
    memory = memory_of(op)
    if memory is None or not memory.overwrites or not isinstance(op, OpOverload):
        return None
    packet = getattr(torch.ops.aten, f"{op._overloadpacket.__name__}_", None)
    return getattr(packet, op._overloadname, None)


def overwritable(graph: fx.Graph) -> dict[str, str]:
    """Operator → its first argument, where nobody else reads that, and it owns its memory."""
    found = {}
    for node in graph.nodes:
        if _memory(node).overwrites:
            source = node.args[0]
            if isinstance(source, fx.Node) and memory_of(source.target) is not None and len(source.users) == 1:
                found[node.name] = source.name
    return found


def overwritable_with_gradients(graph: fx.Graph) -> set[str]:
    """The operators of `overwritable` that may do so where gradients are taken too."""
    found = overwritable(graph)
    return {
        node.name
        for node in graph.nodes
        if node.name in found
        and "input" not in _memory(node).derivative
        and "result" not in _memory(node.args[0]).derivative
    }


def _memory(node: fx.Node) -> Memory:
    return memory_of(node.target) or Memory()
