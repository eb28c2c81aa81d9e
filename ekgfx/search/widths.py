"""Widths of a group: what a width ratio keeps, the next width, the last width before the budget.

A group of C channels with width ratio w in (0, 1] keeps the channels whose rank by descending importance is below
max(C·w, 1), that is max(⌈C·w⌉, 1) of them. With an alignment A (channels per tile of the target hardware) the count is
rounded up to a multiple of A, and A is the least that is kept. A group narrower than A is not aligned.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ROUND = 1e-6
"""Channels: a product C·w this close above an integer is that integer (0.6·5 = 3.0000000000000004 keeps 3)."""


@dataclass(frozen=True)
class WidthRule:
    """The widths one group may take.

    size: C, the channels of the unpruned group. producers: n_l, the layers that produce them. align: the kept count is
    a multiple of this (or C itself). minimum: the least kept count, a multiple of `align` unless it is C.
    """

    size: int
    producers: int = 1
    align: int = 1
    minimum: int = 1

    @classmethod
    def of(cls, size: int, producers: int = 1, align: int = 1, min_width: float = 0.0) -> "WidthRule":
        """The rule of a group of `size` channels under the user's alignment (channels) and least width (ratio)."""
        align = align if size >= align else 1
        return cls(size, max(1, producers), align, _round_up(max(size * min_width, 1), align, size))

    def kept(self, width: float) -> int:
        """Channels that width ratio `width` keeps: max(⌈C·w⌉, 1), rounded up to the alignment, at most C."""
        return max(_round_up(self.size * width, self.align, self.size), self.minimum)

    def next_width(self, width: float, step: float) -> float:
        """w_l − r_l with r_l = max(1/C_l, r/n_l); in units of the alignment where there is one. Never below 0."""
        return max(round(width - max(self.align / self.size, step / self.producers), 9), 0.0)


def last_width(counts: Sequence[int], met: Callable[[int], bool]) -> int:
    """The smallest reduction that still reaches the budget: the largest kept count that is within it.

    counts: allowed kept counts, ascending; the first is known to be within the budget. met: whether a count is; larger
    counts cost more. Source: the paper's search step, "in units of 1/C".
    """
    within, beyond = 0, len(counts)
    while beyond - within > 1:
        middle = (within + beyond) // 2
        within, beyond = (middle, beyond) if met(counts[middle]) else (within, middle)
    return counts[within]


def _round_up(channels: float, align: int, size: int) -> int:
    return min(math.ceil((channels - _ROUND) / align) * align, size)
