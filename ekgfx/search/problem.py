"""What a search is asked: the model, the data, the budget, and which widths its groups may take."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ekgfx.axes import Axis, membership
from ekgfx.errors import BudgetError
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.blocks import Block
from ekgfx.graph.groups import ChannelGroup
from ekgfx.graph.plan import Plan
from ekgfx.graph.ties import Ties
from ekgfx.search.result import Measure
from ekgfx.search.reward import Evaluation, Knowledge, Objective, ValidationBatch
from ekgfx.search.widths import WidthRule
from ekgfx.tracing.traced import TracedModel


@dataclass(frozen=True)
class Budget:
    """How much of a cost may stay. cost: of a plan, in any unit; unit: its name; keep: target fraction of `full`, the
    cost of the unpruned model. weighed: whether a step of the search weighs what a candidate loses against the cost
    that it saves (see `ekgfx.search.ranking.ranking_of`). parts: where several budgets must hold, each of them."""

    cost: Callable[[Plan], float]
    full: float
    keep: float
    unit: str
    weighed: bool = False
    parts: tuple["Budget", ...] = ()

    @classmethod
    def all_of(cls, parts: Sequence["Budget"]) -> "Budget":
        """All of several budgets: the cost is that of the part which is furthest beyond its target, in the scale of the
        tightest one, so that the unpruned model has cost 1 and each part holds where this holds."""
        if len(parts) == 1:
            return parts[0]
        keep = min(part.keep for part in parts)

        def cost(plan: Plan) -> float:
            return keep * max(part.fraction(plan) / part.keep for part in parts)

        unit = " and ".join(part.unit for part in parts)
        return cls(cost, 1.0, keep, unit, any(part.weighed for part in parts), tuple(parts))

    @classmethod
    def of(
        cls, cost: Callable[[Plan], float], keep: float, unit: str, *, full: float | None = None, weighed: bool = False
    ) -> "Budget":
        """full: None asks `cost`. Raises BudgetError for a target that is no fraction."""
        if not 0 < keep <= 1:
            hint = f"; did you mean {keep / 100:g}?" if 1 < keep <= 100 else ""
            raise BudgetError(f"the budget is the fraction of {unit} that is kept, in (0, 1], not {keep:g}{hint}")
        return cls(cost, cost(Plan()) if full is None else full, keep, unit, weighed)

    def fraction(self, plan: Plan) -> float:
        """Cost of a plan over that of the unpruned model."""
        return self.cost(plan) / self.full

    def met(self, plan: Plan) -> bool:
        """Whether the plan is within the budget."""
        return self.fraction(plan) <= self.keep


@dataclass(frozen=True)
class Computing:
    """How candidates are computed; what is found does not depend on it, but for the rounding of the last two.

    cache: bytes for values of the current network that its candidates go on from. early_stop: whether a candidate that
    cannot be among the best any more is left. amp: half precision to compute in. channels_last: memory format.
    """

    cache: int = 2 << 30
    early_stop: bool = False
    amp: Literal["bf16", "fp16"] | None = None
    channels_last: bool = False

    @property
    def dtype(self) -> torch.dtype | None:
        """The half precision as torch names it."""
        return {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]

    def prepared(self, batch: ValidationBatch) -> ValidationBatch:
        """A batch in the memory format that is computed in."""
        if not self.channels_last:
            return batch
        return batch._replace(inputs=batch.inputs.channels_last())


DROP = "drop "
"""How the unit that is a block is named: `drop layer1.1`."""


@dataclass(frozen=True)
class Problem:
    """A search, before it starts.

    rules: the widths of every unit that may shrink, by name: a group, or groups that are tied. members: of a unit of
    several groups, each with the channels that go with one of its positions. batches: validation data, empty where the
    strategy needs none. ensemble: whether the knowledge follows the accepted sub-networks (eq. 8). guided: whether the
    reward has a knowledge term at all. rescale: cut kernels keep their norm. computing: how candidates are computed.
    seed: of what is drawn at random. unpruned: T₀ = O(D_val; Θ₀), once it is known. blocks: the residual blocks that
    may be dropped, as units of their own (`DROP`).
    """

    traced: TracedModel
    batches: Sequence[ValidationBatch]
    objective: Objective
    budget: Budget
    rules: Mapping[str, WidthRule]
    guided: bool
    ensemble: bool
    rescale: bool
    computing: Computing = Computing()
    seed: int = 0
    unpruned: Knowledge = ()
    members: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    blocks: Mapping[str, Block] = field(default_factory=dict)

    def at(self, plan: Plan) -> "Problem":
        """The same problem where a plan has led, with the groups and blocks that are still there."""
        left = self.traced.left_by(plan)
        if left is self.traced:
            return self
        here = {unit: [group for group in self.of(unit) if group in left.groups] for unit in self.rules}
        nodes = {operation.name for operation in left.operations}
        return replace(
            self,
            traced=left,
            rules={unit: rule for unit, rule in self.rules.items() if here[unit]},
            members={unit: {g: n for g, n in those.items() if g in here[unit]} for unit, those in self.members.items()},
            blocks={unit: block for unit, block in self.blocks.items() if block.output in nodes},
        )

    def full(self) -> Plan:
        """Θ₀ as a plan."""
        traced = self.traced
        return Plan(structure=traced.groups.digest, rescale=self.rescale, **traced.options)

    def kept(self, plan: Plan, group: str) -> tuple[int, ...]:
        """The channels that `group` keeps under a plan."""
        return plan.kept.get(group) or tuple(range(self.traced.groups[group].size))

    def of(self, unit: str) -> Mapping[str, int]:
        """The groups of a unit, each with the channels that go with one of its positions."""
        return self.members.get(unit, {unit: 1})

    @property
    def groups(self) -> list[str]:
        """All groups that may shrink, in the order of the units."""
        return [group for unit in self.rules for group in self.of(unit)]

    def cuts(self, unit: str) -> frozenset[Axis] | Block:
        """The axes that a unit cuts, or the block that it is."""
        return self.blocks[unit] if unit in self.blocks else self.axes(unit)

    def axes(self, unit: str) -> frozenset[Axis]:
        """The axes that a unit cuts."""
        return frozenset(self.traced.groups[group].axis for group in self.of(unit))

    def positions(self, plan: Plan, unit: str) -> int:
        """How many positions of a unit a plan keeps: as many as all of its groups have channels for."""
        return min(len(self.kept(plan, group)) // step for group, step in self.of(unit).items())

    def cut(self, plan: Plan, unit: str, orders: Mapping[str, Sequence[int]], positions: int) -> Plan:
        """The plan with so many positions of a unit. orders: the channels of each of its groups, the best first."""
        for group, step in self.of(unit).items():
            plan = plan.with_kept(group, orders[group][: positions * step])
        return plan

    @property
    def at_once(self) -> Knowledge | None:
        """What a strategy of one step compares with: nothing, and the labels decide; T₀ for a reward of the user's own,
        which may know nothing else."""
        return self.unpruned if self.guided and self.objective.reward is not None else None

    def network(self, plan: Plan) -> SubNetwork:
        """The sub-network of a plan, with batch statistics in its BatchNorms."""
        left = self.traced.left_by(plan)
        return SubNetwork(
            left,
            left.groups.kept(plan),
            batch_stats=True,
            rescale=self.rescale,
            amp=self.computing.dtype,
            channels_last=self.computing.channels_last,
        )

    def measure(self, plan: Plan, evaluation: Evaluation | None) -> Measure:
        """An evaluation together with the plan's cost."""
        cost = self.traced.cost(plan)
        if evaluation is None:
            return Measure(None, None, None, cost.macs, cost.params)
        return Measure(evaluation.loss, evaluation.reward, evaluation.accuracy, cost.macs, cost.params)

    def check_reachable(self) -> None:
        """BudgetError when nothing can shrink, or when shrinking everything is not enough; says how far it can go."""
        if not (self.rules or self.blocks):
            if self.traced.groups:
                raise BudgetError(
                    f"ignore leaves nothing to prune of the {len(self.traced.groups)} groups: a group is ignored where "
                    "one of its layers is, also one that reads it; `ekgfx groups MODEL` lists the layers of each"
                )
            reasons = sorted({place.reason for place in self.traced.groups.frozen})
            why = f" (frozen: {'; '.join(reasons[:3])})" if reasons else ""
            raise BudgetError(f"nothing can be pruned in this model{why}; `ekgfx groups MODEL --why` shows every axis")
        least = self.full()
        for name, rule in self.rules.items():
            orders = {group: range(self.traced.groups[group].size) for group in self.of(name)}
            least = self.cut(least, name, orders, rule.minimum)
        least = replace(least, dropped=tuple(block.name for block in self.blocks.values()))
        for budget in self.budget.parts or (self.budget,):
            if budget.met(least):
                continue
            raise BudgetError(
                f"cannot keep only {budget.keep:.1%} of the {budget.unit}: with every group at its least "
                f"width {budget.fraction(least):.1%} are left; raise the budget, lower align or min_width, or "
                "ignore fewer groups"
            )


