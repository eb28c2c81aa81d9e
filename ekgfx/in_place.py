"""Which operators of a functional graph may write their result over what they read."""

from types import MappingProxyType

import torch
from torch import fx

aten = torch.ops.aten

IN_PLACE = MappingProxyType(
    {
        aten.relu.default: aten.relu_.default,
        aten.hardtanh.default: aten.hardtanh_.default,
        aten.silu.default: aten.silu_.default,
        aten.hardswish.default: aten.hardswish_.default,
        aten.gelu.default: aten.gelu_.default,
        aten.add.Tensor: aten.add_.Tensor,
    }
)
"""Operators whose result has the shape and type of their first argument (a sum only sometimes)."""

FRESH = frozenset(
    {aten.batch_norm.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default}
    | IN_PLACE.keys()
)
"""Operators whose result is a tensor of its own, never a view of another or that tensor itself."""

UNREAD = frozenset({aten.relu.default, aten.add.Tensor})
"""Those of IN_PLACE whose derivative does not read what they read."""

FORGOTTEN = FRESH - IN_PLACE.keys() | {aten.add.Tensor}
"""Those of FRESH whose derivative does not read their result."""


def overwritable(graph: fx.Graph) -> dict[str, str]:
    """Operator → its first argument, where nobody else reads that, and it owns its memory."""
    found = {}
    for node in graph.nodes:
        if node.target in IN_PLACE or node.target is aten.batch_norm.default:
            source = node.args[0]
            if isinstance(source, fx.Node) and source.target in FRESH and len(source.users) == 1:
                found[node.name] = source.name
    return found


def overwritable_with_gradients(graph: fx.Graph) -> set[str]:
    """The operators of `overwritable` that may do so where gradients are taken too."""
    found = overwritable(graph)
    return {n.name for n in graph.nodes if n.name in found and n.target in UNREAD and n.args[0].target in FORGOTTEN}
