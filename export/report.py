"""Everything that exporting a pruned network produces: files, parity, latency."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ekgfx.errors import ExportError

from .breakdown import Breakdown
from .exporter import to_onnx
from .io import as_inputs
from .latency import TORCH, LatencyTable, measure_latency
from .parity import Parity, check_parity
from .precisions import Precisions, Samples, faster_fp16, summary, write_variants
from .providers import provider
from .providers import providers as present_providers

# Which file of a run holds which network.
FILES = {"dense": "dense.onnx", "pruned": "model.onnx"}


@dataclass(frozen=True)
class ExportReport:
    """files: network → file name in the directory;  parity: network → its passed check;  latency, layers, precisions:
    None if not asked."""

    files: Mapping[str, str]
    parity: Mapping[str, Parity]
    latency: LatencyTable | None
    layers: Breakdown | None = None
    precisions: Precisions | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "files": dict(self.files),
            "parity": {network: parity.to_json() for network, parity in self.parity.items()},
            "latency": None if self.latency is None else self.latency.to_json(),
            "layers": None if self.layers is None else self.layers.to_json(),
            "precisions": None if self.precisions is None else self.precisions.to_json(),
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
    int8: Samples | None = None,
    **measuring: Any,
) -> ExportReport:
    """Export the pruned network (model.onnx) and, to have something to compare with, the dense one (dense.onnx); check
    both against PyTorch; time them side by side.

    inputs: real inputs, one tensor or a tuple, used for all three. metadata: recorded in the pruned file. dense: None
    times the pruned network alone. latency: False leaves out the timing and, with it, the dense file. providers: by
    default all that are present. int8: images to quantize by; both networks are then written in INT8, too (`to_int8`),
    and in fp16, timed in turn with the others on the CPU, and judged on the test images; an fp16 file that is never
    faster is removed again. measuring: further arguments of `measure_latency`.

    Raises ExportError, see `to_onnx`, `check_parity`, `measure_latency`, `to_int8`.
    """
    if int8 is not None:
        if fp16:
            raise ExportError("INT8 is made from fp32, and fp16 is measured beside it: leave out fp16")
        if elsewhere := [name for name in providers or () if name != "cpu"]:
            raise ExportError(f"INT8 files are timed on cpu alone, not on {', '.join(elsewhere)}; leave that out")
        providers = ("cpu",)
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
    variants = {network: (network, "fp16" if fp16 else "fp32", name) for network, name in files.items()}
    if int8 is not None:
        variants, made, notes = write_variants(files, directory, as_inputs(inputs), int8, fp16=latency)
    table = None
    if latency:
        table = measure_latency(
            {name: directory / file for name, (*_, file) in variants.items()},
            inputs,
            batches,
            names,
            {name: precision for name, (_, precision, _) in variants.items()},
            modules=networks,
            **measuring,
        )
    if int8 is None:
        return ExportReport(files, parity, table)
    if table is not None:
        table = faster_fp16(table)
        timed = {timing.network for timing in table.timings}
        for name in [name for name in variants if name not in timed]:
            (directory / variants.pop(name)[2]).unlink()
            notes = (*notes, f"{name}: no faster than fp32 here, and left out")
    found = summary(variants, directory, int8, made, notes)
    return ExportReport({name: file for name, (*_, file) in variants.items()}, parity, table, precisions=found)
