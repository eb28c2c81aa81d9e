"""The candidate filter's threshold: Otsu's method on a trimmed, sorted list."""

import math
from collections.abc import Sequence

import numpy as np

FEWEST = 3
"""Values that must be left after trimming: with fewer there are no two classes to tell apart."""


def trimmed_otsu(values: Sequence[float], trim: float = 0.2) -> float:
    """The value that best separates `values` into low and high; infinity where there are too few to say.

    Sort, drop ⌈trim·n⌉ values at both ends, take the cut t that maximises the between-class variance
    w₀w₁(m₀ − m₁)², and return the middle between the two neighbours of the cut. As in the authors' program the high
    class holds at least two values.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    drop = math.ceil(trim * len(ordered))
    kept = ordered[drop : len(ordered) - drop]
    if len(kept) < FEWEST:
        return math.inf
    low = np.arange(1, len(kept) - 1)
    sums = np.cumsum(kept)[low - 1]
    high = len(kept) - low
    between = low * high * (sums / low - (kept.sum() - sums) / high) ** 2
    cut = int(low[np.argmax(between)])
    return float((kept[cut - 1] + kept[cut]) / 2)
