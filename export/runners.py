"""One timed call of a network, made ready: data in place, memory reserved, kernels chosen."""

from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor, nn

from ekgfx.errors import ExportError
from ekgfx.graph.untouched import deep_copy

from .io import batch_size, device_of
from .providers import Provider
from .quiet import headline
from .session import TYPES, feeds, open_session, precision_of

Runner = Callable[[], object]

# Precisions that a file is written in; the others are how a provider computes an fp32 file.
_WRITERS = {"fp16": "to_onnx(fp16=True)", "int8": "to_int8"}


def onnx_runner(
    path: Path, provider: Provider, precision: str, inputs: Sequence[Tensor], *, threads: int, cpu_fallback: bool
) -> Runner:
    """A call that runs the file once at the inputs' batch size, with inputs and outputs bound to memory on the
    provider's device: copies to and from a GPU are not part of the time.

    Raises ExportError when the file's precision is not the one asked for, or the provider refuses it.
    """
    batch = batch_size(inputs)
    session = open_session(path, provider, precision, batch=batch, threads=threads, cpu_fallback=cpu_fallback)
    return bound(session, path, provider, precision, inputs)


def bound(
    session: ort.InferenceSession, path: Path, provider: Provider, precision: str, inputs: Sequence[Tensor]
) -> Runner:
    """A call of an open session of the file on these inputs, see `onnx_runner`."""
    batch = batch_size(inputs)
    written = precision_of(session)
    if precision != written and {precision, written} & set(_WRITERS):
        raise ExportError(
            f"{path} is an {written} file and cannot be timed in {precision}; "
            f"write one with {_WRITERS.get(precision, 'to_onnx(fp16=False)')}"
        )
    binding = session.io_binding()
    for name, array in feeds(session, inputs).items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, provider.device, 0))
    for slot in session.get_outputs():
        if all(isinstance(size, int) for size in slot.shape):
            value = ort.OrtValue.ortvalue_from_shape_and_type(slot.shape, TYPES[slot.type], provider.device, 0)
            binding.bind_ortvalue_output(slot.name, value)
        else:  # known only when the network has run
            binding.bind_output(slot.name, provider.device)

    def run() -> None:
        session.run_with_iobinding(binding)

    return _tried(run, f"{path} on {provider.name} at batch {batch}")


def torch_runner(model: nn.Module, precision: str, inputs: Sequence[Tensor], *, compiled: bool) -> Runner:
    """A call of the PyTorch module itself on the device where it is, in evaluation mode, eager or through torch.compile
    with the batch size fixed. The module is copied where the precision asks for other weights or the mode would change.
    """
    device = device_of(model)
    module = deep_copy(model).eval()
    values = [value.to(device) for value in inputs]
    if precision == "fp16":
        module = module.half()
        values = [value.half() if value.is_floating_point() else value for value in values]
    call: Callable[..., object] = torch.compile(module, dynamic=False) if compiled else module

    def run() -> None:
        with torch.inference_mode():
            call(*values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return _tried(run, f"PyTorch on {device.type} at batch {batch_size(values)}")


def _tried(run: Runner, what: str) -> Runner:
    """The call, after it was made once; ExportError when that fails (no memory, an operator without a kernel)."""
    try:
        run()
    except Exception as error:  # whatever the runtime raises
        raise ExportError(f"cannot run {what}: {headline(error)}; try a smaller batch or another provider") from error
    return run
