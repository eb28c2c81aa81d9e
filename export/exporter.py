"""PyTorch module → ONNX file."""

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ekgfx.errors import EkgfxWarning, ExportError

from .capture import capture
from .constants import adopt_constants
from .half import PROTOBUF_LIMIT, hide_scalars, nbytes, to_half
from .io import PRECISION, Given, as_inputs, batched, input_names, with_names
from .names import name_interface, name_nodes
from .pooling import keep_padding
from .quiet import headline, quiet
from .ranges import overflowing, saved
from .session import open_session

# The exporter's own operator library starts here; older opsets are reached by a conversion that may fail unnoticed.
OLDEST_OPSET = 18
# From here on ONNX has an Attention operator of its own.
_ATTENTION_OPSET = 23


def to_onnx(
    model: nn.Module,
    example_inputs: Given,
    path: str | os.PathLike[str],
    *,
    fp16: bool = False,
    opset: int | None = None,
    metadata: Mapping[str, object] | None = None,
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
) -> Path:
    """Write a model, in evaluation mode and with a free batch size, as an ONNX file.

    Args:
        model: any module that `torch.export` can follow. It is left as it was: weights, modes and device.
        example_inputs: one tensor, a tuple of tensors, or tensors by the names of the forward's parameters. The size of
            dim 0 of the first one is the batch; inputs that begin otherwise are the same for every batch. Only shapes
            and types matter, but with fp16 their values do, too: give real ones.
        path: the file to write, by way of a temporary one beside it, so that it is never half-written.
        fp16: weights and arithmetic in half precision; inputs and outputs stay fp32 (see `half.to_half`), and so do
            operators whose weights, or whose values on these inputs, are too large for fp16; the metadata
            "ekgfx.fp32_nodes" names them.
        opset: ONNX operator set, 18 or newer; without it the exporter's default (20 with torch 2.14).
        metadata: what to record in the file's metadata_props, such as the plan's digest and MACs; values are written
            as text under "ekgfx.KEY". The precision, the model's class and the packages' versions are always there.
        translations: operator → onnxscript function, for operators that the exporter does not know
            (torch.onnx.export's custom_translation_table).

    Inputs are named as in the model's forward, outputs as in `io.named_tensors`, nodes after the module that they come
    from. Files of more than 2 GB keep their weights in PATH.data beside the file.

    Returns:
        The path.

    Raises:
        ExportError: the model cannot be captured or translated (the message names the operator where there is one),
            the result is no valid ONNX, or the file cannot be written.

    Example:
        >>> ekgfx.export.to_onnx(pruned, images, "net.onnx")
    """
    path = Path(path)
    inputs, by_name = with_names(example_inputs)
    names = list(by_name) or input_names(model, len(inputs))
    if opset is not None and opset < OLDEST_OPSET:
        raise ExportError(
            f"opset {opset} is older than {OLDEST_OPSET}, the oldest that can be written; use 18 or newer"
        )
    native_attention = (opset or 0) >= _ATTENTION_OPSET
    with quiet():
        program, outputs, said = capture(model, inputs, by_name, native_attention=native_attention)
        written = _translate(program, opset, translations, batched(inputs))
    if said:
        warnings.warn(said, EkgfxWarning, stacklevel=2)
    if opset is not None and written.opset_imports[""] != opset:
        raise ExportError(
            f"opset {opset} cannot be written by torch {torch.__version__}, which wrote opset "
            f"{written.opset_imports['']} instead; use an opset between {OLDEST_OPSET} and the newest that it knows"
        )
    adopt_constants(written.graph)
    keep_padding(written.graph)
    name_nodes(written.graph)
    name_interface(written.graph, names, outputs)
    written.metadata_props.update(_record(model, "fp16" if fp16 else _precision_of(model), metadata or {}))
    if fp16:
        written = _halved(written, inputs)
    write(written, path)
    return path


