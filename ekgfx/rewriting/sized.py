"""Operators that a written forward gives sizes of its inputs, as TorchScript's tracer follows them.

That tracer, and the ONNX export that is built on it, sees the size of a tensor as a value. It follows it into PyTorch's
own functions; to an operator that is called by its name it is the number that it was in the example.
"""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload


def sized(operator: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """What the operator gives; while TorchScript traces, by the function of PyTorch that calls it, where there is one.

    Example:
        >>> sized(torch.ops.aten.view.default, torch.zeros(4), [2, 2]).shape
        torch.Size([2, 2])
    """
    if not torch.jit.is_tracing():
        return operator(*args, **kwargs)
    name = operator._schema.name.removeprefix("aten::")
    if name == "slice":
        given = dict(zip(("self", "dim", "start", "end", "step"), args, strict=False)) | kwargs
        tensor, dim = given.pop("self"), given.pop("dim", 0)
        part = slice(given.get("start"), given.get("end"), given.get("step"))
        return tensor[(slice(None),) * (dim % tensor.ndim) + (part,)]
    function = getattr(Tensor, name, None) if args and isinstance(args[0], Tensor) else getattr(torch, name, None)
    return (function or operator)(*args, **kwargs)
