"""What a forward's Python calls every value: a tensor by its name, a size by what it is read from.

A size that depends on the inputs is read from what is at hand (`x.shape[1]`), so it is right for other inputs too. An
integer that the user's Python knew by itself is replaced by what the axes say.
"""

import itertools
import keyword
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn

from ekgfx.errors import PruneError
from ekgfx.rewriting.calls import Calls, ModuleCall
from ekgfx.rewriting.marks import Held
from ekgfx.rewriting.spelling import attribute, literal, scaled, spelled

SIZES = {"size", "shape", "sizes", "output_size", "start", "end", "length", "split_size", "split_sizes", "repeats"}
"""Arguments that are sizes."""
RESERVED = {"self", "torch", "math", "operator", "pytree", "tensors_in", "sized", "own_forward"}


class Widths(Protocol):
    """What the cut makes of sizes."""

    def argument(self, node: fx.Node, name: str, position: int | None, old: int) -> int:
        """The new size that a recorded operator is given in place of the old one."""

    def batches(self, node: fx.Node, name: str, position: int | None, old: int) -> int:
        """How often the size that a recorded operator is given holds the batch, 0 where it does not."""

    def batch_dim(self, node: fx.Node) -> int | None:
        """The dimension of a recorded value that is the batch, None where none is."""

    def of_input(self, node: fx.Node, name: str, position: int | None, old: int) -> tuple[int, int] | None:
        """Where the size that a recorded operator is given may hold one of the inputs' (not the batch): that size in
        the example, and how often it holds it."""

    def input_dims(self, node: fx.Node) -> Mapping[int, int]:
        """The dimensions of a recorded value that are sizes of the inputs, not of the batch, with these sizes."""

    def knows(self, call: ModuleCall) -> bool:
        """Whether the trace has something of what runs in a call: it leaves out what has no effect on the outputs."""

    def lost(self, node: fx.Node) -> bool:
        """Whether the trace does not know a recorded operator, and may not know the sizes of what it reads."""

    def length(self, node: fx.Node, dim: int, old: int) -> int:
        """The new length of a dimension of a recorded value."""


@dataclass(frozen=True)
class Recorded:
    """The calls of one model in evaluation, and in training where that could be recorded (with floats of `dtype`).

    others: where it could not, the modules that do something else there.
    """

    model: nn.Module
    evaluation: Calls
    training: Calls | None
    floats: torch.dtype
    dtype: torch.dtype
    others: frozenset[str] = frozenset()


class InexpressibleError(PruneError):
    """What a module runs cannot be written as its forward."""