def to_fp16(
    file: str | os.PathLike[str], path: str | os.PathLike[str], inputs: Tensor | Sequence[Tensor] | None = None
) -> Path:
    """Write an fp32 file of `to_onnx` again in half precision, as `to_onnx(fp16=True)` would have, without the model.

    inputs: real ones, to find the operators whose values are too large for fp16; without them nothing is kept in fp32
    on that account.

    Returns the path. Raises ExportError when there is no such file, when it is no fp32 file, or when the result cannot
    be written.
    """
    file, path = Path(file), Path(path)
    if not file.is_file():
        raise ExportError(f"no ONNX file at {file}; write one with to_onnx or `ekgfx export`")
    try:
        single = ir.external_data.load_to_model(ir.load(file))  # nothing may be looked for beside the fp32 file later
    except Exception as error:  # protobuf's and onnx_ir's exceptions have no common base
        raise ExportError(f"{file} cannot be read as ONNX: {headline(error)}; export it again") from error
    precision = single.metadata_props.get(PRECISION, "fp32")
    if precision != "fp32":
        raise ExportError(f"{file} is an {precision} file; half precision is made from an fp32 one")
    half = _halved(single, None if inputs is None else as_inputs(inputs))
    half.metadata_props[PRECISION] = "fp16"
    write(half, path)
    return path


def _halved(model: ir.Model, inputs: Sequence[Tensor] | None) -> ir.Model:
    keep = frozenset() if inputs is None else overflowing(model, inputs)
    try:
        half = to_half(model, keep)
    except Exception as error:  # onnx_ir's and onnx's exceptions have no common base
        raise ExportError(f"the graph could not be converted to fp16: {headline(error)}; export it in fp32") from error
    with saved(half) as path:
        try:
            open_session(path)
        except ExportError:  # what is wrong then is for whoever opens the file to say
            hide_scalars(half)
    return half


def _translate(
    program: torch.export.ExportedProgram,
    opset: int | None,
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None,
    batched: Sequence[bool],
) -> ir.Model:
    """The exported program as an optimised ONNX graph.

    onnxscript's optimizer folds constants and batch norms and removes shape arithmetic: a ResNet-18 has 49 nodes
    instead of 179 and takes 0.6 of the time, for 0.2 seconds of work.
    """
    try:
        with torch.no_grad():
            result = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                custom_translation_table=dict(translations or {}),
                dynamic_shapes=tuple({0: "batch"} if free else {} for free in batched),
            )
    except Exception as error:  # the exporter's errors have no common base
        raise ExportError(_explain(program, error)) from error
    assert result is not None  # only exports of legacy modules return nothing
    return result.model


def _explain(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """One line naming the operator, and the module it stands in, that the exporter could not translate."""
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    text = "\n".join(str(cause) for cause in causes)
    operator = re.search(r"torch\.ops\.([\w.]+)", text)
    node = re.search(r"node %(\w+)", text)
    module = next((_module_of(n) for n in program.graph.nodes if node is not None and n.name == node[1]), "")
    return (
        f"the operator {operator[1] if operator else '(not named)'}{f' in {module}' if module else ''} could not be "
        f"translated to ONNX: {headline(causes[-1])}; write that step of the model with other operators, or pass its "
        "translation as to_onnx(translations={operator: onnxscript function})"
    )


def _module_of(node: torch.fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("model").lstrip(".") if stack else ""


def _precision_of(model: nn.Module) -> str:
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    return (
        {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}.get(min(kinds, key=str), "fp32")
        if kinds
        else "fp32"
    )


def _record(model: nn.Module, precision: str, metadata: Mapping[str, object]) -> dict[str, str]:
    versions = {f"ekgfx.version.{name}": packages.version(name) for name in ("torch", "onnx", "onnxscript")}
    return {
        PRECISION: precision,
        "ekgfx.model": f"{type(model).__module__}.{type(model).__qualname__}",
        **versions,
        **{f"ekgfx.{key}": str(value) for key, value in metadata.items()},
    }


def write(model: ir.Model, path: Path) -> None:
    """Write, check with shape inference, and only then move into place."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draft = Path(folder) / path.name
            large = nbytes(model) > PROTOBUF_LIMIT * 0.95  # room for the graph itself
            ir.save(model, draft, external_data=f"{path.name}.data" if large else None)
            try:
                onnx.checker.check_model(draft, full_check=True)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
                raise ExportError(
                    f"the exported graph is not valid ONNX: {headline(error)}; try another opset, "
                    "and report the model if that does not help"
                ) from error
            # The weights of a large model come first: the file that is opened must never lack them.
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == draft):
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror or error}; free some space or name another place"
        ) from error
