"""Half precision for an ONNX graph: weights and arithmetic in fp16, inputs and outputs as they were."""

import onnx_ir as ir

from ekgfx.errors import ExportError

from .quiet import headline, quiet

# protobuf cannot serialise more, and shape inference on an in-memory model serialises it.
PROTOBUF_LIMIT = 2**31 - 1


def to_half(model: ir.Model) -> ir.Model:
    """A copy of an fp32 model that computes in fp16.

    The conversion is onnxruntime's own. Folding batch norms before it, which the exporter's optimizer does, matters:
    folded in fp32 a ResNet-50 with real weights differs by 1.0e-3 from PyTorch, folded in fp16 by 2.3e-3. Inputs and
    outputs stay fp32, so that the file can take the place of the fp32 one. These operators go on in fp32, between
    casts, because a runtime has no fp16 form of them or their values need the range: Range, CumSum, TopK, Min, Max,
    NonMaxSuppression, RoiAlign and the others of `onnxruntime.transformers.float16.DEFAULT_OP_BLOCK_LIST`.
    Weights beyond ±65504 are clipped to it, and those nearer to zero than 6e-8 are rounded up to it.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    proto = ir.to_proto(model)
    small = nbytes(model) < PROTOBUF_LIMIT
    with quiet():
        try:
            proto = convert_float_to_float16(proto, keep_io_types=True, disable_shape_infer=not small)
        except Exception as error:  # the converter's errors have no common base
            raise ExportError(
                f"the graph could not be converted to fp16: {headline(error)}; export it in fp32"
            ) from error
    half = ir.from_proto(proto)
    # The converter appends its casts at the end; ONNX wants every node after those it depends on.
    half.graph.sort()
    return half


def nbytes(model: ir.Model) -> int:
    """Bytes of all weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
