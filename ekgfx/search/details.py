"""Where the authors' program departs from the paper, as named options; `PAPER` is the default, `AUTHORS` their program.

They exist so that the program's recorded numbers can be compared with ours. Use `PAPER` for everything else:

- whole_group_filter: the program's candidate filter cuts the wrong axis of its score arrays. A group that was never
  pruned is judged by the importance of all its channels instead of those it would lose, and one that was pruned before
  always passes. Wide groups (the residual streams) are then never candidates, whatever their spare channels.
- batch_size: it divides the sum of losses over every batch by the nominal batch size, the smaller last batch included,
  so that its losses depend on how the data are cut into batches.
- rounded_last_width: its search for the last width rounds ratios to two decimals, which can add a channel and then stop
  one below the width it looked for, or two below.
- strict_best: it takes the highest reward, however little above another, and the first of equals.

Two more of its habits are no options. It counts 2·H·W·C for every BatchNorm on top of the MACs: pass
`cost=authors_cost(traced)`. Its history begins with the unpruned network's loss beside the last candidate's widths.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ekgfx.graph.cost import value_of
from ekgfx.graph.plan import Plan
from ekgfx.search.candidates import Proposal
from ekgfx.search.widths import WidthRule, last_width
from ekgfx.tracing.traced import TracedModel


@dataclass(frozen=True)
class Details:
    """Departures from the paper; see the module."""

    whole_group_filter: bool = False
    batch_size: int | None = None
    rounded_last_width: bool = False
    strict_best: bool = False

    def stake(self, scores: Tensor, proposal: Proposal, width: float) -> float:
        """The importance by which the filter judges a candidate: what it loses. width: of its group now."""
        if not self.whole_group_filter:
            return proposal.lost
        return float(scores.sum()) if width == 1.0 else 0.0

    def last_width(self, rule: WidthRule, width: float, kept: int, met: Callable[[int], bool]) -> float:
        """The width of the smallest reduction from `kept` channels that still reaches the budget.

        width: the next width, which overshoots the budget. met: whether a kept count is within it.
        """
        if self.rounded_last_width:
            return _rounded_last_width(rule, width, met)
        return last_width(range(rule.kept(width), kept, rule.align), met) / rule.size


PAPER = Details()
AUTHORS = Details(whole_group_filter=True, batch_size=256, rounded_last_width=True, strict_best=True)


def authors_cost(traced: TracedModel) -> Callable[[Plan], float]:
    """The authors' cost of a plan: MACs, and 2·H·W·C for every BatchNorm."""

    def cost(plan: Plan) -> float:
        norms = [op for op in traced.left_by(plan).operations if str(op.target).startswith("aten.batch_norm")]
        counts = {axis: len(kept) for axis, kept in traced.groups.kept(plan).items()}
        values = value_of([traced.dims[norm.name] for norm in norms], {**counts, traced.batch: 1})  # type: ignore[misc]
        return traced.cost(plan).macs + 2 * values

    return cost


def _rounded_last_width(rule: WidthRule, width: float, met: Callable[[int], bool], reach: float = 0.2) -> float:
    """The program's `fine_search`: widths from `width` upwards in units of 1/C, rounded to two decimals."""
    found = width
    for unrounded in np.arange(width, width + reach, 1 / rule.size):
        found = float(np.round(unrounded, 2))
        if not met(rule.kept(found)):
            return float(np.round(unrounded - 1 / rule.size, 5))
    return found
