"""onnxruntime sessions, opened one way everywhere."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from torch import Tensor

from ekgfx.errors import ExportError

from .io import PRECISION
from .providers import PROVIDERS, Provider
from .quiet import headline

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def open_session(
    path: Path,
    provider: Provider = PROVIDERS["cpu"],
    precision: str = "fp32",
    *,
    batch: int | None = None,
    threads: int = 0,
    cpu_fallback: bool = False,
    profile: Path | None = None,
    as_written: bool = False,
) -> ort.InferenceSession:
    """A session on the provider alone.

    batch: fix the free batch size, so that the shape arithmetic of the graph is folded away, as a deployment with one
    batch size would have it (a CUDA graph needs it). threads: inside operators; 0 leaves it to onnxruntime.
    cpu_fallback: let operators that the provider lacks run on the CPU instead of refusing the model.
    profile: beginning of the name of the file that `session.end_profiling()` writes. as_written: run the nodes in the
    order of the file, not in the one that onnxruntime finds from the outputs back.

    Raises ExportError when the file is missing, cannot be read, or has operators that the provider lacks.
    """
    if not path.is_file():
        raise ExportError(f"no ONNX file at {path}; write one with to_onnx or `ekgfx export`")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Worker threads that go on spinning after a run would steal the CPU from whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if as_written:
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # all have one priority: then by their position
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    alone = provider.device != "cpu" and not cpu_fallback
    if alone:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    _, settings = provider.precisions[precision]
    chain: list[str | tuple[str, dict[str, str]]] = [(provider.ort, dict(settings))]
    if provider.name == "tensorrt":
        chain.append(("CUDAExecutionProvider", {}))
    if not alone and provider.device != "cpu":
        chain.append("CPUExecutionProvider")
    try:
        return ort.InferenceSession(path, options, providers=chain)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ExportError(
            f"{path} cannot run on {provider.name}: {headline(error)}"
            + ("; allow operators on the CPU with cpu_fallback=True" if alone else "; export it again")
        ) from error


def precision_of(session: ort.InferenceSession) -> str:
    """The precision that `to_onnx` recorded in the file; "fp32" for files from elsewhere."""
    return str(session.get_modelmeta().custom_metadata_map.get(PRECISION, "fp32"))


def feeds(session: ort.InferenceSession, inputs: Sequence[Tensor], names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The inputs by name, as contiguous arrays of the types that the file declares. names: of the inputs, where they
    are not in the order of the file's."""
    slots = session.get_inputs()
    if names:
        slots = sorted(slots, key=lambda slot: [*names, slot.name].index(slot.name))
    if names and [slot.name for slot in slots] != list(names):
        raise ExportError(
            f"the file takes the inputs {', '.join(slot.name for slot in slots)}, but {', '.join(names)} were given"
        )
    if len(slots) != len(inputs):
        raise ExportError(
            f"the file takes {len(slots)} inputs ({', '.join(slot.name for slot in slots)}), "
            f"but {len(inputs)} were given"
        )
    return {
        slot.name: np.ascontiguousarray(value.detach().cpu().numpy(), dtype=TYPES[slot.type])
        for slot, value in zip(slots, inputs, strict=True)
    }
