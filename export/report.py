"""Everything that exporting a pruned network produces: files, parity, latency."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .breakdown import Breakdown
from .exporter import to_onnx
from .latency import TORCH, LatencyTable, measure_latency
from .parity import Parity, check_parity
from .providers import provider
from .providers import providers as present_providers

# Which file of a run holds which network.
FILES = {"dense": "dense.onnx", "pruned": "model.onnx"}


@dataclass(frozen=True)
class ExportReport:
    """files: network → file name in the directory;  parity: network → its passed check;  latency, layers: None if not
    asked."""

    files: Mapping[str, str]
    parity: Mapping[str, Parity]
    latency: LatencyTable | None
    layers: Breakdown | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "files": dict(self.files),
            "parity": {network: parity.to_json() for network, parity in self.parity.items()},
            "latency": None if self.latency is None else self.latency.to_json(),
            "layers": None if self.layers is None else self.layers.to_json(),
        }


def export_report(
    dense: nn.Module | None,
    pruned: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    directory: Path,
    *,
    fp16: bool = False,
    opset: int | None = None,
    metadata: Mapping[str, object] | None = None,
    latency: bool = True,
    batches: Sequence[int] = (1, 64),
    providers: Sequence[str] | None = None,
    **measuring: Any,
) -> ExportReport:
    """Export the pruned network (model.onnx) and, to have something to compare with, the dense one (dense.onnx); check
    both against PyTorch; time them side by side.

    inputs: real inputs, one tensor or a tuple, used for all three. metadata: recorded in the pruned file. dense: None
    times the pruned network alone. latency: False leaves out the timing and, with it, the dense file. providers: by
    default all that are present. measuring: further arguments of `measure_latency`.

    Raises ExportError, see `to_onnx`, `check_parity`, `measure_latency`.
    """
    names = present_providers().present if providers is None else tuple(providers)
    if latency:
        for name in names:  # before the work, not after it
            if name not in TORCH:
                provider(name)
    networks = {"dense": dense, "pruned": pruned} if latency and dense is not None else {"pruned": pruned}
    parity: dict[str, Parity] = {}
    for network, model in networks.items():
        path = directory / FILES[network]
        to_onnx(model, inputs, path, fp16=fp16, opset=opset, metadata=metadata if network == "pruned" else None)
        parity[network] = check_parity(model, path, inputs)
    files = {network: FILES[network] for network in networks}
    if not latency:
        return ExportReport(files, parity, None)
    table = measure_latency(
        {network: directory / name for network, name in files.items()},
        inputs,
        batches,
        names,
        "fp16" if fp16 else "fp32",
        modules=networks,
        **measuring,
    )
    return ExportReport(files, parity, table)