class Terms:
    """The names in one body of a forward.

    Attributes:
        objects: name → what the forward's name space holds beside PyTorch; grows.
        names: recorded value → the text that it is at hand under.
        taken: names that are in use.
        floating, batch: the text of some tensor of floats, and of the batch's size, where there is one.
        fixed: a size was written as the number that it was in the example, since nothing at hand has it.
    """

    def __init__(
        self,
        path: str,
        recorded: Recorded,
        widths: Widths,
        calls: Calls,
        own: Mapping[int, str],
        objects: dict[str, Any],
        taken: Iterable[str],
        by_size: bool = True,
    ) -> None:
        """path: of the module. calls: those of the mode that the body is of. own: the module's tensors, by id. by_size:
        a number that may be a size of the inputs is read from the first of them that has it in the example."""
        self.path, self.recorded, self.widths, self.calls = path, recorded, widths, calls
        self.own, self.objects = own, objects
        self.names: dict[fx.Node, str] = {}
        self.known: dict[Any, str] = {}
        self.inputs: dict[int, str] = {}
        self.taken = {*taken, *RESERVED}
        self.reference, self.floating, self.batch = "", "", ""
        self.by_size = by_size
        self.fixed = False

    def settle(self, module: nn.Module) -> None:
        """After what is passed was named: where none of it says type and device, the module's own tensors do."""
        if not self.floating:
            own = [(self.own[id(t)], t) for t in (*module.parameters(), *module.buffers())]
            self.floating = next((attribute(n) for n, t in own if t.is_floating_point()), "")
        self.reference = self.reference or self.floating

    def name_all(self, leaf: Any, text: str) -> None:
        """A leaf of what was passed, and what it holds, is at hand under a name from now on."""
        if isinstance(leaf, fx.Node):
            self.name(leaf, text)
        elif isinstance(leaf, Held):
            for i, node in enumerate(leaf.nodes):
                if isinstance(node, fx.Node):
                    self.name(node, f"tensors_in({text})[{i}]")

    def fresh(self, name: str) -> str:
        """A name that is not in use: numbered here, so that two calls that do the same are written alike."""
        numbered = (name if not i else f"{name}_{i}" for i in itertools.count())
        fresh = next(name for name in numbered if name not in self.taken and not keyword.iskeyword(name))
        self.taken.add(fresh)
        return fresh

    def name(self, node: fx.Node, text: str) -> None:
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
            for d, size in self.widths.input_dims(node).items():
                self.inputs.setdefault(size, f"{text}.shape[{d}]")
            if not self.batch and (batch := self.widths.batch_dim(node)) is not None:
                self.batch = f"{text}.shape[{batch}]"
            if not self.reference:
                self.reference = text
            if value.is_floating_point() and not self.floating:
                self.floating = text

    def load(self, node: fx.Node) -> str:
        """A tensor by the name that it has in this forward."""
        if node in self.names:
            return self.names[node]
        if node.name in self.calls.weights:
            module, _, leaf = self.calls.weights[node.name].rpartition(".")
            tensor = getattr(self.recorded.model.get_submodule(module), leaf)
            if id(tensor) in self.own:
                return attribute(self.own[id(tensor)])
        if node.name in self.calls.constants:
            constant, follows = self._constant_tensor(node.name)
            name = f"constant_{len(self.objects)}"
            for known, value in self.objects.items():
                if isinstance(value, Tensor) and same_values(value, constant):
                    name = known
            self.objects[name] = constant
            if follows and self.floating:
                return f"{name}.to({self.floating})"
            return f"{name}.to({self.reference}.device)" if self.reference else name
        raise InexpressibleError(f"{self.path or 'the model'} reads {node.name}, which it is not given")

    def _constant_tensor(self, name: str) -> tuple[Tensor, bool]:
        """A constant tensor, in the model's precision, and whether it follows that, as the two recordings tell."""
        ours, recorded = self.calls.constants[name], self.recorded
        known = None if recorded.training is None else recorded.training.constants.get(name)
        first = recorded.evaluation.constants.get(name)
        if known is None or first is None or known.shape != first.shape or recorded.floats == recorded.dtype:
            return ours, False
        follows = (first.dtype, known.dtype) == (recorded.floats, recorded.dtype)
        return (first, True) if follows else (ours, False)

    def argument(self, node: fx.Node, name: str, value: Any, other: Any) -> str:
        if isinstance(value, list | tuple):
            alike = isinstance(other, list | tuple) and len(other) == len(value)
            texts = [self._scalar(node, name, i, v, other[i] if alike else v) for i, v in enumerate(value)]
            return f"[{', '.join(texts)}]"
        return self._scalar(node, name, None, value, other)

    def _scalar(self, node: fx.Node, name: str, position: int | None, value: Any, other: Any) -> str:
        if isinstance(value, fx.Node):
            held = value.meta.get("val")
            if not isinstance(held, torch.SymInt):
                return self.value(value)
            old = cast(int, held.node.hint)
            new = self.widths.argument(node, name, position, old)
            expr = scaled(held.node.expr, old, new)
            return f"{self._size(value, held.node.expr)} * {new} // {old}" if expr is None else self._size(value, expr)
        if type(value) is int and value != -1:
            return self._integer(node, name, position, value)
        return self._constant(value, other)

    def passed(self, value: Any, other: Any) -> str:
        """What a submodule is passed. other: the same in training."""
        known = isinstance(value, fx.Node | Held)
        return str(self.value(value)) if known else self._constant(value, other)

    def _constant(self, value: Any, other: Any) -> str:
        """What no tensor and no size is: a type, a device, a number, a text. other: the same in training."""
        if isinstance(value, torch.dtype):
            follows = value != other or (self.calls is self.recorded.training and value == self.recorded.dtype)
            return f"{self.floating}.dtype" if follows and self.floating else repr(value)
        if isinstance(value, torch.device):
            return f"{self.reference}.device" if self.reference else f"torch.device({str(value)!r})"
        ours = self.recorded.dtype if self.calls is self.recorded.training else self.recorded.floats
        if isinstance(value, float) and value == torch.finfo(ours).min and self.floating:
            return f"torch.finfo({self.floating}.dtype).min"
        if isinstance(value, bool | float | int) and isinstance(other, bool | float | int) and value != other:
            if (value, other) == (False, True):
                return "self.training"
            return f"({literal(other)} if self.training else {literal(value)})"
        return literal(value)

    def _integer(self, node: fx.Node, name: str, position: int | None, value: int) -> str:
        """A number that the user's Python knows, or has made of a size (`len(x)`): the batch, and what is a size of the
        inputs, is read where it is at hand."""
        times = self.widths.batches(node, name, position, value)
        if times and self.batch:
            return self.batch if times == 1 else f"{self.batch} * {times}"
        found = self.widths.of_input(node, name, position, value) if self.by_size else None
        if found is not None and found[0] in self.inputs:
            return self.inputs[found[0]] + (f" * {found[1]}" if found[1] > 1 else "")
        new = self.widths.argument(node, name, position, value)
        self.fixed |= bool(times) or (new == value and name in SIZES and value in self.calls.numbers)
        return str(new)

    def value(self, value: Any) -> Any:
        """A value as text: a tensor by its name, a size by what it is read from."""
        if isinstance(value, Held):
            texts = ", ".join(self.value(node) for node in value.nodes)
            return f"{self.object_named('frame', value.frame)}.filled([{texts}])"
        if not isinstance(value, fx.Node):
            return literal(value)
        held = value.meta.get("val")
        if isinstance(held, torch.SymInt):
            return self._size(value, held.node.expr)
        if isinstance(held, torch.SymFloat | torch.SymBool):
            return self._number(value)
        return self.load(value)

    def _number(self, node: fx.Node) -> str:
        """A number that is computed from sizes."""
        name = getattr(node.target, "__name__", "")
        texts = [self.value(v) for v in node.args]
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

    def relation(self, relation: Any) -> str | None:
        """A relation of sizes as Python, None where nothing at hand has them."""
        try:
            text = spelled(relation, self.known)
        except KeyError:
            self.fixed = True
            return None
        return text[1:-1] if relation.is_Relational else text

    def object_named(self, kind: str, value: Any) -> str:
        """The name of an object in the forward's name space."""
        for name, known in self.objects.items():
            if type(known) is type(value) and known == value:
                return name
        name = f"{kind}_{len(self.objects)}"
        self.objects[name] = value
        return name


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, in one type and on one device."""
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return one is other or (alike and torch.equal(one, other))
