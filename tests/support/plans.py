"""Plans that cut any network somehow."""

import random

import ekgfx


def random_plan(traced: ekgfx.TracedModel, seed: int) -> ekgfx.Plan:
    """Between one channel and all of every group, drawn by the seed."""
    rng = random.Random(seed)
    return ekgfx.Plan(
        {n: tuple(sorted(rng.sample(range(g.size), rng.randint(1, g.size)))) for n, g in traced.groups.items()}
    )
