"""Operator by operator: measure what it lacks, refit it, go on with what it computes now."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from ekgfx.repair.operators import LinearOperator, shifted
from ekgfx.repair.progress import Progress
from ekgfx.repair.solve import Change, Refit, refit, step
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
        walk.take(*({name: t.to(walk.pruned.weights[name]) for name, t in part.items()} for part in weights))
    pending: dict[LinearOperator, Pair] = {}
    uses = {operator: [o for o in operators if o.entries.same(operator.entries)] for operator in operators}
    for number in range(first, len(operators)):
        operator, start = operators[number], time.monotonic()
        shared = uses[operator]
        pair = walk.measure(operator, number, pending.pop(shared[0], None))
        if not pair.exact:
            found, whole = fitted(walk, operator, number, pair, alone=len(shared) == 1)
            if found is not None and whole is not None:
                own = walk.pruned.weights
                walk.take(
                    shifted(operator, own, found.change, found.offset), shifted(operator, own, *whole, into=walk.whole)
                )
            if len(shared) > 1 and found is not None:
                pair.fit.shift_rest(found.change, found.offset)
                pair.held.shift_rest(found.change, found.offset)
                walk.rewind()
            done.append(_record(operator.name, pair, found, time.monotonic() - start))
            on_layer(done[-1], number + 1, len(operators))
        if operator is not shared[-1]:
            pending[shared[0]] = pair
        if not pending:
            progress.save(number + 1, done, (walk.pruned.weights, walk.whole))
    return done


def fitted(
    walk: Walk, operator: LinearOperator, number: int, pair: Pair, alone: bool
) -> tuple[Refit, Change] | tuple[None, None]:
    """The operator's refit; and what it is on all images, with the λ that those chose that were not fitted.

    Where an activation behind hides a part of what is lacking, the equation is solved again for the rest, and the
    images that were not fitted choose which solution is taken. alone: no other operator has the same weight.
    """
    asked = operator.offset is not None
    found = refit(pair.fit, pair.held, asked)
    if found is None:
        return None, None
    own = found.change, found.offset
    whole = step(pair.whole, found.ridge, asked) or own
    seen = walk.passed_on(operator, number, pair, None, held=True) if alone else None
    if seen is None or found.ridge == math.inf:
        return found, whole
    lacking = walk.passed_on(operator, number, pair, own, held=False)
    assert lacking is not None  # as there was before
    again, again_whole = (
        _sum(own, step(moments, found.ridge, asked, found.change)) for moments in (lacking.fit, lacking.whole)
    )
    last = walk.passed_on(operator, number, pair, again, held=True)
    assert last is not None
    before, plain, after = (float(each.held.squares.sum()) for each in (seen, lacking, last))
    if not min(plain, after) < before:
        return None, None
    if after < plain:
        found, whole, plain = replace(found, change=again[0], offset=again[1]), again_whole, after
    scale = pair.held.scale or 1.0
    return replace(found, held_before=before / scale, held_after=plain / scale), whole


def _sum(change: Change, more: Change | None) -> Change:
    if more is None:
        return change
    offset = None if change[1] is None or more[1] is None else change[1] + more[1]
    return change[0] + more[0], offset


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
