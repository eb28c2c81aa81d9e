"""What cannot be traced whatever its forward does: said at once, with what to do about it."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ekgfx.errors import TraceError


def check_traceable(model: object) -> None:
    """Raises a TraceError for what holds no Python to trace, or no weights to cut."""
    if isinstance(model, torch.export.ExportedProgram) or (
        isinstance(model, torch.fx.GraphModule) and "train" in vars(model)  # torch puts a refusal there
    ):
        raise TraceError("an exported program runs in one mode: pass the torch.nn.Module that it was exported from")
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace takes a torch.nn.Module, not a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("TorchScript holds no Python to trace: pass the torch.nn.Module that it was made of")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and [*module.parameters(), *module.buffers()]:
            raise TraceError(
                f"{name} is TorchScript with weights, for which nothing else can stand in: put the Python module that "
                f"{module.original_name} was made of in its place"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise TraceError(f"{name} has no shape before the first call: call the model once on the example inputs")
        if tensor.is_meta:
            raise TraceError(
                f"{name} is on the meta device, where no values are: build the model on another one, or use "
                "model.to_empty(device=...) and load its weights"
            )
        if tensor.is_inference():
            raise TraceError(
                f"{name} was made under torch.inference_mode(), and can neither be traced nor trained: build the model "
                "outside of it, or under torch.no_grad()"
            )
