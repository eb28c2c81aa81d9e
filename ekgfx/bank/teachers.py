"""Which interim sub-networks teach (eq. 10)."""

from collections.abc import Sequence

import numpy as np


def pick_teachers(losses: Sequence[float], teachers: int = 5) -> list[int]:
    """Indices of K = `teachers` sub-networks whose losses are spread evenly, the best first (eq. 10).

    losses: of Θ₀, Θ₁, … up to the step before the last (the final sub-network is no teacher). For k = 0…K−1, the one
    whose loss is nearest to min + k·(max − min)/K and not taken yet; the lower loss, then the older, where two are
    equally near. With fewer sub-networks than teachers all are taken.
    """
    values = np.asarray(losses, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    low, high = values.min(), values.max()
    picked: list[int] = []
    for k in range(min(teachers, len(values))):
        left = [int(i) for i in order if i not in picked]
        target = low + k * (high - low) / teachers
        picked.append(min(left, key=lambda i: abs(values[i] - target)))
    return picked
