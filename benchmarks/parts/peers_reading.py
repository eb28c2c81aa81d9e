"""What `benchmarks/peers.py referee` reads off a network or a file that a method gave."""

from collections.abc import Iterator
from typing import Any

import onnx
import onnxruntime
import torch
from torch import nn

from ekgfx.graph.plan import Plan
from ekgfx.tracing.traced import TracedModel


def onnx_macs(network: onnx.ModelProto) -> int:
    """Multiply-accumulates of convolutions and matrix products with constant weights, for one image."""
    graph = onnx.shape_inference.infer_shapes(network, strict_mode=True).graph
    values = (*graph.value_info, *graph.output)
    shapes = {value.name: [side.dim_value for side in value.type.tensor_type.shape.dim] for value in values}
    sizes = {tensor.name: int(torch.tensor(tensor.dims).prod()) for tensor in graph.initializer}
    macs = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            spatial = shapes[node.output[0]][2:] if node.op_type == "Conv" else []
            macs += int(torch.tensor([1, *spatial]).prod()) * sizes[node.input[1]]
    return macs


def kept_by(traced: TracedModel, network: nn.Module) -> Plan:
    """The channels that a network cut from the traced one still has, by the 1-D tensors of each group: its parameters,
    and its running statistics where two channels have equal parameters, as a file in half precision does.

    Raises ValueError where they are not found: the values were changed, or the group has no such tensors.
    """
    dense, left = traced.model.state_dict(), network.state_dict()
    kept: dict[str, tuple[int, ...]] = {}
    for group in traced.groups:
        names = [place.parameter for place in traced.groups[group].places if dense[place.parameter].ndim == 1]
        shapes = {dense[name].shape for name in names}
        beside = {name.rpartition(".")[0] for name in names}
        statistics = [
            name
            for name in dense
            if name not in names and name.rpartition(".")[0] in beside and dense[name].shape in shapes
        ]
        for used in (names, names + statistics):
            rows = torch.stack([dense[name] for name in used], 1) if used else torch.empty(0, 0)
            wanted = torch.stack([left[name] for name in used], 1) if used else rows
            if wanted.shape[0] == rows.shape[0]:
                if not torch.equal(rows, wanted):
                    raise ValueError(f"{group}: values were changed")
                break
            same = (wanted[:, None] == rows[None]).all(2)
            if (same.sum(1) == 1).all():
                kept[group] = tuple(same.int().argmax(1).tolist())
                break
        else:
            raise ValueError(f"{group}: which channels were kept cannot be told")
    return Plan(kept, traced.groups.digest)


def right_of(network: Any, batches: Iterator[Any]) -> float:
    """The share of images that a network, or an ONNX session, has right."""
    right = count = 0
    with torch.no_grad():
        for images, labels, *_ in batches:
            if isinstance(network, onnxruntime.InferenceSession):
                name = network.get_inputs()[0].name
                found = [network.run(None, {name: image[None].numpy()})[0] for image in images]
                logits = torch.cat([torch.from_numpy(one) for one in found])
            else:
                logits = network(images)
            right, count = right + int((logits.argmax(1) == labels).sum()), count + len(labels)
    return right / count
