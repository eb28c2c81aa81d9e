"""A model that was traced: its graphs, and the questions that can be asked of them."""

import copy
from functools import cached_property
from html import escape
from typing import Any

from torch import nn

from ekgfx.base.units import human, several
from ekgfx.errors import PlanError, TraceError
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.cost import Cost, Products, cost_of, mac_table, value_of
from ekgfx.graph.dropped import Blocks, blocks_of, without
from ekgfx.graph.groups import Groups, find_groups, left_of
from ekgfx.graph.plan import Plan
from ekgfx.graph.untouched import State, differing, state_of
from ekgfx.rules.registry import passing

MOST_WITHOUT = 64
"""Sets of blocks without which a model is remembered: a step of a search asks for one after the other."""


class TracedModel(AxisGraph):
    """A traced model: its axis graphs, and the questions that can be asked of it.

    Attributes:
        notes: what a user should know of what was not seen, one sentence each.
        trains: the model was seen to run in training mode.
        dropped: residual blocks that are identities here.

    Example:
        >>> traced = ekgfx.trace(model, images)
        >>> print(traced.groups, traced.cost(plan), traced.subnetwork(plan)(images).shape)
    """

    notes: tuple[str, ...] = ()
    trains: bool = False
    dropped: frozenset[str] = frozenset()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The places of the outputs that matter; none named where all do."""
        return () if self.returns is None else self.returns.choice

    @cached_property
    def groups(self) -> Groups:
        """The channel groups; one for every free axis of a parameter, with all places that it cuts."""
        return find_groups(self, self._mac_table)

    def __repr__(self) -> str:
        cost = self.cost()
        return (
            f"TracedModel({type(self.model).__name__}: {several(len(self.groups), 'group')}, {human(cost.macs)} MACs, "
            f"{human(cost.params)} parameters)"
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{self.groups._repr_html_()}"

    @cached_property
    def unknown_costs(self) -> dict[str, int]:
        """Operator without a rule → how many parameters more would lie in tensors that some group cuts, if it passed
        positions on: what a rule for it can bring. What others hold as well is not counted."""
        here = self.prunable_parameters()
        return {op: self.assuming({op: passing}).prunable_parameters() - here for op in self.unknown_ops}

    def cost(self, plan: Plan | None = None) -> Cost:
        """MACs per sample and parameters of the (sub-)network, from the expressions alone.

        Args:
            plan: what is kept; None for the whole network.

        Raises:
            PlanError: the plan is for another model.
        """
        left = self.left_by(plan)
        counts = {axis: len(kept) for axis, kept in self.groups.kept(plan).items()}
        return cost_of(left, left._mac_table, counts)

    @property
    def entire(self) -> "TracedModel":
        """The same model with the blocks that were dropped."""
        return self.whole if isinstance(self.whole, TracedModel) else self

    @cached_property
    def blocks(self) -> Blocks:
        """The residual blocks that a plan may drop, by name."""
        return blocks_of(self)

    def left_by(self, plan: Plan | None) -> "TracedModel":
        """The same model without the blocks that a plan drops; itself where it drops none.

        Raises PlanError where the model has no such block.
        """
        names = frozenset(plan.dropped) if plan is not None else frozenset()
        if names <= self.dropped:
            return self
        if names not in self._without:
            left = without(self, self.blocks, names)
            left.dropped = names
            vars(left)["groups"] = left_of(self.groups, left)
            if len(self._without) >= MOST_WITHOUT:
                self._without.pop(next(iter(self._without)))
            self._without[names] = left
        return self._without[names]

    def bypassed(self, plan: Plan) -> dict[str, str]:
        """Operators that return one of their arguments where a plan drops blocks, with that argument's name."""
        found: dict[str, str] = {}
        for block in (self.blocks[name][0] for name in self.left_by(plan).dropped):
            if block is not None:
                found |= {block.output: "self", block.join: block.trunk}
        return found

    @cached_property
    def _without(self) -> dict[frozenset[str], "TracedModel"]:
        """What was left by the plans that were asked for last."""
        return {}

    def layer_macs(self, plan: Plan | None = None) -> dict[str, int]:
        """Module → MACs per sample of the operators in it (not in its submodules), in the order of the graph."""
        left = self.left_by(plan)
        counts = {axis: len(kept) for axis, kept in self.groups.kept(plan).items()}
        counts[self.batch] = 1
        total: dict[str, int] = {}
        for operation in self.operations:
            if operation.name in self._mac_table:
                macs = value_of(left._mac_table.get(operation.name, []), counts)
                total[operation.module] = total.get(operation.module, 0) + macs
        return total

    @property
    def options(self) -> dict[str, Any]:
        """What a plan must know of how the model was traced."""
        also = len({graph.way.number for graph in self.others} - {0})
        return {"leaf": tuple(self.leaves), "unused": self.unused, "also": also, "outputs": self.outputs}

    def changed(self, model: nn.Module) -> State:
        """What the modules of `model` (this one, or another built the same way) have otherwise than these had when they
        were traced: caches filled since then, or for other sizes."""
        return differing(state_of(model), self.state)

    def rebound(self, model: nn.Module) -> "TracedModel":
        """The same graphs over the weights of another module that was built the same way.

        Raises PlanError where the other has not all of the weights, or has them in other shapes.
        """
        other = copy.copy(self)
        vars(other).pop("_without", None)
        other.model, other.others = model, tuple(map(copy.copy, self.others))
        for graph in other.others:
            graph.model = model
        named = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
        for name, dims in self.weight_dims().items():
            shape, found = tuple(dim.size for dim in dims), named.get(name)
            if found is None or tuple(found.shape) != shape:
                has = "no" if found is None else f"{tuple(found.shape)} as"
                raise PlanError(
                    f"the traced model is another one than this {type(model).__name__}, which has {has} {name!r} "
                    f"(traced: {shape}); trace the model that is pruned"
                )
        return other

    @cached_property
    def _mac_table(self) -> dict[str, Products]:
        return mac_table(self)

    def subnetwork(self, plan: Plan | None = None, *, batch_stats: bool = False, rescale: bool = False) -> SubNetwork:
        """The network that a plan leaves, as the graph on sliced weights, without a cut (`SubNetwork`).

        Args:
            plan: what is kept; None for the whole network.
            batch_stats: whether BatchNorm takes the statistics of each batch instead of its running averages.
            rescale: whether cut kernels keep the Frobenius norm of the uncut ones.

        Raises:
            PlanError: the plan is for another model.
        """
        return SubNetwork(self.left_by(plan), self.groups.kept(plan), batch_stats=batch_stats, rescale=rescale)


def check_traced(value: object, caller: str) -> None:
    """TraceError where `value` is no traced model, but the model itself, say."""
    if not isinstance(value, TracedModel):
        raise TraceError(
            f"{caller} takes a traced model, not a {type(value).__name__}: traced = ekgfx.trace(model, example_inputs)"
        )
