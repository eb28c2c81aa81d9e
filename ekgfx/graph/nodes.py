"""What a node of a graph says: its operator, that operator's arguments by name, and the modules that ran it."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from torch import fx
from torch._ops import OpOverload


def bind(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names of the operator's schema, defaults filled in."""
    if not isinstance(node.target, OpOverload):
        return {**{f"{i}": value for i, value in enumerate(node.args)}, **node.kwargs}
    defaults = _defaults(node.target)
    return {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}


@cache
def _defaults(op: OpOverload) -> dict[str, Any]:
    """Argument → default (None where there is none), in the order of the operator's schema."""
    return {a.name: a.default_value if a.has_default_value() else None for a in op._schema.arguments}


def op_name(target: Any) -> str:
    """An operator's name, as rules are registered by: `aten.add.Tensor`."""
    return str(target) if isinstance(target, OpOverload) else getattr(target, "__name__", str(target))


def owner(node: fx.Node) -> str:
    """Qualified name of the innermost module that ran this node ('' for the model itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    name = next(reversed(stack.values()))[0] if stack else ""
    return name.split("@")[0]  # a module called twice is numbered by torch.export


def callers(node: fx.Node) -> set[str]:
    """Qualified names of all modules whose forward was running when this node was made, '' for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return {"", *(name.split("@")[0] for name, _ in stack.values())}


def first_names(named: Iterable[tuple[str, object]]) -> dict[str, str]:
    """Every name → the first name of the same object: what is shared goes by one name."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in named}


def rename_modules(graph: fx.Graph, names: Mapping[str, str]) -> None:
    """Let every node say by their first names which modules ran it: `block.conv` becomes `conv@block.conv` where the
    two are one module, as `conv@1` is its second call."""
    others = {name for name, first in names.items() if name != first}
    for node in graph.nodes if others else ():
        stack = node.meta.get("nn_module_stack") or {}
        if not others.isdisjoint(name.partition("@")[0] for name, _ in stack.values()):
            node.meta = {
                **node.meta,
                "nn_module_stack": {key: (_first(n, names), kind) for key, (n, kind) in stack.items()},
            }


def _first(name: str, names: Mapping[str, str]) -> str:
    module = name.partition("@")[0]
    return name if names[module] == module else f"{names[module]}@{name}"
