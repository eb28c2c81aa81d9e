"""The forward of one module as Python, from the calls that were recorded of it, with the widths that are left.

Only what the module itself runs is written out: its submodules are called as before, with their modes and hooks. A size
that depends on the inputs is read from what is at hand (`x.shape[1]`), so it is right for other inputs too. An integer
that the user's Python knew by itself is replaced by what the axes say. Where training runs the same operators with
other arguments (dropout), `self.training` chooses; where it runs others, there are two bodies.
"""

import itertools
import keyword
import math
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from ekgfx.errors import PruneError
from ekgfx.rewriting.calls import Call, Calls, Held, Values, whole
from ekgfx.rewriting.head import Head
from ekgfx.rewriting.patched import Forward
from ekgfx.rewriting.spelling import access, attribute, literal, plain, released, scaled, spelled, variable, written

Step = tuple[str, Any, Any]
"""("op", None, node), ("call", name of the module in the one that calls it, call) or ("is", node, node)."""


class Widths(Protocol):
    """What the cut makes of sizes."""

    def argument(self, node: fx.Node, name: str, position: int | None, old: int) -> int:
        """The new size that a recorded operator is given in place of the old one."""

    def batches(self, node: fx.Node, name: str, position: int | None, old: int) -> int:
        """How often the size that a recorded operator is given holds the batch, 0 where it does not."""

    def batch_dim(self, node: fx.Node) -> int | None:
        """The dimension of a recorded value that is the batch, None where none is."""

    def knows(self, call: Call) -> bool:
        """Whether the trace has something of what runs in a call: it leaves out what has no effect on the outputs."""

    def length(self, node: fx.Node, dim: int, old: int) -> int:
        """The new length of a dimension of a recorded value."""


@dataclass(frozen=True)
class Recorded:
    """The calls of one model in evaluation, and in training where that could be recorded (with floats of `dtype`)."""

    model: nn.Module
    evaluation: Calls
    training: Calls | None
    floats: torch.dtype
    dtype: torch.dtype


_SIZES = {"size", "shape", "sizes", "output_size", "start", "end", "length", "split_size", "split_sizes", "repeats"}
"""Arguments that are sizes."""


class _Inexpressible(PruneError):
    """What a module runs cannot be written as its forward."""


def rewrite(path: str, recorded: Recorded, widths: Widths, inline: Iterable[str], reason: str) -> Forward:
    """A forward for the cut version of the module at `path`.

    widths: what a size is after the cut. inline: modules in it whose own forward cannot be used.

    Raises:
        PruneError: the module's part of the model cannot be written as a function of its arguments.
    """
    module = recorded.model.get_submodule(path)
    if "forward" in vars(module):
        raise _Inexpressible(f"{path} has a forward of its own")
    calls = recorded.evaluation.of(path)
    trained = recorded.training.of(path) if recorded.training else []
    if not calls:
        raise _Inexpressible(f"{path} was not called")
    if len(trained) != len(calls):
        trained = []
    written = [
        _Writer(module, path, recorded, widths, set(inline), call, trained[i] if trained else None)
        for i, call in enumerate(calls)
    ]
    sources = {writer.source() for writer in written}
    if len(sources) > 1:
        raise _Inexpressible(f"{path} is called more than once, each time in another way")
    free = recorded.evaluation.free
    fixed = any(writer.fixed for writer in written)
    sizes = "any" if free == "sizes" and not fixed else "batch" if free == "batch" and not fixed else "example"
    return Forward(sources.pop(), tuple(written[0].objects.items()), reason, sizes)


