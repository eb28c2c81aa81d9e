"""Does the ONNX file compute what the model computes?"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.errors import ExportError
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.graph.untouched import deep_copy, untouched

from .io import Given, batch_size, called, device_of, named_tensors, with_batch, with_names
from .numerics import tensor_float32
from .quiet import headline
from .session import feeds, open_session, precision_of

# Largest relative difference that is rounding and no error, by the precision the file computes in.
TOLERANCE = {"fp32": 1e-4, "fp64": 1e-4, "fp16": 1e-2, "bf16": 1e-1}
# Half of the distance between neighbouring numbers, relative to them.
ROUNDING = {"fp32": 2**-24, "fp64": 2**-53, "fp16": 2**-11, "bf16": 2**-8}


@dataclass(frozen=True)
class Difference:
    """How far the file's output is from the model's, for one output and one batch size.

    absolute: max |file - model|;  relative: max |file - model| / max |model|, both over all elements. The scale is that
    of the whole output, so that elements near zero don't inflate the figure.
    """

    output: str
    batch: int
    absolute: float
    relative: float


@dataclass(frozen=True)
class Parity:
    """The outcome of a check that was passed: every difference, none of which exceeds the tolerance."""

    precision: str
    tolerance: float
    differences: tuple[Difference, ...]

    @property
    def absolute(self) -> float:
        return max(difference.absolute for difference in self.differences)

    @property
    def relative(self) -> float:
        return max(difference.relative for difference in self.differences)

    @property
    def batches(self) -> tuple[int, ...]:
        return tuple(sorted({difference.batch for difference in self.differences}))

    def to_json(self) -> dict[str, Any]:
        return {"absolute": self.absolute, "relative": self.relative, **asdict(self)}


def check_parity(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Given,
    tolerance: float | None = None,
) -> Parity:
    """Compare an ONNX file with the model it was made from, on real inputs, in onnxruntime on the CPU.

    onnxruntime's CPU kernels compute much of an fp16 file in fp32: its differences show what rounding the weights does,
    not all that a GPU's fp16 arithmetic adds.

    Args:
        model: it runs in evaluation mode, without TF32, on its device, and is left as it was.
        path: the ONNX file.
        inputs: one tensor, a tuple, or tensors by name, B×…; compared as they are and with another batch size (1, or 2
            where B is 1), which catches a file that has the batch size of its example built in.
        tolerance: on the relative difference; by default 1e-4 for an fp32 file and 1e-2 for an fp16 one.

    Returns:
        Every difference, none of which exceeds the tolerance.

    Raises:
        ExportError: an output is missing, has another shape, differs by more than the tolerance, or is no number in the
            model itself.

    Example:
        >>> print(ekgfx.export.check_parity(pruned, "net.onnx", images).relative)
    """
    path = Path(path)
    values, names = with_names(inputs)
    session = open_session(path)
    precision = precision_of(session)
    tolerance = TOLERANCE[precision] if tolerance is None else tolerance
    full = batch_size(values)
    differences: list[Difference] = []
    for batch in (full, 1 if full > 1 else 2):
        part = with_batch(values, batch)
        expected = _run(model, part, names)
        _check_numbers(model, expected, path)
        try:
            produced = session.run(None, feeds(session, part, names))
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ExportError(f"{path} cannot run at batch {batch}: {headline(error)}; export it again") from error
        outputs = [output.name for output in session.get_outputs()]
        if len(outputs) != len(expected):
            raise ExportError(
                f"{path} has the outputs {', '.join(outputs)}, the model {', '.join(expected)}; "
                "the file is of another model: export again"
            )
        for (name, reference), value in zip(expected.items(), produced, strict=True):
            differences.append(_difference(path, name, batch, torch.as_tensor(value), reference))
    worst = max(differences, key=lambda difference: difference.relative)
    if not worst.relative <= tolerance:
        raise ExportError(
            f"{path} differs from the model: output {worst.output!r} at batch {worst.batch} by {worst.relative:.2e} "
            f"relative ({worst.absolute:.2e} absolute), more than {tolerance:.0e}; "
            + _advice(model, inputs, precision, worst.relative)
        )
    return Parity(precision, tolerance, tuple(differences))


def amplification(model: nn.Module, inputs: Given, relative: float) -> float:
    """How far the model's outputs move, relative to the largest of them, when every element of its weights and of its
    floating-point inputs moves by that share of itself, up or down at random.

    This is what rounding does to a file's weights. A network in which such errors grow from layer to layer moves far,
    and no file of it in that precision computes the same. Inputs alone would not tell: their errors differ from pixel
    to pixel and so average out in pools and gates, while that of a weight is the same everywhere.
    """
    values, names = with_names(inputs)
    generator = torch.Generator().manual_seed(0)

    def moved(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        signs = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
        return value * (1 + relative * signs)

    before = _run(model, values, names)
    other = deep_copy(model)  # what is called or held in several places moves in all of them
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(moved(parameter))
    after = _run(other, [moved(value) for value in values], names)
    return max(_difference(Path(), name, 0, after[name], before[name]).relative for name in before)


def _check_numbers(model: nn.Module, expected: dict[str, Tensor], path: Path) -> None:
    """Nothing can be compared with NaN; what is to blame is a weight, more often than not one that nobody ever set."""
    lost = next((name for name, tensor in expected.items() if tensor.isnan().any()), None)
    if lost is None:
        return
    sizes = {name: weight.detach().abs().max().item() for name, weight in model.named_parameters() if weight.numel()}
    largest = max(sizes, key=lambda name: sizes[name] if sizes[name] == sizes[name] else math.inf, default="")
    raise ExportError(
        f"{path} cannot be compared: the model itself gives NaN in output {lost!r} for "
        f"{int(expected[lost].isnan().sum())} of {expected[lost].numel()} values"
        + (f"; its largest weight is {largest} ({sizes[largest]:.1e}): load or initialize it first" if largest else "")
    )


def _advice(model: nn.Module, inputs: Given, precision: str, relative: float) -> str:
    rounding = ROUNDING[precision]
    if not math.isfinite(relative) and precision == "fp16":
        return (
            "values overflow fp16: write the file with to_onnx(fp16=True) or to_fp16(inputs=…) from inputs like these, "
            "so that the operators that overflow stay in fp32"
        )
    if _draws(model, inputs):
        return "the model itself draws random numbers, so that no two runs of it agree, nor does the file with one"
    moves = amplification(model, inputs, rounding)
    if moves * 3 > relative:  # values in between are rounded as well
        return (
            f"the model itself amplifies rounding: weights and inputs that move by {rounding:.0e} move its output by "
            f"{moves:.0e}, so {precision} cannot be told from an error; check trained weights"
            + (", or leave out fp16" if precision == "fp16" else "")
        )
    return "do not use the file: export again from the same weights, or without fp16"


def _draws(model: nn.Module, inputs: Given) -> bool:
    """Whether two runs of the model differ by more than rounding."""
    values, names = with_names(inputs)
    first, second = _run(model, values, names), _run(model, values, names)
    return max(_difference(Path(), name, 0, second[name], first[name]).relative for name in first) > TOLERANCE["fp32"]


def _run(model: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The model's outputs by name, without TF32, which is good for three digits only."""
    device = device_of(model)
    with untouched(model), evaluation_mode(model), torch.no_grad(), tensor_float32(False):
        output = called(model, [value.to(device) for value in inputs], names)
    return {name: tensor.cpu() for name, tensor in named_tensors(output).items()}


def _difference(path: Path, name: str, batch: int, value: Tensor, reference: Tensor) -> Difference:
    if value.shape != reference.shape:
        raise ExportError(
            f"{path} gives output {name!r} the shape {list(value.shape)} at batch {batch}, the model "
            f"{list(reference.shape)}; the file is of another model or has a fixed batch size: export again"
        )
    value, reference = value.double(), reference.double()
    # Equal infinities are no difference; anything else that is not finite is one without limit.
    apart = torch.where(value == reference, 0.0, (value - reference).abs()).nan_to_num(nan=math.inf)
    scale = reference[reference.isfinite()].abs().max().item() if reference.isfinite().any() else 0.0
    absolute = apart.max().item() if apart.numel() else 0.0
    return Difference(name, batch, absolute, absolute / scale if scale else (math.inf if absolute else 0.0))
