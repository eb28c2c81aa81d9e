"""Leaves: modules that run as they are. The exported graph has one operator in place of each call of such a module.

A forward whose Python depends on values (`if x.sum() > 0`, a loop over detections) has no graph. Named as a leaf, it
need not have one: while the model is exported, the module's forward is replaced by the operator `ekgfx::leaf`, which
knows the shapes of its results from having run the module on the example inputs. Where the graph is run later, the
module itself is. What goes into a leaf, what comes out of it and what it holds keeps all of its positions.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ekgfx.axes import ONE, Axis, axes
from ekgfx.base.containers import Frame, atoms, tensors_in
from ekgfx.errors import TraceError
from ekgfx.graph.untouched import untouched
from ekgfx.rules.registry import Call, Effect, opaque, rule


@torch.library.custom_op("ekgfx::leaf", mutates_args=())
def leaf(inputs: list[Tensor], state: list[Tensor], module: str, number: int, results: str, macs: int) -> list[Tensor]:
    """Call `number` (per forward) of the module of that name. results: types and shapes of its tensors, as JSON."""
    raise NotImplementedError(
        f"leaf {module!r} is given nothing that depends on the model's inputs, so that its results would be constants: "
        "name the module around it as leaf"
    )


@leaf.register_fake
def _(inputs: list[Tensor], state: list[Tensor], module: str, number: int, results: str, macs: int) -> list[Tensor]:
    device = next((t.device for t in (*inputs, *state)), torch.device("cpu"))
    return [torch.empty(shape, dtype=getattr(torch, dtype), device=device) for dtype, shape in json.loads(results)]


_PLAIN = (
    Tensor,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.Size,
    type(None),
)
OPERATOR = torch.ops.ekgfx.leaf.default


@rule(OPERATOR)
def stays_whole(call: Call) -> Effect:
    """Its MACs are what was counted when the module ran on the example, for a batch of any size."""
    batch = next((t[0] for t in call["inputs"] if t and any(axis.batch for axis in axes(t[0]))), ONE)
    macs = [(batch, Axis(call["macs"] // batch.size))] if call["macs"] else []
    return replace(opaque(call, "a leaf, run as it is"), macs=macs)


@dataclass(frozen=True)
class LeafCall:
    """One call of a leaf in the example's forward, as far as it is not tensors.

    arguments: its (args, kwargs); output: its result.
    results: type and shape of every tensor of its result. macs: what it computed, over the whole batch.
    """

    arguments: Frame
    output: Frame
    results: tuple[tuple[str, tuple[int, ...]], ...]
    macs: int


class Leaves(dict[str, list[LeafCall]]):
    """Qualified module name → its calls in one forward of the example."""

    def run(self, model: nn.Module, args: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that a leaf of `model` returns; `args` are those of the operator."""
        module = model.get_submodule(args["module"])
        positional, named = self.arguments(args, args["inputs"])
        state = dict(zip(_state(module), args["state"], strict=True))
        with untouched(module), evaluation_mode(module):
            if not state:  # TorchScript, too, which PyTorch calls in no other way
                return tensors_in(module(*positional, **named))
            return tensors_in(functional_call(module, state, positional, named))

    def arguments(self, args: Mapping[str, Any], inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the module of the operator is called with, `inputs` in place of tensors."""
        call = self[args["module"]][args["number"]]
        positional, named = call.arguments.filled(inputs)
        return positional, named


def find_leaves(model: nn.Module, patterns: Sequence[str | type[nn.Module]]) -> list[str]:
    """Qualified names of the modules that are meant: by name, by glob (`*` also matches dots) or by class.

    A leaf inside a leaf is not named.

    Raises:
        TraceError: a pattern matches no module, or the model as a whole.
    """
    if isinstance(patterns, str | type):
        patterns = [patterns]
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, type):
            matched = {name for name in names if isinstance(model.get_submodule(name), pattern)}
        else:
            matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            shown = pattern.__name__ if isinstance(pattern, type) else pattern
            near = get_close_matches(shown, [*names, *{type(m).__name__ for m in model.modules()}], 3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise TraceError(f"leaf {shown!r} matches no sub-module of {type(model).__name__}{hint}")
        found |= matched
    return [name for name in names if name in found and not any(name.startswith(f"{outer}.") for outer in found)]


def record(model: nn.Module, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Leaves:
    """Run the model once and note what goes through its leaves."""
    calls = Leaves({name: [] for name in names})

    def noting(name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            output = forward(*args, **kwargs)
        for value, verb in (*((v, "takes") for v in atoms((args, kwargs))), *((v, "returns") for v in atoms(output))):
            if not isinstance(value, _PLAIN):
                raise TraceError(
                    f"leaf {name!r} {verb} a {type(value).__name__}: use tensors, numbers, strings, or containers and "
                    "objects that hold these; name the module around it as leaf, which works with what is in it"
                )
        given, (made, tensors) = Frame.of((args, kwargs))[0], Frame.of(output)
        results = tuple((str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in tensors)
        calls[name].append(LeafCall(given, made, results, counter.get_total_flops() // 2))
        return output

    if names:
        wrap = partial(partial, noting)
        with untouched(model), wrapped_forwards(model, names, wrap), torch.no_grad():
            model(*args, **kwargs)
    return calls


@contextlib.contextmanager
def as_operators(model: nn.Module, leaves: Leaves) -> Iterator[None]:
    """While this is open, the forward of every leaf is one call of the operator."""
    numbers = dict.fromkeys(leaves, 0)

    def operator(name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        calls = leaves[name]
        number = numbers[name] % len(calls)  # export runs the model's forward more than once
        numbers[name] += 1
        call, module = calls[number], model.get_submodule(name)
        inputs, state = tensors_in((args, kwargs)), list(_state(module).values())
        made = torch.ops.ekgfx.leaf(inputs, state, name, number, json.dumps(call.results), call.macs)
        return call.output.filled(made)

    with wrapped_forwards(model, [name for name, calls in leaves.items() if calls], partial(partial, operator)):
        yield


@contextlib.contextmanager
def wrapped_forwards(
    model: nn.Module, names: Sequence[str], wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While this is open, `wrap(name, forward)` stands in place of the forward of each of the modules."""
    modules = [(name, model.get_submodule(name)) for name in names]
    own = [(module, vars(module).get("forward")) for _, module in modules]
    try:
        for name, module in modules:
            module.forward = wrap(name, module.forward)
        yield
    finally:
        for module, forward in own:
            del module.forward
            if forward is not None:
                module.forward = forward


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # what a module keeps from evaluation to evaluation it drops on this way, some of timm's on no other
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
