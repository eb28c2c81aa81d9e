"""Half precision for an ONNX graph: weights and arithmetic in fp16, inputs and outputs as they were."""

from collections.abc import Collection, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST

from .quiet import quiet

# protobuf cannot serialise more, and shape inference on an in-memory model serialises it.
PROTOBUF_LIMIT = 2**31 - 1

LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)

WIDE = "ekgfx.fp32_nodes"
"""Metadata of an fp16 file: the nodes that compute in fp32 because their values or weights would not fit."""

_SINGLE, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

# Operators that stay in fp32: those of onnxruntime's own list, and those whose type is an attribute.
_WIDE = frozenset(DEFAULT_OP_BLOCK_LIST) | {
    "Bernoulli",
    "EyeLike",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "SequenceEmpty",
}


def to_half(model: ir.Model, keep: Collection[str] = ()) -> ir.Model:
    """The fp32 model, changed in place so that it computes in fp16.

    keep: names of nodes that go on in fp32, such as those whose values don't fit (`ranges.overflowing`); so do those
    that read a finite weight beyond ±65504, and the metadata `WIDE` names both. So do, unnamed there, operators that
    have no fp16 form in ONNX or in onnxruntime, or whose values need the range: Range, CumSum, TopK, Min, Max,
    NonMaxSuppression, RoiAlign and the others of `onnxruntime.transformers.float16.DEFAULT_OP_BLOCK_LIST`, and
    operators with graphs inside. A value is cast once for all its readers.

    Folding batch norms before it, which the exporter's optimizer does, matters: folded in fp32 a ResNet-50 with real
    weights differs by 1.0e-3 from PyTorch, folded in fp16 by 2.3e-3. Inputs and outputs stay fp32, so that the file can
    take the place of the fp32 one. Weights nearer to zero than 6e-8 are moved out to it, so that no divisor becomes
    zero.
    """
    with quiet():
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        ShapeInferencePass()(model)  # the types of all values are needed
    graph, casts = model.graph, _Casts(model.graph)
    kept = [node for node in graph if node.name in keep or any(_too_large(value) for value in node.inputs)]
    if kept:
        model.metadata_props[WIDE] = ", ".join(node.name for node in kept if node.name)
    for node in list(graph):
        wide = node.op_type in _WIDE or node in kept or not _plain(node)
        reads, writes = _allowed(node, model.opset_imports)
        for position, value in enumerate(node.inputs):
            dtype = _SINGLE if wide or not reads[position] else _HALF
            node.replace_input_with(position, casts.of(value, dtype))
        if wide:
            _feed_inner_graphs(node, casts)
            continue
        _convert_attributes(node)
        for value, half in zip(node.outputs, writes, strict=True):
            if half and value.dtype == _SINGLE:
                value.type = ir.TensorType(_HALF)
    for position, output in enumerate(graph.outputs):
        if output.dtype == _HALF:
            name, output.name = output.name, f"{output.name}_fp16"
            single = casts.of(output, _SINGLE)
            assert single is not None
            single.name = name
            graph.outputs[position] = single
    casts.finish()
    return model


