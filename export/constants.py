"""Constants that onnxscript's optimizer makes without giving them to the graph.

Where it writes Max and Min with constant bounds as one Clip, and the bounds are tensors of the model, the new bounds
stand in the node only: no file could name where they come from.
"""

import onnx_ir as ir


def adopt_constants(graph: ir.Graph) -> None:
    """Register every constant that a node reads as an initializer of the graph."""
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is None or value.producer() is not None or value.const_value is None:
                continue
            if not value.is_initializer() and not value.is_graph_input():
                graph.register_initializer(value)