def width_rules(traced: TracedModel, ignored: frozenset[str], align: int, min_width: float) -> dict[str, WidthRule]:
    """The widths every group may take, groups in `ignored` left out.

    align: in channels of the tensors, not positions of the group: one head of 64 channels is aligned to 8 as it is.
    """
    return {
        group.name: WidthRule.of(
            group.size, len(group.producers), align // math.gcd(align, channels_per_position(traced, group)), min_width
        )
        for group in traced.groups.values()
        if group.name not in ignored
    }


def tied_rules(
    traced: TracedModel, ties: Ties, ignored: frozenset[str], align: int, min_width: float
) -> tuple[dict[str, WidthRule], dict[str, Mapping[str, int]]]:
    """The widths of every unit (see `width_rules`), and the groups of those that have several. Where a group of a tie
    is ignored, the others keep all as well."""
    held = {*ignored, *ties.held}
    for tie in ties.ties:
        held |= {*tie.members} if held & {*tie.members} else set()
    rules = width_rules(traced, frozenset(held), align, min_width)
    members = {tie.name: tie.members for tie in ties.ties if tie.name in rules}
    for name, steps in members.items():
        groups = [traced.groups[group] for group in steps]
        each = [align // math.gcd(align, steps[g.name] * channels_per_position(traced, g)) for g in groups]
        producers = sum(len(group.producers) for group in groups)
        rules[name] = WidthRule.of(groups[0].size // steps[name], producers, math.lcm(*each), min_width)
        for other in steps.keys() - {name}:
            del rules[other]
    return rules, members


def channels_per_position(traced: TracedModel, group: ChannelGroup) -> int:
    """Neighbouring channels that stand or fall with one position of the group in all its tensors: 1 for plain channels,
    head_dim for heads, channels per group for the groups of a convolution."""
    dims = traced.weight_dims()
    return math.gcd(*(_run_length(membership(dims[p.parameter][p.dim], group.axis)) for p in group.places))


def _run_length(index: torch.Tensor) -> int:
    """Greatest common length of the runs of one channel in a dimension's index."""
    _, lengths = torch.unique_consecutive(index[index >= 0], return_counts=True)
    return math.gcd(*lengths.tolist())
