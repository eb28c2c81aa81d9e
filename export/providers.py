"""Where an ONNX file can run: the execution providers by their short names, and which of them are present."""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import io
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from ekgfx.errors import ExportError

Options = Mapping[str, str]

_CUDA: Options = MappingProxyType(
    {
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "prefer_nhwc": "1",
    }
)


@dataclass(frozen=True)
class Provider:
    """One way to run a file.

    name: what users type;  ort: onnxruntime's name;  device: where tensors lie, "cpu" or "cuda".
    precisions: what can be asked for → (what is computed, the provider's options). The two differ where a provider
    decides for itself; figures are stated with what is computed.
    """

    name: str
    ort: str
    device: str
    precisions: Mapping[str, tuple[str, Options]]


# The providers that ekgfx measures. CUDA computes fp32 files in TF32 unless told not to; TensorRT always does.
PROVIDERS: Mapping[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", "cpu", {p: (p, {}) for p in ("fp32", "fp16", "int8")}),
        Provider(
            "cuda",
            "CUDAExecutionProvider",
            "cuda",
            {
                "fp32": ("fp32", {**_CUDA, "use_tf32": "0"}),
                "tf32": ("tf32", {**_CUDA, "use_tf32": "1"}),
                "fp16": ("fp16", {**_CUDA, "use_tf32": "0"}),
            },
        ),
        Provider(
            "cuda-graph",
            "CUDAExecutionProvider",
            "cuda",
            {
                "fp32": ("fp32", {**_CUDA, "use_tf32": "0", "enable_cuda_graph": "1"}),
                "tf32": ("tf32", {**_CUDA, "use_tf32": "1", "enable_cuda_graph": "1"}),
                "fp16": ("fp16", {**_CUDA, "use_tf32": "0", "enable_cuda_graph": "1"}),
            },
        ),
        # Engines are built for each session and never cached, so that none can outlive a change of the model.
        Provider(
            "tensorrt",
            "TensorrtExecutionProvider",
            "cuda",
            {
                "fp32": ("tf32", {}),
                "tf32": ("tf32", {}),
                "fp16": ("fp16", {"trt_fp16_enable": "1"}),
            },
        ),
    )
}


@dataclass(frozen=True)
class Presence:
    """Which providers can be used here, and why the others cannot."""

    present: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """One line about what is missing; empty when nothing is."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.missing.items():
            reasons.setdefault(reason, []).append(name)
        return "; ".join(f"{', '.join(names)} not available: {reason}" for reason, names in reasons.items())


@functools.cache
def providers() -> Presence:
    """Try every provider once on a graph of one node (about 10 ms each); onnxruntime's own list names what was
    compiled in, whether or not its libraries and devices are there."""
    missing = {name: reason for name, provider in PROVIDERS.items() if (reason := _why_missing(provider))}
    return Presence(tuple(name for name in PROVIDERS if name not in missing), missing)


def provider(name: str) -> Provider:
    """The provider of that name; ExportError when there is none or when it cannot be used here."""
    if name not in PROVIDERS:
        raise ExportError(f"unknown provider {name!r}; there are {', '.join(PROVIDERS)}")
    here = providers()
    if name in here.missing:
        raise ExportError(
            f"provider {name!r} cannot be used: {here.missing[name]}; present here: {', '.join(here.present)}"
        )
    return PROVIDERS[name]


def _why_missing(provider: Provider) -> str:
    """Empty when a session on the provider works."""
    if provider.ort not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} was built without it (install onnxruntime-gpu)"
    if provider.device == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        _load_cuda_libraries()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if provider.device != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = dict(next(iter(provider.precisions.values()))[1])
    # onnxruntime reports a failing library on its default logger and prints a banner, and both say less than we do.
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ort.InferenceSession(_one_node(), options, providers=[(provider.ort, settings)])
    except Exception as error:  # noqa: BLE001  onnxruntime's exceptions have no common base
        return _missing_library(provider) or f"onnxruntime could not start it ({str(error).splitlines()[0][:160]})"
    finally:
        ort.set_default_logger_severity(2)  # onnxruntime's own default; it has no getter
    return ""


def _load_cuda_libraries() -> None:
    """Let onnxruntime find the CUDA and cuDNN libraries that torch brought, and TensorRT's Python package."""
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
        if importlib.util.find_spec("tensorrt") is not None:
            importlib.import_module("tensorrt")


def _missing_library(provider: Provider) -> str:
    """The system's own words about the shared library that is missing, such as "libcurand.so.10: cannot open …"."""
    folder = Path(ort.__file__).parent / "capi"
    stem = provider.ort.removesuffix("ExecutionProvider").lower()
    pattern = "onnxruntime_providers_{}.dll" if platform.system() == "Windows" else "libonnxruntime_providers_{}.so"
    try:
        ctypes.CDLL(str(folder / pattern.format("shared")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / pattern.format(stem)))
    except OSError as error:
        return f"{error} (pip install 'onnxruntime-gpu[cuda,cudnn]'; for TensorRT also tensorrt)"
    return ""


def _one_node() -> bytes:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())
