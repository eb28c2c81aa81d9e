"""Names that a reader of an ONNX file recognises: inputs, outputs, and each node after its module."""

import ast
from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PREFIX = "model"  # the name of the exported model inside the module that was captured, see capture.py


def name_interface(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the graph's inputs and outputs these names, in order; whatever else has one of them is renamed.

    An output that would have the name of an input gets "_out" appended.
    """
    ends = [*graph.inputs, *graph.outputs]
    wanted = [*inputs, *(f"{name}_out" if name in inputs else name for name in outputs)]
    reserved = set(wanted)
    for node in graph:
        for value in node.outputs:
            if value.name in reserved and not any(value is end for end in ends):
                value.name = f"{value.name}_inner"
    # In two steps, because one end may have the name that another is to get.
    for position, value in enumerate(ends):
        value.name = f"ekgfx_end_{position}"
    for value, name in zip(ends, wanted, strict=True):
        value.name = name


def name_nodes(graph: ir.Graph) -> None:
    """Name each node MODULE/OPERATOR (with a number where that is not unique), name what it computes after it, and drop
    the exporter's annotations.

    Runtimes name what they fuse after either, so that a profile can be read. Weights lose their prefix, so that they
    are called what the model calls them. The annotations hold stack traces with the paths of the machine that exported,
    and nothing that a runtime uses.
    """
    for value in list(graph.initializers.values()):
        if value.name is not None and value.name.startswith(f"{_PREFIX}."):
            value.name = value.name.removeprefix(f"{_PREFIX}.")
    seen: Counter[str] = Counter()
    for node in graph:
        name = f"{_owner(node)}/{node.op_type}".lstrip("/")
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        node.metadata_props.clear()
        for position, value in enumerate(node.outputs):
            value.name = f"{node.name}_out{position or ''}"
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()


def _owner(node: ir.Node) -> str:
    """The module a node computes for. A convolution with a folded batch norm is annotated with the norm; its weight
    knows better."""
    if node.op_type in _WEIGHTED and len(node.inputs) > 1:
        weight = node.inputs[1]
        if weight is not None and weight.name is not None and weight.name.endswith(".weight"):
            return weight.name.removesuffix(".weight")
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    # The last scope is the operator itself.
    modules = [scope for scope in scopes[:-1] if scope == _PREFIX or scope.startswith(f"{_PREFIX}.")]
    return modules[-1].removeprefix(_PREFIX).lstrip(".") if modules else ""