class _Casts:
    """The float values of a graph in the precision that each reader wants."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[int, ir.DataType], tuple[ir.Value, ir.Value]] = {}

    def of(self, value: ir.Value | None, dtype: ir.DataType) -> ir.Value | None:
        """The value itself where it is of that type or no float tensor; else the value cast to it. Weights are
        converted here and now."""
        if value is None or value.dtype not in (_SINGLE, _HALF) or value.dtype == dtype:
            return value
        if not isinstance(value.type, ir.TensorType):
            return value
        key = (id(value), dtype)
        if key not in self.made:
            cast = self._weight(value) if value.is_initializer() else self._cast(value, dtype)
            self.made[key] = (value, cast)
        return self.made[key][1]

    def finish(self) -> None:
        """Drops the weights that nobody reads any longer; those made of them take their names."""
        outputs = {id(value) for value in self.graph.outputs}
        for value, cast in self.made.values():
            if value.is_initializer() and not value.uses() and id(value) not in outputs:
                name = value.name
                assert name is not None
                del self.graph.initializers[name]
                cast.name = name

    def _weight(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        name = f"{value.name}_fp16"
        tensor = ir.Tensor(narrowed(value.const_value.numpy()), name=name)
        weight = ir.Value(name=name, shape=value.shape, type=ir.TensorType(_HALF), const_value=tensor)
        self.graph.register_initializer(weight)
        return weight

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}_{'fp16' if dtype == _HALF else 'fp32'}"
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[output], name=f"{name}/Cast")
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return output


def narrowed(values: np.ndarray) -> np.ndarray:
    """fp32 values in fp16: without new infinities, and without new zeros."""
    finite = np.clip(values, -LARGEST, LARGEST, where=np.isfinite(values), out=values.astype(np.float32))
    tiny = (finite != 0) & (np.abs(finite) < _SMALLEST)
    return np.where(tiny, np.copysign(np.float32(_SMALLEST), finite), finite).astype(np.float16)


def _too_large(value: ir.Value | None) -> bool:
    """Whether a value is a weight with finite elements that fp16 cannot hold."""
    if value is None or not value.is_initializer() or value.dtype != _SINGLE or value.const_value is None:
        return False
    size = np.abs(value.const_value.numpy())
    return bool((size[np.isfinite(size)] > LARGEST).any())


def _plain(node: ir.Node) -> bool:
    """Whether a node has only tensors around it, and no graph inside."""
    values = (*node.inputs, *node.outputs)
    return not any(_graphs(attribute) for attribute in node.attributes.values()) and all(
        value is None or value.type is None or isinstance(value.type, ir.TensorType) for value in values
    )


def _graphs(attribute: ir.Attr) -> tuple[ir.Graph, ...]:
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else ()


def _feed_inner_graphs(node: ir.Node, casts: _Casts) -> None:
    """Nodes of inner graphs stay in fp32, and so must be what they read from outside."""
    for attribute in node.attributes.values():
        for inner in _graphs(attribute):
            for reader in ir.traversal.RecursiveGraphIterator(inner):
                for position, value in enumerate(reader.inputs):
                    if value is not None and value.graph is casts.graph:
                        reader.replace_input_with(position, casts.of(value, _SINGLE))


def _allowed(node: ir.Node, opsets: Mapping[str, int]) -> tuple[list[bool], list[bool]]:
    """For every input and output of a node: does ONNX let it be fp16? No for operators that ONNX does not define."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return [False] * len(node.inputs), [False] * len(node.outputs)
    half = {t.type_param_str for t in schema.type_constraints if "tensor(float16)" in t.allowed_type_strs}

    def along(formals: list, count: int) -> list[bool]:
        # The last formal one of a variadic operator stands for all that follow.
        return [formals[min(i, len(formals) - 1)].type_str in half for i in range(count)]

    return along(list(schema.inputs), len(node.inputs)), along(list(schema.outputs), len(node.outputs))


def _convert_attributes(node: ir.Node) -> None:
    """The types that a node's attributes set."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == _SINGLE:
        node.attributes["to"] = ir.AttrInt64("to", _HALF)
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        array = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
        if array.dtype == np.float32:
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(narrowed(array)))


def hide_scalars(model: ir.Model) -> None:
    """Gives fp16 factors that are scalars two dimensions, in place; that changes nothing for operands of two or more.

    onnxruntime's AttentionFusion (1.31) reads the scalar that scales a query as fp32, whatever it is, and so refuses
    some fp16 files; it lets such an attention be where the factor is no scalar.
    """
    for node in model.graph:
        if node.op_type != "Mul":
            continue
        for position, value in enumerate(node.inputs):
            other = node.inputs[1 - position]
            if value is None or other is None or other.shape is None or other.shape.rank() < 2:
                continue
            if value.is_initializer() and value.dtype == _HALF and value.shape is not None and value.shape.rank() < 2:
                assert value.const_value is not None
                if value.const_value.size == 1:
                    node.replace_input_with(position, _square(model.graph, value))


def _square(graph: ir.Graph, value: ir.Value) -> ir.Value:
    assert value.const_value is not None
    name = f"{value.name}_1x1"
    if name not in graph.initializers:
        tensor = ir.Tensor(value.const_value.numpy().reshape(1, 1), name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape([1, 1]), type=ir.TensorType(_HALF), const_value=tensor)
        )
    return graph.initializers[name]


def nbytes(model: ir.Model) -> int:
    """Bytes of all weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
