"""A functional graph of ATen operators with an expression for every dimension of every tensor.

Every operator's arguments are bound to their schema names, and the rules are run over the graph once.
"""

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from ekgfx.axes import Axis, Dims, axes, freeze, resolve, unify
from ekgfx.errors import TraceError
from ekgfx.graph.copies import hold_copies
from ekgfx.graph.expansion import expand
from ekgfx.graph.functional import functionalize
from ekgfx.graph.in_place import overwritable, overwritable_with_gradients
from ekgfx.graph.liveness import last_reads
from ekgfx.graph.nodes import bind, first_names, op_name, owner, rename_modules
from ekgfx.graph.opaque import Leaves
from ekgfx.graph.returns import Returns
from ekgfx.graph.tables import is_table
from ekgfx.graph.unreached import hold_unreached
from ekgfx.graph.unseen import released, settle, unread
from ekgfx.graph.untouched import State
from ekgfx.graph.ways import Way
from ekgfx.rules import Call, Effect, Rule, lookup, unknown
from ekgfx.rules.applied import applied
from ekgfx.rules.registry import TensorDims, ours

Example = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a model


@dataclass(frozen=True)
class Operation:
    """One operator of the graph: its node, its arguments by schema name (tensors as fx Nodes), the call as its rule saw
    it (tensors as dimensions), and its effect."""

    node: fx.Node
    args: Mapping[str, Any]
    call: Call
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
        tensors: the dimensions of each tensor that a node returns, always a list.
        dims: the dimensions of every node that is one tensor.
        weights: placeholder name → qualified name of the parameter, buffer or table.
        tables: names of the weights that are plain tensors.
        constants: placeholder name → tensor constant.
        inputs: placeholder names of the user's inputs, in order.
        decomposed: PyTorch made the graph functional, so some operators are others than those that the model calls.
        leaves: the modules that run as they are, with their calls.
        state: what modules held beside weights when they were traced (caches, integers).
        returns: what the model returns, and which of it matters; None for a program that returns it as it is.
        unknown_ops: operators without a rule (or whose rule does not hold) → number of uses.
        uncounted_ops: operators that cost multiplications, but whose rule does not say how many → number of uses.
        failed_rules: those of them that have a rule → why it does not hold (its first failure).
        way: how the model was run for this graph.
        others: graphs of the same model run in other ways, over the same axes of its weights. What all of them say is
            in the groups; costs, importances and sub-networks are of this graph.
        unused: weights that no graph reads, and that nothing else does either, as the user says.
        unseen: further weights that no graph reads; dimensions that may meet them stay.
        dead: further weights that no graph reads and no code of the model names; nothing stays for their sake.
        could_be: what `prunable_parameters` would be if they did not.
        only: way → weights that the graph of this way reads and this graph does not.
        gone: weights that went with residual blocks (`ekgfx.graph.dropped`); whole: the same graph with these.
    """

    others: tuple["AxisGraph", ...] = ()
    gone: frozenset[str] = frozenset()
    whole: "AxisGraph | None" = None

    def __init__(
        self,
        model: nn.Module,
        program: torch.export.ExportedProgram,
        example: Example,
        leaves: Leaves | None = None,
        decompose: bool = False,
        state: State | None = None,
        returns: Returns | None = None,
        *,
        way: Way = Way(),  # noqa: B008  frozen
        others: Sequence["AxisGraph"] | None = (),
        unused: Sequence[str] = (),
    ) -> None:
        """others: None makes one of those graphs, which the first one starts."""
        self.model = model
        self.state = state or {}
        self.returns = returns
        self.leaves = leaves or Leaves()
        graph, program, self.decomposed = functionalize(program, decompose, way.training)
        self.graph = expand(graph)
        self.example, self.way = example, way
        self.in_spec = program.call_spec.in_spec
        self.out_spec = program.call_spec.out_spec
        self.weights: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.inputs: list[str] = []
        self.tables: set[str] = set()
        canonical = first_names(model.named_parameters(remove_duplicate=False))
        canonical |= first_names(model.named_buffers(remove_duplicate=False))
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
        self.dead: list[str] = []
        self.unused: tuple[str, ...] = ()
        if others is not None:
            self.others = tuple(others)
            self.unused = tuple(released(model, unused, unread(self.graphs)))
            self._start()

    @property
    def graphs(self) -> tuple["AxisGraph", ...]:
        """This graph and the others."""
        return (self, *self.others)

    def _start(self) -> None:
        shared: dict[str, Dims] = {}
        for graph in self.graphs:
            graph._propagate(shared)
        for graph in self.others:
            for op, uses in graph.unknown_ops.items():
                self.unknown_ops.setdefault(op, uses)
        hold_copies(self.graphs)
        hold_unreached(self.graphs)
        for graph in self.graphs:
            graph.batch = cast(Axis, resolve(graph.batch))  # one, where weights are as long as the batch
        self.only, self.unseen, self.could_be = settle(self)

    def assuming(self, rules: Mapping[str, Rule]) -> "AxisGraph":
        """The same graph analysed anew, with other rules for the operators of these names."""
        first, *others = (graph._blank(rules) for graph in self.graphs)
        first.others, first.unused = tuple(others), self.unused
        first._start()
        return first

    def _blank(self, rules: Mapping[str, Rule]) -> "AxisGraph":
        other = object.__new__(AxisGraph)
        for name in (
            *("model", "state", "leaves", "returns", "graph", "example", "way"),
            *("in_spec", "out_spec", "weights", "constants"),
        ):
            setattr(other, name, getattr(self, name))
        other.inputs, other.rules, other.tables = self.inputs, rules, self.tables
        return other

    # -- the one pass of the rules over the graph ------------------------------------------------------------------

    def _propagate(self, shared: dict[str, Dims]) -> None:
        self.unknown_ops: dict[str, int] = {}
        self.failed_rules: dict[str, str] = {}
        self.uncounted_ops: dict[str, int] = {}
        self.sizes_assumed = False
        self.checked_shapes: set[str] = set()  # of inputs, see sliced.check_shapes
        self.batch = Axis(0, "batch", frozen="batch dimension", batch=True)
        self.tensors: dict[str, list[Dims]] = {}
        self.dims: dict[str, Dims] = {}
        self.summed: dict[str, Dims] = {}
        self.operations: list[Operation] = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._returns(node, [self._placeholder(node, shared)])
            elif node.op == "call_function":
                self._operation(node)
            elif node.op == "output":
                values, updates = cast(list[Any], node.args[0]), node.meta.get("updates", {})
                for out in values if self.returns is None else self.returns.mattering(values):
                    if isinstance(out, fx.Node) and out not in updates:
                        self._output(out)
                for value, buffer in ((value, buffer) for value, buffer in updates.items() if buffer is not None):
                    for old, new in zip(self.dims[buffer.name], self.dims[value.name], strict=True):
                        unify(old, new, f"update of {self.weights.get(buffer.name, buffer.name)}")

    def _returns(self, node: fx.Node, outputs: list[Dims], several: bool = False) -> None:
        """What the tensors are that a node returns. several: as a list, of which others read the elements."""
        self.tensors[node.name] = outputs
        if not several:
            self.dims[node.name] = outputs[0]

    def _output(self, node: fx.Node) -> None:
        for dims in self.tensors.get(node.name, ()):
            for dim in dims:
                freeze(dim, "output of the model" if self.way == Way() else f"output of the model in {self.way}")

    def returned(self, leaves: list[Any]) -> Any:
        """The model's output, from the values that its graph returns."""
        if self.returns is None:
            return pytree.tree_unflatten(leaves, self.out_spec)
        return self.returns.frame.filled(leaves)

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
        inputs = tuple(Axis(n, node.name, frozen=f"input {node.name}", example=True) for n in shape)
        if shape and shape[0] == self.example_batch:
            self.batch.size = shape[0]
            return (self.batch, *inputs[1:])
        return inputs

    def _operation(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, i = cast(tuple[fx.Node, int], node.args)
            if source.name in self.tensors:
                self._returns(node, [self.tensors[source.name][i]])
            return
        shapes = [tuple(v.shape) for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        args = bind(node)
        if not shapes:
            return
        call = Call(
            op=op_name(node.target),
            args={name: self._symbolic(value) for name, value in args.items()},
            shapes=shapes,
            where=owner(node),
            read=_read(node),
        )
        rule = self.rules.get(call.op) or lookup(node.target)
        effect = self._effect(call, rule)
        if effect.macs is None and rule is not None and self._multiplies(node, rule, effect):
            self.uncounted_ops[call.op] = self.uncounted_ops.get(call.op, 0) + 1
        self.operations.append(Operation(node, args, call, effect))
        self.summed[node.name] = effect.summed
        self._returns(node, effect.outputs, isinstance(node.meta["val"], list | tuple))

    def _effect(self, call: Call, rule: Rule | None) -> Effect:
        """What the operator's rule says; where there is none, or it does not hold, nothing is known.

        Raises:
            RuleError: a rule that does not come with ekgfx failed by anything but a RuleError of its own.
        """
        said = applied(call, rule) if rule is not None else None
        if isinstance(said, Effect):
            return said
        self.unknown_ops[call.op] = self.unknown_ops.get(call.op, 0) + 1
        if said is None:
            return unknown(call)
        self.failed_rules.setdefault(call.op, said)
        return unknown(call, said)

    def _multiplies(self, node: fx.Node, rule: Rule, effect: Effect) -> bool:
        """Whether an operator is one that multiplies and adds up: by its rule, by PyTorch's own counter, or (for a rule
        that a user wrote) because it reads a matrix of weights and is not pointwise."""
        if effect.produces is not None or effect.sums or getattr(node.target, "overloadpacket", None) in flop_registry:
            return True
        weights = (n for n in node.all_input_nodes if n.name in self.weights and len(self.dims[n.name]) > 1)
        return not ours(rule) and not effect.carries and next(weights, None) is not None

    def _symbolic(self, value: Any) -> Any:
        """An argument with every fx Node in it replaced by the dimensions of its tensor."""
        if isinstance(value, fx.Node):
            if value.name not in self.tensors:
                return None
            if value.name not in self.dims:
                return [TensorDims(dims) for dims in self.tensors[value.name]]
            said = TensorDims(self.dims[value.name])
            said.summed = self.summed.get(value.name, ())
            said.mask = getattr(value.meta.get("val"), "dtype", None) is torch.bool
            return said
        if isinstance(value, list | tuple):
            return [self._symbolic(v) for v in value]
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
        return last_reads(self.graph.nodes)

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


def _read(node: fx.Node) -> frozenset[int]:
    """The positions of those of an operator's outputs that something reads."""
    values = node.meta["val"]
    if not isinstance(values, list | tuple):
        return frozenset({0})
    apart = all(user.target is operator.getitem for user in node.users) and all(isinstance(v, Tensor) for v in values)
    return frozenset(cast(int, user.args[1]) for user in node.users) if apart else frozenset(range(len(values)))
