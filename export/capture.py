"""From a module to an exported program whose batch size is free."""

import functools
import re
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError

from ekgfx.errors import ExportError
from ekgfx.graph.asserted import checks_hold
from ekgfx.graph.hints import by_operators
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.graph.untouched import differing, state_of, untouched

from .attention import attention
from .convolution import conv2d
from .io import batched, called, device_of, named_tensors, with_batch
from .quiet import headline

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_CONV2D = torch.ops.aten.conv2d.default
_CLONE = torch.ops.aten.clone.default
_SUMS = torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor
_SQUEEZES = torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims
_VIEW, _RESHAPE = torch.ops.aten.view.default, torch.ops.aten.reshape.default


class _Named(nn.Module):
    """A model whose output is a flat dict of its tensors by name, which is all that an ONNX graph can return."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return named_tensors(called(self.model, inputs, self.names))


def capture(
    model: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...] = (), *, native_attention: bool
) -> tuple[torch.export.ExportedProgram, list[str], str]:
    """The model in evaluation mode as an exported program, the names of its outputs, and what users should know.

    names: of inputs that are given by name. native_attention: keep 4-D attention as one operator (an ONNX operator from
    opset 23 on); all other attention is written out, and so are convolutions whose number of groups follows the batch
    size. Parameter names carry the prefix "model.". The model is left as it was.

    Everything that runs on the captured graph must run under `torch.no_grad()` as this does: PyTorch picks another
    attention kernel, with another memory layout, where a gradient may be wanted (a learned attention bias), and a
    graph captured in one mode holds views that are impossible in the other.

    Raises ExportError when torch.export cannot follow the model or the model fixes its batch size.
    """
    batch = torch.export.Dim("batch")
    # A batch of one would be taken for a constant.
    example = with_batch([value.to(device_of(model)) for value in inputs], 2)
    shapes = {"inputs": tuple({0: batch} if free else {} for free in batched(inputs))}
    named = _Named(model, names)
    with untouched(model), evaluation_mode(model), torch.no_grad():
        try:
            try:
                program, said = _exported(named, example, shapes)
            except Exception:
                if not _forgets(named, inputs):
                    raise
                program, said = _exported(named, example, shapes)
        except ExportError:
            raise
        except Exception as error:  # torch.export raises many types, all of them about the user's model
            raise ExportError(_explain(model, error) + _differing(inputs)) from error
        _drop_idle_squeezes(program.graph)
        written_out: dict[Any, Any] = {}
        if any(node.target is _SDPA for node in program.graph.nodes):
            written_out[_SDPA] = _attention_but_4d if native_attention else attention
        if any(node.target is _CONV2D and _groups_follow(node) for node in program.graph.nodes):
            written_out[_CONV2D] = _convolution_but_fixed
        for target in _SUMS:
            if any(map(_adds_next_to_nothing, program.graph.find_nodes(op="call_function", target=target))):
                written_out[target] = functools.partial(_with_a_row, target)
        if written_out:
            for node in program.graph.find_nodes(op="call_function", target=_VIEW):
                node.target = _RESHAPE  # what is written out may have another order in memory
            program = program.run_decompositions(written_out)
        return program, list(program.call_spec.out_spec.context), said


def _exported(
    named: _Named, example: tuple[Tensor, ...], shapes: dict[str, Any]
) -> tuple[torch.export.ExportedProgram, str]:
    def export(shapes: Any) -> torch.export.ExportedProgram:
        with untouched(named.model), by_operators(), checks_hold([]):
            return torch.export.export(named, example, dynamic_shapes=shapes, strict=False)

    try:
        return export(shapes), ""
    except (UserError, AssertionError) as error:
        most = _most(str(error))
        if most is None:
            raise
    batch = torch.export.Dim("batch", max=most)
    kind = type(named.model).__name__
    said = f"{kind} does otherwise from a batch of {most + 1} on; the file does what it does below that"
    return export({"inputs": tuple({0: batch} if free else {} for free in shapes["inputs"])}), said


def _most(message: str) -> int | None:
    """The largest batch that an export takes, where its message says that it takes all up to one."""
    found = re.search(r"batch = Dim\('batch', max=(\d+)\)", message)
    if found:
        return int(found[1])
    below = re.search(r"for batch < (\d+)(?:/(\d+))?", message)
    return -(-int(below[1]) // int(below[2] or 1)) - 1 if below else None


def _forgets(named: _Named, inputs: tuple[Tensor, ...]) -> bool:
    """Run the model on a batch of one; whether it has kept something of it that it did not have.

    A cache that is good for one batch size only fixes that of the captured graph; one is the size that torch.export
    takes a free batch size not to have, so that the graph makes anew what is in the cache.
    """
    before = state_of(named.model)
    try:
        called(named.model, with_batch([value.to(device_of(named)) for value in inputs], 1), named.names)
    except Exception:  # noqa: BLE001  whatever the user's forward raises; why the export failed is said
        return False
    return bool(differing(state_of(named.model), before))


def _drop_idle_squeezes(graph: fx.Graph) -> None:
    """PyTorch leaves a dimension that is longer than one as it is, where ONNX's Squeeze refuses it."""
    for node in [n for target in _SQUEEZES for n in graph.find_nodes(op="call_function", target=target)]:
        given, dims = node.args
        said = [dims] if isinstance(dims, int) else list(dims)
        shape = given.meta["val"].shape
        single = [d for d in said if shape and isinstance(shape[d], int) and shape[d] == 1]
        if not single:
            node.target, node.args = _CLONE, (given,)  # an output keeps its name
        elif len(single) < len(said):
            node.target, node.args = _SQUEEZES[1], (given, single)


