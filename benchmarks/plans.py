"""Plans that are measured: from the steps of a search, of drawn channels, in whole tiles of channels."""

import random
from pathlib import Path

from ekgfx.base.files import read_lines
from ekgfx.graph.plan import Plan
from ekgfx.tracing.traced import TracedModel

TILE = 16


def from_history(traced: TracedModel, history: Path, keep: float) -> Plan:
    """The first plan on a search's way, by its steps, that has no more than this share of the MACs."""
    plan, full = Plan({}, traced.groups.digest), traced.cost().macs
    for step in read_lines(history):
        for name, gone in step["removed"].items():
            before = plan.kept.get(name, range(traced.groups[name].size))
            plan = plan.with_kept(name, tuple(channel for channel in before if channel not in gone))
        if traced.cost(plan).macs <= keep * full:
            return plan
    raise SystemExit(f"the steps in {history} end above {keep:.0%} of the MACs")


def at_random(traced: TracedModel, plan: Plan, seed: int) -> Plan:
    """The same widths, of channels that are drawn."""
    draw = random.Random(seed)
    kept = {
        name: tuple(sorted(draw.sample(range(traced.groups[name].size), len(channels))))
        for name, channels in plan.kept.items()
    }
    return Plan(kept, plan.structure)


def aligned(traced: TracedModel, plan: Plan, keep: float, tile: int = TILE) -> Plan:
    """The plan with its widths on whole tiles, within the budget: a width goes up where it fills more of its last tile
    than a share that is as small as may be."""
    full = traced.cost().macs
    for part in range(tile + 1):
        rounded = plan
        for name, kept in plan.kept.items():
            group = traced.groups[name]
            whole, rest = divmod(len(kept), tile)
            width = min(group.size, max(tile, tile * (whole + (rest > part))))
            rounded = rounded.with_kept(name, resized(traced, name, kept, width))
        if traced.cost(rounded).macs <= keep * full:
            return rounded
    raise SystemExit(f"no widths in tiles of {tile} are within {keep:.0%} of the MACs")


def resized(traced: TracedModel, name: str, kept: tuple[int, ...], width: int) -> tuple[int, ...]:
    """So many channels of a group, those of the largest weights (L1 of the layer that the group is named after) gone or
    come back last."""
    sizes = traced.model.get_submodule(name).weight.detach().abs().flatten(1).sum(1)  # type: ignore[union-attr, operator]
    order = sorted(range(traced.groups[name].size), key=lambda channel: (channel not in kept, -float(sizes[channel])))
    return tuple(sorted(order[:width]))
