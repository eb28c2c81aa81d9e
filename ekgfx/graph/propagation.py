"""The one pass of the rules over a graph: an expression for every dimension of every tensor."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from ekgfx.axes import Axis, Dims, freeze, unify
from ekgfx.graph.nodes import bind, op_name, owner
from ekgfx.graph.returns import Returns
from ekgfx.graph.ways import Way
from ekgfx.rules import Call, Effect, Rule, lookup, unknown
from ekgfx.rules.applied import applied
from ekgfx.rules.registry import TensorDims, ours


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


@dataclass(frozen=True)
class Known:
    """What is known of a graph's placeholders before the pass.

    weights: placeholder → qualified name. constants: placeholders of tensor constants. batch: leading size that all
    inputs share, 0 for none. rules: for the operators of these names, before those that are registered.
    """

    weights: Mapping[str, str]
    constants: Mapping[str, Tensor]
    batch: int
    way: Way
    returns: Returns | None
    rules: Mapping[str, Rule]


class Propagation:
    """The pass, and what it found.

    Args:
        graph: functional.
        known: of its placeholders.
        shared: dimensions of weights by name that other graphs have met already; those met here are added.

    Attributes:
        operations: the operators in order.
        tensors: the dimensions of each tensor that a node returns, always a list.
        dims: the dimensions of every node that is one tensor.
        batch: the batch's axis, of size 0 where there is none.
        unknown_ops, failed_rules, uncounted_ops: operators without a rule, with one that does not hold, and with one
            that does not say what it costs.
    """

    def __init__(self, graph: fx.Graph, known: Known, shared: dict[str, Dims]) -> None:
        self.known, self.shared = known, shared
        self.unknown_ops: dict[str, int] = {}
        self.failed_rules: dict[str, str] = {}
        self.uncounted_ops: dict[str, int] = {}
        self.batch = Axis(0, "batch", frozen="batch dimension", batch=True)
        self.tensors: dict[str, list[Dims]] = {}
        self.dims: dict[str, Dims] = {}
        self.operations: list[Operation] = []
        self._summed: dict[str, Dims] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                self._returns(node, [self._placeholder(node)])
            elif node.op == "call_function":
                self._operation(node)
            elif node.op == "output":
                self._outputs(node)

    def _returns(self, node: fx.Node, outputs: list[Dims], several: bool = False) -> None:
        """What the tensors are that a node returns. several: as a list, of which others read the elements."""
        self.tensors[node.name] = outputs
        if not several:
            self.dims[node.name] = outputs[0]

    def _outputs(self, node: fx.Node) -> None:
        """What the model returns stays; what it writes to a buffer has the buffer's dimensions."""
        values, updates = cast(list[Any], node.args[0]), node.meta.get("updates", {})
        way, returns, weights = self.known.way, self.known.returns, self.known.weights
        for out in values if returns is None else returns.mattering(values):
            if isinstance(out, fx.Node) and out not in updates:
                for dims in self.tensors.get(out.name, ()):
                    for dim in dims:
                        freeze(dim, "output of the model" if way == Way() else f"output of the model in {way}")
        for value, buffer in ((value, buffer) for value, buffer in updates.items() if buffer is not None):
            for old, new in zip(self.dims[buffer.name], self.dims[value.name], strict=True):
                unify(old, new, f"update of {weights.get(buffer.name, buffer.name)}")

    def _placeholder(self, node: fx.Node) -> Dims:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return ()
        shape = tuple(value.shape)
        if node.name in self.known.weights:
            name = self.known.weights[node.name]
            return self.shared.setdefault(name, tuple(Axis(n, f"{name} dim {d}") for d, n in enumerate(shape)))
        if node.name in self.known.constants:
            return tuple(Axis(n, node.name, frozen=f"constant {node.name}") for n in shape)
        inputs = tuple(Axis(n, node.name, frozen=f"input {node.name}", example=True) for n in shape)
        if shape and shape[0] == self.known.batch:
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
        rule = self.known.rules.get(call.op) or lookup(node.target)
        effect = self._effect(call, rule)
        if effect.macs is None and rule is not None and self._multiplies(node, rule, effect):
            self.uncounted_ops[call.op] = self.uncounted_ops.get(call.op, 0) + 1
        self.operations.append(Operation(node, args, call, effect))
        self._summed[node.name] = effect.summed
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
        weights = (n for n in node.all_input_nodes if n.name in self.known.weights and len(self.dims[n.name]) > 1)
        return not ours(rule) and not effect.carries and next(weights, None) is not None

    def _symbolic(self, value: Any) -> Any:
        """An argument with every fx Node in it replaced by the dimensions of its tensor."""
        if isinstance(value, fx.Node):
            if value.name not in self.tensors:
                return None
            if value.name not in self.dims:
                return [TensorDims(dims) for dims in self.tensors[value.name]]
            said = TensorDims(self.dims[value.name])
            said.summed = self._summed.get(value.name, ())
            said.mask = getattr(value.meta.get("val"), "dtype", None) is torch.bool
            return said
        if isinstance(value, list | tuple):
            return [self._symbolic(v) for v in value]
        return value


def _read(node: fx.Node) -> frozenset[int]:
    """The positions of those of an operator's outputs that something reads."""
    values = node.meta["val"]
    if not isinstance(values, list | tuple):
        return frozenset({0})
    apart = all(user.target is operator.getitem for user in node.users) and all(isinstance(v, Tensor) for v in values)
    return frozenset(cast(int, user.args[1]) for user in node.users) if apart else frozenset(range(len(values)))
