"""Which values of a graph are too large for half precision?"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ekgfx.errors import ExportError

from .half import LARGEST, PROTOBUF_LIMIT, nbytes
from .quiet import headline
from .session import feeds, open_session

HEADROOM = 4
"""How many times larger than on the inputs at hand the values may be on others."""


def overflowing(model: ir.Model, inputs: Sequence[Tensor]) -> frozenset[str]:
    """Names of the nodes that read or write a value whose magnitude on these inputs, times `HEADROOM`, exceeds what
    fp16 holds.

    The fp32 model runs once, in onnxruntime on the CPU, with the largest finite magnitude of every value for outputs.
    Weights don't count here: `half.to_half` sees them itself. Raises ExportError when the model cannot be run.
    """
    probe = model.clone()
    probe.graph.outputs.clear()
    nodes = list(probe.graph)
    slots = [value for value in probe.graph.inputs if value.dtype == ir.DataType.FLOAT]
    values = [*slots, *(value for node in nodes for value in node.outputs if value.dtype == ir.DataType.FLOAT)]
    values = [value for value in values if isinstance(value.type, ir.TensorType)]
    _append_magnitudes(probe.graph, values)
    most = _run(probe, inputs)
    large = {id(value) for value, found in zip(values, most, strict=True) if found * HEADROOM > LARGEST}
    return frozenset(
        node.name
        for node in nodes
        if node.name is not None and any(id(value) in large for value in (*node.inputs, *node.outputs))
    )


def _append_magnitudes(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    """An output for each value: its largest magnitude, where infinite elements (of masks) count as zero. It is computed
    next to the value, which can then be let go of: all values of a network at once may be many gigabytes."""
    zero = ir.Value(
        name="zero of magnitudes",
        shape=ir.Shape([]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.Tensor(np.zeros((), np.float32), name="zero of magnitudes"),
    )
    graph.register_initializer(zero)
    for number, value in enumerate(values):
        size = ir.node("Abs", [value])
        infinite = ir.node("IsInf", [size.outputs[0]])
        finite = ir.node("Where", [infinite.outputs[0], zero, size.outputs[0]])
        most = ir.node("ReduceMax", [finite.outputs[0]], {"keepdims": 0})
        nodes = size, infinite, finite, most
        for node in nodes:
            node.name = node.outputs[0].name = f"magnitude {number} {node.op_type}"
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], nodes)
        else:
            graph.insert_after(producer, nodes)
        most.outputs[0].type, most.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.outputs.append(most.outputs[0])


def _run(model: ir.Model, inputs: Sequence[Tensor]) -> list[float]:
    if not model.graph.outputs:
        return []
    with saved(model) as path:
        session = open_session(path, as_written=True)  # so that no value waits for its magnitude
        try:
            return [float(found) for found in session.run(None, feeds(session, inputs))]
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ExportError(
                f"the ranges of the values could not be measured: {headline(error)}; export in fp32"
            ) from error


@contextlib.contextmanager
def saved(model: ir.Model) -> Iterator[Path]:
    """A graph as a file, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        ir.save(model, path, external_data="graph.data" if nbytes(model) > PROTOBUF_LIMIT * 0.95 else None)
        yield path
