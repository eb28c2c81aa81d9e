"""Operator by operator: measure what it lacks, refit it, go on with what it computes now."""

import math
import time
from collections.abc import Callable, Sequence

from ekgfx.repair.operators import LinearOperator, shifted
from ekgfx.repair.progress import Progress
from ekgfx.repair.solve import Refit, refit
from ekgfx.repair.walk import LayerRepair, Pair, Walk


def repair_operators(
    walk: Walk,
    operators: Sequence[LinearOperator],
    progress: Progress,
    on_layer: Callable[[LayerRepair, int, int], None],
) -> list[LayerRepair]:
    """Refits one operator after the other; returns what was done.

    A weight that is used several times is refitted at each use, to what this use and those before it lack.
    """
    operators = sorted(operators, key=lambda operator: walk.order[operator.node])
    first, done, weights = progress.load()
    if weights:
        walk.take({name: tensor.to(walk.pruned.weights[name]) for name, tensor in weights.items()})
    pending: dict[LinearOperator, Pair] = {}
    uses = {operator: [o for o in operators if o.entries.same(operator.entries)] for operator in operators}
    for number in range(first, len(operators)):
        operator, start = operators[number], time.monotonic()
        shared = uses[operator]
        pair = walk.measure(operator, number, pending.pop(shared[0], None))
        if not pair.exact:
            found = refit(pair.fit, pair.held, operator.offset is not None)
            if found is not None:
                walk.take(shifted(operator, walk.pruned.weights, found.change, found.offset))
            if len(shared) > 1 and found is not None:
                pair.fit.shift_rest(found.change, found.offset)
                pair.held.shift_rest(found.change, found.offset)
                walk.rewind()
            done.append(_record(operator.name, pair, found, time.monotonic() - start))
            on_layer(done[-1], number + 1, len(operators))
        if operator is not shared[-1]:
            pending[shared[0]] = pair
        if not pending:
            progress.save(number + 1, done, walk.pruned.weights)
    return done


def _record(name: str, pair: Pair, found: Refit | None, seconds: float) -> LayerRepair:
    before = float(pair.held.squares.sum()) / (pair.held.scale or 1.0)
    return LayerRepair(
        name,
        found.held_before if found else before,
        found.held_after if found else before,
        "nothing" if found is None else "offset" if found.ridge == math.inf else "refit",
        None if found is None or found.ridge == math.inf else found.ridge,
        pair.fit.count,
        round(seconds, 3),
        pair.stream,
    )