class _Writer:
    """Writes one call of a module."""

    def __init__(
        self,
        module: nn.Module,
        path: str,
        recorded: Recorded,
        widths: Widths,
        inline: set[str],
        call: Call,
        trained: Call | None,
    ) -> None:
        self.module, self.path, self.recorded, self.widths, self.inline = module, path, recorded, widths, inline
        self.call, self.trained = call, trained
        self.calls = recorded.evaluation
        self.objects: dict[str, Any] = {}
        self.fixed = False
        plain = [
            (f"{place}.{name}".lstrip("."), value)
            for place, inner in module.named_modules()
            for name, value in vars(inner).items()
            if isinstance(value, Tensor)
        ]
        weights = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        tensors = [*weights, *plain]
        self.own = {id(tensor): name for name, tensor in reversed(tensors)}
        self.modules = {id(m): name for name, m in reversed([*module.named_modules(remove_duplicate=False)])}
        self.head = Head(module, path, call)

    def source(self) -> str:
        lines = self.head.lines()
        steps = self._steps(self.call)
        others = self._steps(self.trained) if self.trained is not None else None
        if others is not None and not _alike(steps, others):
            lines.append("    if self.training:")
            assert self.trained is not None and self.recorded.training is not None
            self.calls = self.recorded.training
            lines += [f"        {line}" for line in self._body(self.trained, others, None)]
            self.calls = self.recorded.evaluation
            others = None
        lines += [f"    {line}" for line in self._body(self.call, steps, others)]
        return "\n".join(lines) + "\n"

    # -- the body ---------------------------------------------------------------------------------------------------

    def _steps(self, call: Call) -> list[Step]:
        steps: list[Step] = []
        for step in call.steps:
            if isinstance(step, fx.Node):
                steps.append(("is", step, step.args[0]) if whole(step) else ("op", None, step))
                continue
            if not self._matters(step):
                continue
            name = self.modules.get(id(self.recorded.model.get_submodule(step.path)))
            if name and step.path not in self.inline and plain(step.passed.spec):
                steps.append(("call", name, step))
                continue
            steps += [("is", new, old) for new, old in zip(step.given.flat, step.passed.flat, strict=True)]
            steps += self._steps(step)
            assert step.results is not None and step.returned is not None
            steps += [("is", new, old) for new, old in zip(step.results.flat, step.returned.flat, strict=True)]
        return steps

    def _matters(self, call: Call) -> bool:
        """Whether somebody reads what a call returns, or the trace knows it."""
        assert call.results is not None
        read = any(isinstance(leaf, fx.Node) and leaf.users for leaf in call.results.flat)
        return read or not any(True for _ in call.operators()) or self.widths.knows(call)

    def _body(self, call: Call, steps: list[Step], others: list[Step] | None) -> list[str]:
        self.names: dict[fx.Node, str] = {}
        self.known: dict[Any, str] = {}
        self.taken = {p.name for p in self.head.parameters} | {
            "self",
            "torch",
            "math",
            "operator",
            "pytree",
            "tensors_in",
        }
        self.reference = ""
        self.floating = ""
        self.batch = ""
        lines: list[str] = []
        for leaf, path in zip(call.given.leaves, call.given.paths, strict=True):
            self._name_all(leaf, self.head.accessor(path) if isinstance(leaf, fx.Node | Held) else "")
        if not self.floating:
            own = [(self.own[id(t)], t) for t in (*self.module.parameters(), *self.module.buffers())]
            self.floating = next((attribute(n) for n, t in own if t.is_floating_point()), "")
        self.reference = self.reference or self.floating
        for i, (kind, place, what) in enumerate(steps):
            twin = others[i] if others is not None else None
            if kind == "is":
                if isinstance(place, fx.Node) and isinstance(what, fx.Node) and _is_tensor(place):
                    self._name(place, self._load(what))
            elif kind == "call":
                lines += self._called(place, what)
            elif what.target is operator.getitem:
                lines.append(self._assign(what, f"{self._load(what.args[0])}[{what.args[1]}]"))
            else:
                lines.append(self._assign(what, self._operator(what, twin[2] if twin else None)))
        assert call.returned is not None
        lines.append(f"return {self._built(call.returned)}")
        return released(lines, self.names.values(), self.taken)

    def _name_all(self, leaf: Any, text: str) -> None:
        """A leaf of what was passed, and what it holds, is at hand under a name from now on."""
        if isinstance(leaf, fx.Node):
            self._name(leaf, text)
        elif isinstance(leaf, Held):
            for i, node in enumerate(leaf.nodes):
                if isinstance(node, fx.Node):
                    self._name(node, f"tensors_in({text})[{i}]")

    def _assign(self, node: fx.Node, text: str, name: str = "") -> str:
        if not node.users:
            return text
        name = self._fresh(name or re.sub(r"(_\d+)+$", "", node.name))
        self._name(node, name)
        return f"{name} = {text}"

    def _fresh(self, name: str) -> str:
        """A name that is not in use: numbered here, so that two calls that do the same are written alike."""
        numbered = (name if not i else f"{name}_{i}" for i in itertools.count())
        fresh = next(name for name in numbered if name not in self.taken and not keyword.iskeyword(name))
        self.taken.add(fresh)
        return fresh

    def _name(self, node: fx.Node, text: str) -> None:
        """A value is at hand under a name from now on, and with it its sizes."""
        self.names[node] = text
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self.known.setdefault(value.node.expr, text)
        if isinstance(value, Tensor):
            for d, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    old = size.node.hint
                    expr = scaled(size.node.expr, old, self.widths.length(node, d, old))
                    if expr is not None:
                        self.known.setdefault(expr, f"{text}.shape[{d}]")
            if not self.batch and (batch := self.widths.batch_dim(node)) is not None:
                self.batch = f"{text}.shape[{batch}]"
            if not self.reference:
                self.reference = text
            if value.is_floating_point() and not self.floating:
                self.floating = text

    def _load(self, node: fx.Node) -> str:
        """A tensor by the name that it has in this forward."""
        if node in self.names:
            return self.names[node]
        if node.name in self.calls.weights:
            module, _, leaf = self.calls.weights[node.name].rpartition(".")
            tensor = getattr(self.recorded.model.get_submodule(module), leaf)
            if id(tensor) in self.own:
                return attribute(self.own[id(tensor)])
        if node.name in self.calls.constants:
            name = f"constant_{len(self.objects)}"
            for known, value in self.objects.items():
                if value is self.calls.constants[node.name]:
                    name = known
            self.objects[name] = self.calls.constants[node.name]
            where = f".to({self.reference}.device)" if self.reference else ""
            return f"{name}{where}"
        raise _Inexpressible(f"{self.path or 'the model'} reads {node.name}, which it is not given")

    def _called(self, name: str, call: Call) -> list[str]:
        """A call of a submodule, and what it returns taken apart."""
        assert call.results is not None
        args, kwargs = pytree.tree_unflatten([self._value(v) for v in call.passed.leaves], call.passed.spec)
        given = [written(a) for a in args] + [f"{k}={written(v)}" for k, v in kwargs.items()]
        text = f"{attribute(name)}({', '.join(given)})"
        leaves, paths = call.results.leaves, call.results.paths
        if len(leaves) == 1 and not paths[0] and not isinstance(leaves[0], Held):
            return [self._assign(leaves[0], text, variable(name)) if isinstance(leaves[0], fx.Node) else text]
        several = self._fresh(variable(name))
        for leaf, path in zip(leaves, paths, strict=True):
            self._name_all(leaf, several + "".join(map(access, path)))
        return [f"{several} = {text}"]

    def _operator(self, node: fx.Node, twin: fx.Node | None) -> str:
        target = node.target
        if not isinstance(target, OpOverload):
            raise _Inexpressible(f"{self.path or 'the model'} runs {getattr(target, '__name__', target)}")
        schema = target._schema.arguments
        others = iter(twin.args) if twin is not None else None
        texts = []
        for argument, value in zip(schema, node.args, strict=False):
            texts.append(self._argument(node, argument.name, value, next(others) if others else value))
        for name, value in node.kwargs.items():
            if name == "pin_memory" and not value:
                continue
            other = twin.kwargs.get(name, value) if twin is not None else value
            texts.append(f"{name}={self._argument(node, name, value, other)}")
        return f"torch.ops.{target}({', '.join(texts)})"

    def _argument(self, node: fx.Node, name: str, value: Any, other: Any) -> str:
        if isinstance(value, list | tuple):
            alike = isinstance(other, list | tuple) and len(other) == len(value)
            texts = [self._scalar(node, name, i, v, other[i] if alike else v) for i, v in enumerate(value)]
            return f"[{', '.join(texts)}]"
        return self._scalar(node, name, None, value, other)

    def _scalar(self, node: fx.Node, name: str, position: int | None, value: Any, other: Any) -> str:
        if isinstance(value, fx.Node):
            held = value.meta.get("val")
            if not isinstance(held, torch.SymInt):
                return self._value(value)
            old = cast(int, held.node.hint)
            new = self.widths.argument(node, name, position, old)
            expr = scaled(held.node.expr, old, new)
            return f"{self._size(value, held.node.expr)} * {new} // {old}" if expr is None else self._size(value, expr)
        if type(value) is int and value != -1:
            return self._integer(node, name, position, value)
        if isinstance(value, torch.dtype):
            follows = value != other or (self.calls is self.recorded.training and value == self.recorded.dtype)
            return f"{self.floating}.dtype" if follows and self.floating else repr(value)
        if isinstance(value, torch.device):
            return f"{self.reference}.device" if self.reference else f"torch.device({str(value)!r})"
        lowest = torch.finfo(self.recorded.floats).min, torch.finfo(self.recorded.dtype).min
        if isinstance(value, float) and value != other and (value, other) == lowest and self.floating:
            return f"torch.finfo({self.floating}.dtype).min"
        if isinstance(value, bool | float | int) and isinstance(other, bool | float | int) and value != other:
            if (value, other) == (False, True):
                return "self.training"
            return f"({literal(other)} if self.training else {literal(value)})"
        return literal(value)

    def _integer(self, node: fx.Node, name: str, position: int | None, value: int) -> str:
        """A number that the user's Python knows, or has made of a size (`len(x)`): the batch is read where it is at
        hand."""
        times = self.widths.batches(node, name, position, value)
        if times and self.batch:
            return self.batch if times == 1 else f"{self.batch} * {times}"
        new = self.widths.argument(node, name, position, value)
        self.fixed |= bool(times) or (new == value and name in _SIZES and value in self.calls.numbers)
        return str(new)

    def _value(self, value: Any) -> Any:
        """A value as text: a tensor by its name, a size by what it is read from."""
        if isinstance(value, Held):
            texts = ", ".join(self._value(node) for node in value.nodes)
            return f"{self._object('frame', value.frame)}.filled([{texts}])"
        if not isinstance(value, fx.Node):
            return literal(value)
        held = value.meta.get("val")
        if isinstance(held, torch.SymInt):
            return self._size(value, held.node.expr)
        if isinstance(held, torch.SymFloat | torch.SymBool):
            return self._number(value)
        return self._load(value)

    def _number(self, node: fx.Node) -> str:
        """A number that is computed from sizes."""
        name = getattr(node.target, "__name__", "")
        texts = [self._value(v) for v in node.args]
        if node.target in (torch.sym_float, float):
            return f"float({texts[0]})"
        if name.startswith("_sym_") and hasattr(math, name.removeprefix("_sym_")):
            return f"math.{name.removeprefix('_sym_')}({', '.join(texts)})"
        if getattr(operator, name, None) is node.target:
            return f"operator.{name}({', '.join(texts)})"
        self.fixed = True
        return literal(node.meta["val"].node.hint)

    def _size(self, node: fx.Node, expr: Any) -> str:
        try:
            return spelled(expr, self.known)
        except KeyError:
            self.fixed = True  # nothing at hand has it: it stays what it was in the example
            held = node.meta["val"].node
            return str(int(held.hint * (expr / held.expr)))

    def _built(self, values: Values) -> str:
        texts = [self._value(v) for v in values.leaves]
        if plain(values.spec):
            return written(pytree.tree_unflatten(texts, values.spec))
        return f"pytree.tree_unflatten([{', '.join(texts)}], {self._object('spec', values.spec)})"

    def _object(self, kind: str, value: Any) -> str:
        """The name of an object in the forward's name space."""
        for name, known in self.objects.items():
            if type(known) is type(value) and known == value:
                return name
        name = f"{kind}_{len(self.objects)}"
        self.objects[name] = value
        return name


def _alike(steps: list[Step], others: list[Step]) -> bool:
    """Whether two ways through a module run the same operators and call the same modules."""

    def signs(steps: list[Step]) -> list[Any]:
        return [what.target if kind == "op" else place if kind == "call" else None for kind, place, what in steps]

    return signs(steps) == signs(others)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