def _attention_but_4d(query: Tensor, *args: Any, **options: Any) -> Tensor:
    return NotImplemented if query.ndim == 4 else attention(query, *args, **options)


def _groups_follow(node: fx.Node) -> bool:
    """Whether a convolution's last argument, its number of groups, is computed from the batch size."""
    return any(isinstance(groups, fx.Node) for groups in node.args[6:])


def _convolution_but_fixed(*args: Any) -> Tensor:
    return NotImplemented if all(isinstance(groups, int) for groups in args[6:]) else conv2d(*args)


def _differing(inputs: tuple[Tensor, ...]) -> str:
    """What else may be wrong where inputs begin with different sizes."""
    sizes = [len(value) for value in inputs if value.ndim]
    if len({*sizes}) == 1:
        return ""
    return f"; dim 0 of the inputs has sizes {sizes}, of which {sizes[0]} is taken for the batch"


def _adds_next_to_nothing(node: fx.Node) -> bool:
    other = node.args[1]
    return isinstance(other, int | float) and _next_to_nothing(other)


def _next_to_nothing(number: float) -> bool:
    """What onnxscript's optimizer takes for 0 in a sum, and leaves out: then 0 / (0 + 1e-9) is no number."""
    return 0 < abs(number) <= 1e-8


def _with_a_row(target: Any, value: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    """The sum with a tensor of one dimension in place of a number, which the optimizer does not look at."""
    if isinstance(other, Tensor) or not _next_to_nothing(other) or not value.ndim:
        return NotImplemented
    row = torch.full((1,), other, dtype=value.dtype, device=value.device)
    return cast(Tensor, target(value, row, alpha=alpha))


def _explain(model: nn.Module, error: Exception) -> str:
    name = type(model).__name__
    if "specialized" in str(error) and "batch" in str(error):
        return (
            f"{name} fixes its batch size: its forward uses a number where it should use x.shape[0] "
            f"({headline(error)}); write the batch size as x.shape[0], or -1 in reshapes"
        )
    return (
        f"{name} could not be captured by torch.export: {headline(error)}; "
        "see `ekgfx groups MODEL` for whether it can be traced at all, and keep forward free of "
        "decisions that depend on the values of tensors"
    )
