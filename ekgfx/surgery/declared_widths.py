"""What a model says about its own widths for others to read: `num_features`, `embed_dim`, `feature_info` and the like.

No operator needs these numbers, so they do not follow from the operators' arguments; but `reset_classifier` builds a
new head from them, and decoders are built on a backbone's `feature_info`. A declared width is the length of a dimension
of what the module takes or computes, and is found there by its old value, nearest to the module's end first.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import fx, nn

from ekgfx.axes import Axis, Expr, count
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.nodes import callers
from ekgfx.surgery.integers import STANDARD, Attributes

INCOMING = ("in_features", "in_channels", "in_chs")
OUTGOING = ("num_features", "head_hidden_size", "embed_dim", "hidden_size", "out_features", "out_channels", "out_chs")


def attributes_of(model: nn.Module) -> Attributes:
    """Module → its attributes as they are now."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def declare(root: nn.Module, before: Attributes, graph: AxisGraph, counts: Mapping[Axis, int]) -> None:
    """Set the declared widths of a cut model in place; those that are no longer as `before` the cut are settled."""
    seen: set[str] = set()
    for view in graph.graphs:
        seen |= _declare(root, before, view, counts, seen)


def _declare(
    root: nn.Module, before: Attributes, graph: AxisGraph, counts: Mapping[Axis, int], but: Collection[str]
) -> set[str]:
    """The same for the modules (`but` for some) that run in one graph; returns their names."""
    frames = {name: inside for name, inside in _frames(graph).items() if name not in but}

    def now(old: int, nodes: Iterable[fx.Node]) -> int:
        return next((count(dim, counts) for node in nodes for dim in _dims(graph, node) if dim.size == old), old)

    for name, module in root.named_modules():
        if isinstance(module, STANDARD) or name not in frames:
            continue
        original, inside = before[name], frames[name]
        taken = [n for node in inside for n in node.all_input_nodes if n.name not in graph.weights]
        for attributes, nodes in ((INCOMING, taken), (OUTGOING, [*reversed(inside), *taken])):
            for attribute in attributes:
                old = original.get(attribute)
                if vars(module).get(attribute) != old:
                    continue
                if type(old) is int:
                    setattr(module, attribute, now(old, nodes))
                elif type(old) in (tuple, list) and all(type(width) is int for width in old):  # of every stage
                    setattr(module, attribute, type(old)(now(width, nodes) for width in old))
        for entry in _feature_info(module):
            place = f"{name}.{entry['module']}".lstrip(".")
            entry["num_chs"] = now(entry["num_chs"], reversed(frames.get(place, [])))
    return set(frames)


def _frames(graph: AxisGraph) -> dict[str, list[fx.Node]]:
    """Module → the operators that run while its forward does, in order."""
    frames: dict[str, list[fx.Node]] = {}
    for operation in graph.operations:
        for name in callers(operation.node):
            frames.setdefault(name, []).append(operation.node)
    return frames


def _dims(graph: AxisGraph, node: fx.Node) -> Iterator[Expr]:
    for dims in graph.tensors.get(node.name, ()):
        yield from dims


def _feature_info(module: nn.Module) -> list[dict[str, Any]]:
    """timm's description of a backbone's features: dicts with the feature's module and its width."""
    info = vars(module).get("feature_info")
    entries = getattr(info, "info", info)
    return [e for e in entries if isinstance(e, dict) and {"module", "num_chs"} <= e.keys()] if entries else []
