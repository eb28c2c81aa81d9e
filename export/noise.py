"""How much of a difference between two latencies is noise?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Stretches of neighbouring rounds that are resampled together, see `compare`.
_BLOCKS = 20
# Below this the bootstrap has too few values to draw from to mean anything.
FEWEST_ROUNDS = 10
_RESAMPLES = 1000


@dataclass(frozen=True)
class Ratio:
    """How many times faster something is than the reference: median / median, with its 95% confidence interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "faster", "slower", or "no difference" when the interval holds 1."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference"


def compare(reference: Sequence[float], other: Sequence[float]) -> Ratio:
    """The ratio of two medians of timings taken in turn: reference[i] and other[i] are neighbours in time.

    The interval is a circular block bootstrap over the rounds (Politis & Romano 1992): whole stretches of rounds are
    drawn with replacement, with both timings of each round kept together. What slows both sides down alike cancels, and
    disturbances that last for several rounds (another process, a clock that steps) widen the interval as they should;
    treating every timing as independent would make it far too narrow. The random numbers are fixed, so equal timings
    give equal intervals.
    """
    first, second = np.asarray(reference, dtype=float), np.asarray(other, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"the timings must come in pairs, but there are {first.size} and {second.size}")
    if first.size < FEWEST_ROUNDS:
        raise ValueError(f"{first.size} rounds say nothing about their noise; take at least {FEWEST_ROUNDS}")
    rounds = first.size
    length = -(-rounds // _BLOCKS)
    starts = np.random.default_rng(0).integers(0, rounds, size=(_RESAMPLES, -(-rounds // length)))
    index = ((starts[..., None] + np.arange(length)) % rounds).reshape(_RESAMPLES, -1)[:, :rounds]
    ratios = np.median(first[index], axis=1) / np.median(second[index], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Ratio(float(np.median(first) / np.median(second)), float(low), float(high))
