"""Why a model has no graph: the line of the user's code, the module it stands in, and what to do about it."""

import re
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from ekgfx.base.lines import is_users, shown
from ekgfx.errors import TraceError
from ekgfx.graph.functional import inlined
from ekgfx.graph.nodes import owner
from ekgfx.tracing.parts import parts

_TAKEN = (Tensor, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))
"""What torch.export takes, in containers or not."""


def explained(
    model: nn.Module, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any], alone: bool = False
) -> TraceError:
    """What to say of an exception that the export raised; the model is run once to see whether it runs at all.

    alone: say also which of its parts can be traced.
    """
    frames = list(_frames(error))
    own = [(path, line) for path, line, _ in frames if is_users(path)]
    module = _module_of(model, [frame for *_, frame in frames])
    where = _place(model, own[-1] if own else None, module)
    what = _first_lines(error)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as failure:  # noqa: BLE001  the user's forward may raise anything
        return TraceError(
            f"{type(model).__name__} does not run on the example inputs: {where[0]}{_first_lines(failure)}"
        )
    if "Unsupported input type" in str(error):
        odd = next(type(leaf).__name__ for leaf in pytree.tree_leaves((args, kwargs)) if not isinstance(leaf, _TAKEN))
        return TraceError(
            f"{type(model).__name__} takes a {odd}, into which torch.export cannot look: trace a module around it "
            f"whose forward takes tensors and makes the {odd} of them"
        )
    advice = where[1] + (_alone(model, args, kwargs) if alone else "")
    return TraceError(f"{type(model).__name__} could not be traced: {where[0]}{what}: {advice}", module)


def _alone(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What can be traced where the whole cannot."""
    found = parts(model, args, kwargs)
    if not found:
        return ""
    told = ", ".join(f"{name} ({part.share:.0%} of the parameters)" for name, part in found.items())
    first, part = next(iter(found.items()))
    place = _spelled(model, first)
    return (
        f"; what can be traced alone: {told}: type traced = ekgfx.trace({place}, {part.example()}), and, with a "
        f"plan of that, {place} = ekgfx.prune({place}, plan, traced)"
    )


def _spelled(model: nn.Module, name: str) -> str:
    """Python for the sub-module of that name, as it is read and as it is set."""
    text = "model"
    for step in name.split("."):
        listed = step if isinstance(model, nn.Sequential | nn.ModuleList) else repr(step)
        text += f".{step}" if step.isidentifier() else f"[{listed}]"
        model = model.get_submodule(step)
    return text


def unknown_sizes(model: nn.Module, program: torch.export.ExportedProgram) -> TraceError | None:
    """What to say of a graph in which a size or a number depends on values; None where there is none."""
    if not any(map(_unknown, program.graph.nodes)):
        return None
    graph = inlined(program.graph_module)
    graph.eliminate_dead_code()  # what only a check reads
    for node in graph.nodes:
        if node.users and _unknown(node):
            line, advice = _place(model, _line_of(node), owner(node))
            what = "a size or a number depends on values of tensors there"
            return TraceError(f"{type(model).__name__} could not be traced: {line}{what}: {advice}")
    return None


def _unknown(node: fx.Node) -> bool:
    """Whether a node makes a number, or a tensor with a size, that depends on values."""
    values = pytree.tree_leaves(node.meta.get("val"))
    numbers = [n for v in values for n in (v.shape if isinstance(v, Tensor) else [v])]
    return any(isinstance(n, torch.SymInt | torch.SymFloat | torch.SymBool) for n in numbers)


def _place(model: nn.Module, line: tuple[str, int] | None, module: str) -> tuple[str, str]:
    """Where it is, as the beginning of a sentence, and what can be done."""
    where = ""
    if line is not None:
        where = shown(*line) + (f" in {module!r}" if module else "")
    elif module:
        where = repr(module)
    if module:
        part = model.get_submodule(module)
        kind = type(part).__name__
        if isinstance(part, torch.jit.ScriptModule):
            made = f"it is TorchScript: put the Python module that {part.original_name} was made of in its place"
            return f"{where}: ", f"{made}, or run it as it is, with leaf=[{module!r}] (--leaf {module})"
        if isinstance(part, nn.RNNBase):  # what else has no graph there than sequences of several lengths?
            advice = f"move this {kind} and the packing of its sequences into a sub-module, and name that as leaf"
            return f"{where}: ", f"{advice}, or pad them alone"
        advice = f"run this {kind} as it is, with leaf=[{module!r}] (--leaf {module})"
    else:
        advice = f"move what has no graph out of {type(model).__name__} into a sub-module, and name that as leaf"
    return (f"{where}: " if where else ""), f"{advice}, or write it with tensor operators such as torch.where"


def _frames(error: BaseException) -> Iterator[tuple[str, int, FrameType]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename, trace.tb_lineno, trace.tb_frame
        trace = trace.tb_next


def _module_of(model: nn.Module, frames: list[FrameType]) -> str:
    """Name of the innermost module of the model in whose methods the error arose."""
    names = {id(module): name for name, module in model.named_modules()}
    for frame in reversed(frames):
        name = names.get(id(frame.f_locals.get("self")))
        if name is not None:
            return name
    return ""


def _line_of(node: fx.Node) -> tuple[str, int] | None:
    places = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(path, int(line)) for path, line in places if is_users(path)]
    return own[-1] if own else None


def _first_lines(error: Exception) -> str:
    if isinstance(error, GuardOnDataDependentSymNode):
        return "what Python does there depends on values of tensors"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:500].rstrip(".") or type(error).__name__
