"""Operator by operator: measure what it lacks, refit it, go on with what it computes now."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ekgfx.repair.operators import LinearOperator, shifted
from ekgfx.repair.progress import Progress
from ekgfx.repair.rows import Look, Pair
from ekgfx.repair.solve import Change, Refit, refit, step
from ekgfx.repair.span import restored
from ekgfx.repair.walk import LayerRepair, Walk

SHARES = (1.0, 0.5)
"""Of the step towards what an activation passes on, that are tried."""


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
        if len(shared) > 1 and operator is shared[0]:
            walk.mark(operator)
        look = walk.look(operator, number)
        if len(shared) == 1:
            look.basis = walk.span(look)
        pair = walk.measure(look, pending.pop(shared[0], None))
        if not pair.exact:
            found = fitted(walk, look, pair, alone=len(shared) == 1)
            if found is not None:
                change = restored(found.change, look.basis)
                walk.take(shifted(operator, walk.pruned.weights, change, found.offset))
            if len(shared) > 1 and found is not None:
                pair.fit.shift_rest(found.change, found.offset)
                pair.held.shift_rest(found.change, found.offset)
                walk.rewind(shared[0])
            done.append(_record(operator.name, pair, found, time.monotonic() - start))
            on_layer(done[-1], number + 1, len(operators))
        if operator is not shared[-1]:
            pending[shared[0]] = pair
        elif len(shared) > 1:
            walk.unmark(shared[0])
        if not pending:
            progress.save(number + 1, done, walk.pruned.weights)
    return done


def fitted(walk: Walk, look: Look, pair: Pair, alone: bool) -> Refit | None:
    """The operator's refit.

    Where an activation behind hides a part of what is lacking, a step is taken to the rest, from the solution or from
    the weight as it was, and the images that were not fitted choose how much of it. alone: no other operator has the
    same weight.
    """
    asked = look.operator.offset is not None
    found = refit(pair.fit, pair.held, asked)
    if found is None:
        return None
    own = found.change, found.offset
    if not alone or found.ridge == math.inf or look.clamp is None:
        return found

    def error(change: Change | None) -> float:
        return float(walk.passed_on(look, pair, change, held=True).held.squares.sum())

    nothing = torch.zeros_like(found.change), None if found.offset is None else torch.zeros_like(found.offset)
    before, lacking = error(None), walk.passed_on(look, pair, own, held=False)
    best = float(lacking.held.squares.sum())
    start = new = own
    if not best < before:
        best, start, new = before, nothing, nothing
        lacking = walk.passed_on(look, pair, None, held=False)
    more = step(lacking.fit, found.ridge, asked, start[0])
    for share in SHARES:
        tried = _sum(start, more, share)
        judged = error(tried)
        if judged < best:
            best, new = judged, tried
    if new is nothing:
        return None
    scale, (change, offset) = pair.held.scale or 1.0, new
    return replace(found, change=change, offset=offset, held_before=before / scale, held_after=best / scale)


def _sum(change: Change, more: Change | None, share: float) -> Change:
    if more is None:
        return change
    offset = None if change[1] is None or more[1] is None else change[1] + share * more[1]
    return change[0] + share * more[0], offset


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
