"""A functional graph of ATen operators with an expression for every dimension of every tensor.

Every operator's arguments are bound to their schema names, and the rules are run over the graph once.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from ekgfx.axes import Axis, Dims, axes, resolve
from ekgfx.errors import TraceError
from ekgfx.graph.copies import hold_copies
from ekgfx.graph.expansion import expand
from ekgfx.graph.functional import functionalize
from ekgfx.graph.in_place import overwritable, overwritable_with_gradients
from ekgfx.graph.liveness import last_reads
from ekgfx.graph.nodes import first_names, rename_modules
from ekgfx.graph.opaque import Leaves
from ekgfx.graph.propagation import Known, Operation, Propagation
from ekgfx.graph.returns import Returns
from ekgfx.graph.tables import is_table
from ekgfx.graph.unreached import hold_unreached
from ekgfx.graph.unseen import released, settle, unread
from ekgfx.graph.untouched import State
from ekgfx.graph.ways import Way
from ekgfx.rules import Rule

Example = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a model


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
        graph, program, self.decomposed = functionalize(program, decompose, updates=way != Way())
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

    def _propagate(self, shared: dict[str, Dims]) -> None:
        """The one pass of the rules over the graph."""
        batch = self.example_batch or self._leading_batch()
        found = Propagation(self.graph, self._known(batch), shared)
        self.batch, self.tensors, self.dims, self.operations = found.batch, found.tensors, found.dims, found.operations
        self.unknown_ops, self.failed_rules = found.unknown_ops, found.failed_rules
        self.uncounted_ops = found.uncounted_ops
        self.sizes_assumed = False
        self.checked_shapes: set[str] = set()  # of inputs, see sizes.check_shapes

    def _known(self, batch: int) -> Known:
        return Known(self.weights, self.constants, batch, self.way, self.returns, self.rules)

    def _leading_batch(self) -> int:
        """The leading size of an input that every output begins with, where inputs have several; 0 if none is so. The
        others may be tables, or hold one number."""
        (output,) = self.graph.find_nodes(op="output")
        values = output.args[0] if self.returns is None else self.returns.mattering(output.args[0])
        returned = [v for v in values if isinstance(v, fx.Node) and v not in output.meta.get("updates", {})]
        for size in {t.shape[0]: None for t in pytree.tree_leaves(self.example) if isinstance(t, Tensor) and t.ndim}:
            tensors = Propagation(self.graph, self._known(size), {}).tensors
            first = [dims[0] for value in returned for dims in tensors.get(value.name, ()) if dims]
            if size and first and all(any(axis.batch for axis in axes(dim)) for dim in first):
                return size
        return 0

    # -- what can be asked of it -----------------------------------------------------------------------------------

    @cached_property
    def example_batch(self) -> int:
        """Leading size shared by all tensor inputs; 0 if they share none (then no dimension counts as the batch)."""
        sizes = {t.shape[0] if t.ndim else 0 for t in pytree.tree_leaves(self.example) if isinstance(t, Tensor)}
        return sizes.pop() if len(sizes) == 1 else 0

    def returned(self, leaves: list[Any]) -> Any:
        """The model's output, from the values that its graph returns."""
        if self.returns is None:
            return pytree.tree_unflatten(leaves, self.out_spec)
        return self.returns.frame.filled(leaves)

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
