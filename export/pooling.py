"""Max pooling of what was padded with zeros.

ONNX's MaxPool pads with −∞. Optimizers nevertheless move the zeros of a Pad before it into its `pads` (onnxruntime's
Pad_Fusion, onnxsim's fuse_pad_into_pool), which changes the border wherever values are negative.
"""

import onnx_ir as ir


def keep_padding(graph: ir.Graph) -> None:
    """Write a MaxPool after a Pad, that has no padding of its own, as one that takes whole windows (auto_pad VALID):
    there is no `pads` then that anything could be moved into."""
    for node in graph.all_nodes():
        before = node.inputs[0].producer() if node.op_type == "MaxPool" and node.inputs[0] is not None else None
        if before is None or before.op_type != "Pad":
            continue
        own, rounds_up = node.attributes.get("pads"), node.attributes.get("ceil_mode")
        if (own is None or not any(own.as_ints())) and (rounds_up is None or not rounds_up.as_int()):
            node.attributes.pop("pads", None)
            node.attributes["auto_pad"] = ir.AttrString("auto_pad", "VALID")
