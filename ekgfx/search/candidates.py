"""The candidates of a search step (Φ of the paper) and the filter that decides which are worth evaluating."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ekgfx.graph.plan import Plan
from ekgfx.search.otsu import trimmed_otsu


@dataclass(frozen=True)
class Proposal:
    """A sub-network one unit away from the current one: a group, or groups that are tied.

    group: the unit that shrinks. width: its new width ratio. plan: the new plan. removed: the channels taken away, of
    each of its groups. lost: the importance that goes with them.
    """

    group: str
    width: float
    plan: Plan
    removed: Mapping[str, tuple[int, ...]]
    lost: float


def important_first(kept: Sequence[int], scores: Tensor) -> list[int]:
    """Channels by descending importance; ties keep the lower channel first, as the authors do.

    scores: importance per channel of the uncut group.
    """
    importance = scores.tolist()
    return sorted(kept, key=lambda channel: (-importance[channel], channel))


def worth_evaluating(proposals: Sequence[Proposal], stake: Mapping[str, float]) -> tuple[list[Proposal], float | None]:
    """The proposals that lose little: at or below the trimmed-Otsu threshold over all of them, and that threshold.

    stake: the importance by which each group's candidate is judged. With few proposals nothing is filtered, and the
    threshold is None.
    """
    threshold = trimmed_otsu([stake[proposal.group] for proposal in proposals])
    if math.isinf(threshold):
        return list(proposals), None
    return [proposal for proposal in proposals if stake[proposal.group] <= threshold], threshold
