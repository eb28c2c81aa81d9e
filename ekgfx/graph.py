"""A functional graph of ATen operators with an expression for every dimension of every tensor.

Every operator's arguments are bound to their schema names, and the rules are run over the graph once.
"""

import contextlib
import operator
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from ekgfx.axes import Axis, Dims, axes, freeze
from ekgfx.errors import TraceError
from ekgfx.functional import functionalize
from ekgfx.in_place import overwritable, overwritable_with_gradients
from ekgfx.leaf import Leaves
from ekgfx.nodes import bind, first_names, op_name, owner, rename_modules
from ekgfx.rules import Call, Effect, Rule, lookup, unknown
from ekgfx.rules.registry import TensorDims
from ekgfx.tables import is_table
from ekgfx.untouched import State

Example = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a model


@dataclass(frozen=True)
class Operation:
    """One operator of the graph: its node, its arguments by schema name (tensors as fx Nodes), and its effect."""

    node: fx.Node
    args: Mapping[str, Any]
    effect: Effect

    @property
    def target(self) -> Any:
        return self.node.target

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def module(self) -> str:
        """Qualified name of the module whose forward ran this operator ('' for the model itself)."""
        return owner(self.node)


class AxisGraph:
    """A model as a functional graph, with one symbolic expression for every dimension of every tensor.

    Attributes:
        model: the traced module, unchanged; its current weights are read whenever a sub-network is made.
        graph: the functional fx graph.
        operations: the operators in order.
        dims: the dimensions of every node's output (a list of them where an operator returns several tensors).
        weights: placeholder name → qualified name of the parameter, buffer or table.
        tables: names of the weights that are plain tensors.
        constants: placeholder name → tensor constant.
        inputs: placeholder names of the user's inputs, in order.
        decomposed: PyTorch made the graph functional, so some operators are others than those that the model calls.
        leaves: the modules that run as they are, with their calls.
        state: what modules held beside weights when they were traced (caches, integers).
        unknown_ops: operators without a rule (or whose rule does not hold) → number of uses.
    """

    def __init__(
        self,
        model: nn.Module,
        program: torch.export.ExportedProgram,
        example: Example,
        leaves: Leaves | None = None,
        decompose: bool = False,
        state: State | None = None,
    ) -> None:
        self.model = model
        self.state = state or {}
        self.leaves = leaves or Leaves()
        self.graph, program, self.decomposed = functionalize(program, decompose)
        self.example = example
        self.in_spec = program.call_spec.in_spec
        self.out_spec = program.call_spec.out_spec
        self.weights: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.inputs: list[str] = []
        self.tables: set[str] = set()
        canonical = first_names(model.named_parameters(remove_duplicate=False))
        rename_modules(self.graph, first_names(model.named_modules(remove_duplicate=False)))
        # By position: a copied graph renames what is called as a Python builtin is (`forward(self, input)`).
        placeholders = (node.name for node in self.graph.nodes if node.op == "placeholder")
        for spec, name in zip(program.graph_signature.input_specs, placeholders, strict=True):
            match spec.kind:
                case InputKind.PARAMETER | InputKind.BUFFER:
                    self.weights[name] = canonical.get(spec.target, spec.target)
                case InputKind.CONSTANT_TENSOR if is_table(model, spec.target, program.constants[spec.target]):
                    self.weights[name] = spec.target
                    self.tables.add(spec.target)
                case InputKind.CONSTANT_TENSOR:
                    self.constants[name] = program.constants[spec.target]
                case InputKind.USER_INPUT:
                    self.inputs.append(name)
                case _:
                    raise TraceError(f"cannot analyse a model with a {spec.kind.name} input ({spec.target})")
        self.rules: Mapping[str, Rule] = {}
        self._start()

    def _start(self) -> None:
        self.unknown_ops: dict[str, int] = {}
        self.batch = Axis(0, "batch", frozen="batch dimension", batch=True)
        self.dims: dict[str, Any] = {}  # Dims, or a list of them
        self.operations: list[Operation] = []
        self._propagate()

    def assuming(self, rules: Mapping[str, Rule]) -> "AxisGraph":
        """The same graph analysed anew, with other rules for the operators of these names."""
        other = object.__new__(AxisGraph)
        for name in ("model", "leaves", "graph", "example", "in_spec", "out_spec", "weights", "constants", "inputs"):
            setattr(other, name, getattr(self, name))
        other.rules, other.tables, other.state = rules, self.tables, self.state
        other._start()
        return other

    # -- the one pass of the rules over the graph ------------------------------------------------------------------

    def _propagate(self) -> None:
        shared: dict[str, Dims] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.dims[node.name] = self._placeholder(node, shared)
            elif node.op == "call_function":
                self._operation(node)
            elif node.op == "output":
                for out in node.all_input_nodes:
                    for dims in listed(self.dims.get(out.name, ())):
                        for dim in dims:
                            freeze(dim, "output of the model")
        self._freeze_unused()

    def _freeze_unused(self) -> None:
        """What the graph does not read is not understood: other uses (in training, say) may exist."""
        used = {self.weights[n.name] for n in self.graph.nodes if n.name in self.weights and n.users}
        for placeholder, name in self.weights.items():
            if name not in used:
                for dim in self.dims[placeholder]:
                    freeze(dim, f"{name} is not used in evaluation mode")

    def _placeholder(self, node: fx.Node, shared: dict[str, Dims]) -> Dims:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return ()
        shape = tuple(value.shape)
        if node.name in self.weights:
            name = self.weights[node.name]
            return shared.setdefault(name, tuple(Axis(n, f"{name} dim {d}") for d, n in enumerate(shape)))
        if node.name in self.constants:
            return tuple(Axis(n, node.name, frozen=f"constant {node.name}") for n in shape)
        inputs = tuple(Axis(n, node.name, frozen=f"input {node.name}") for n in shape)
        if shape and shape[0] == self.example_batch:
            self.batch.size = shape[0]
            return (self.batch, *inputs[1:])
        return inputs

    def _operation(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, i = cast(tuple[fx.Node, int], node.args)
            if isinstance(self.dims.get(source.name), list):
                self.dims[node.name] = self.dims[source.name][i]
            return
        shapes = [tuple(v.shape) for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        args = bind(node)
        if not shapes:
            return
        call = Call(
            op=op_name(node.target),
            args={name: self.symbolic(value) for name, value in args.items()},
            shapes=shapes,
            where=owner(node),
        )
        effect = self._effect(call, self.rules.get(call.op) or lookup(node.target), _read(node))
        self.operations.append(Operation(node, args, effect))
        out = effect.out
        several = isinstance(node.meta["val"], list | tuple)
        self.dims[node.name] = out if several else out[0] if isinstance(out, list) else out

    def _effect(self, call: Call, rule: Rule | None, read: Container[int]) -> Effect:
        """What the operator's rule says; where there is none, or it contradicts the traced shapes, nothing is known.

        Shapes of outputs that are not `read` don't count: torch 2.11 traces an LSTM's final states with a wrong one.
        """
        if rule is not None:
            with contextlib.suppress(ValueError):  # of `unify`: the rule does not hold here
                effect = rule(call)
                pairs = enumerate(zip(listed(effect.out), call.shapes, strict=True))
                if all(tuple(dim.size for dim in dims) == shape for i, (dims, shape) in pairs if i in read):
                    return effect
        self.unknown_ops[call.op] = self.unknown_ops.get(call.op, 0) + 1
        return unknown(call)

    def symbolic(self, value: Any) -> Any:
        """An argument with every fx Node in it replaced by the dimensions of its tensor."""
        if isinstance(value, fx.Node):
            dims = self.dims.get(value.name)
            return (
                [TensorDims(d) for d in dims] if isinstance(dims, list) else None if dims is None else TensorDims(dims)
            )
        if isinstance(value, list | tuple):
            return [self.symbolic(v) for v in value]
        return value

    # -- what can be asked of it -----------------------------------------------------------------------------------

    @cached_property
    def example_batch(self) -> int:
        """Leading size shared by all tensor inputs; 0 if they share none (then no dimension counts as the batch)."""
        sizes = {t.shape[0] if t.ndim else 0 for t in pytree.tree_leaves(self.example) if isinstance(t, Tensor)}
        return sizes.pop() if len(sizes) == 1 else 0

    def tensor(self, name: str) -> Tensor:
        """The model's current parameter or buffer of that qualified name."""
        module, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(module), leaf)

    def operation(self, node: fx.Node) -> Operation | None:
        """The operator at a node, None for inputs, element reads and the output."""
        return self._by_node.get(node)

    def root_weight(self, value: Any) -> str | None:
        """Qualified name of the parameter that an argument (of a list: its first element) is, or is computed from along
        first tensor arguments."""
        if isinstance(value, list | tuple):
            value = next(iter(value), None)
        while isinstance(value, fx.Node) and value.op == "call_function":
            value = next(iter(value.all_input_nodes), None)
        return self.weights.get(value.name) if isinstance(value, fx.Node) else None

    @cached_property
    def operations_of(self) -> Counter[str]:
        """Module → number of operators that run in it and its submodules."""
        found: Counter[str] = Counter()
        for operation in self.operations:
            parts = operation.module.split(".")
            found.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return found

    @cached_property
    def _by_node(self) -> dict[fx.Node, Operation]:
        return {operation.node: operation for operation in self.operations}

    @cached_property
    def overwritable(self) -> dict[str, str]:
        """Operator → its first argument, where that may be overwritten when it is not wanted any more."""
        return overwritable(self.graph)

    @cached_property
    def overwritable_with_gradients(self) -> set[str]:
        """Those that may overwrite it where gradients are taken of the result."""
        return overwritable_with_gradients(self.graph)

    @cached_property
    def last_uses(self) -> dict[str, list[str]]:
        """Node → nodes whose values nobody reads after it."""
        last: dict[str, str] = {}
        for node in self.graph.nodes:
            for used in (node, *node.all_input_nodes):
                last[used.name] = node.name
        dying: dict[str, list[str]] = {}
        for name, at in last.items():
            dying.setdefault(at, []).append(name)
        return dying

    def prunable_parameters(self) -> int:
        """Number of parameters in tensors that some free axis cuts."""
        dims = self.weight_dims()
        return sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters()
            if any(not axis.frozen and axis.size > 1 for dim in dims.get(name, ()) for axis in axes(dim))
        )

    def weight_dims(self) -> dict[str, Dims]:
        """Qualified name of every parameter and buffer in the graph → the expressions of its dimensions."""
        return {name: self.dims[placeholder] for placeholder, name in self.weights.items()}


def _read(node: fx.Node) -> Container[int]:
    """The positions of those of an operator's outputs that something reads."""
    values = node.meta["val"]
    if not isinstance(values, list | tuple):
        return (0,)
    apart = all(user.target is operator.getitem for user in node.users) and all(isinstance(v, Tensor) for v in values)
    return {cast(int, user.args[1]) for user in node.users} if apart else range(len(values))


def listed(dims: Dims | list[Dims]) -> list[Dims]:
    return dims if isinstance(dims, list) else [dims]
