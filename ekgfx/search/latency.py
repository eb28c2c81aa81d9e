"""The price of a plan in milliseconds: a table of layer timings, measured once, and interpolated over the staircase.

A table holds, for some plans of one model, what each segment (`ekgfx.latency.segments`) and the whole network took on
one target. Between the measured widths a segment's time is interpolated by what such work consists of: a constant
(launch), elements read and written (memory), and multiply-accumulates. Hardware computes whole tiles of channels, so
all of these count channels rounded up to the tile: that is the staircase. Widths that are not even multiples of the
hardware's grain get other, slower kernels or a change of layout on the way, and with them coefficients of their own on
top. Segments that do the same work at the same widths (`Segment.signature`) share their measurements.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.optimize import nnls

from ekgfx.axes import Axis
from ekgfx.errors import RecipeError
from ekgfx.graph.plan import Plan
from ekgfx.latency.segments import Segment, find_segments
from ekgfx.latency.target import Target
from ekgfx.search.problem import channels_per_position
from ekgfx.search.widths import WidthRule
from ekgfx.tracing.traced import TracedModel

VERSION = 2
NARROWEST = 0.2
"""Least width ratio that is measured."""


@dataclass(frozen=True)
class Sample:
    """One measured plan. widths: kept channels per group; segments, network: milliseconds of each, and of a run."""

    widths: Mapping[str, int]
    segments: Mapping[str, float]
    network: float


@dataclass(frozen=True)
class LayerTable:
    """What was measured. structure: digest of the model's groups; inputs: shapes of its inputs without the batch;
    target: where, as it is typed; tile, grain: its staircase (`ekgfx.latency.target.Staircase`); environment: device,
    versions.
    """

    structure: str
    inputs: Sequence[Sequence[int]]
    target: str
    tile: int
    grain: int
    samples: Sequence[Sample]
    environment: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any, where: str = "the table") -> Self:
        """The table that `to_json` described. RecipeError for anything else, and for another version."""
        if not isinstance(value, dict) or not isinstance(value.get("version"), int) or "samples" not in value:
            raise RecipeError(f"{where} is no table of layer timings; measure one with `ekgfx prune --latency`")
        if value["version"] != VERSION:
            raise RecipeError(
                f"{where} has version {value['version']}, this ekgfx reads version {VERSION}; measure it again"
            )
        try:
            fields = {key: value[key] for key in ("structure", "inputs", "target", "tile", "grain", "environment")}
            return cls(**fields, samples=tuple(Sample(**sample) for sample in value["samples"]))
        except (KeyError, TypeError) as error:
            raise RecipeError(f"{where} is damaged ({error}); measure it again") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """A table from a file."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"cannot read the latency table {path}: {error}; measure one with --latency") from error
        return cls.from_json(value, str(path))

    def check(self, traced: TracedModel, target: str | None = None) -> None:
        """RecipeError when the table is of another model, input size or target."""
        if self.structure != traced.groups.digest:
            raise RecipeError(
                f"the latency table was measured for another model (structure {self.structure}, this one has "
                f"{traced.groups.digest}); measure it again, or leave --latency-table out"
            )
        if [list(shape) for shape in self.inputs] != input_shapes(traced):
            raise RecipeError(
                f"the latency table was measured with inputs {self.inputs}, the model takes {input_shapes(traced)}; "
                "give the same --input, or measure it again"
            )
        if target is not None and target != self.target:
            raise RecipeError(f"the latency table is of {self.target}, not of {target}; leave --target out")


def input_shapes(traced: TracedModel) -> list[list[int]]:
    """Shapes of the inputs that are tensors, without the batch."""
    leaves = [node.meta.get("val") for node in traced.graph.nodes if node.name in traced.inputs]
    return [list(value.shape[1:]) for value in leaves if hasattr(value, "shape")]


class Price:
    """Milliseconds of a whole run under a plan: a pure function of the plan's widths.

    Args:
        traced: the model; table: its measurements; RecipeError when it was measured for another one.
        leave: positions of samples that are left out, to judge the price by them.
    """

    def __init__(self, traced: TracedModel, table: LayerTable, leave: Sequence[int] = ()) -> None:
        table.check(traced)
        self.traced, self.table = traced, table
        self._segments = find_segments(traced)
        self._batch = {traced.batch: Target.parse(table.target).batch} if traced.batch.size else {}
        self._tiles = _positions(traced, table.tile)
        self._grains = _positions(traced, table.grain)
        self._known: dict[tuple[Any, ...], float] = {}
        self._segments_left: dict[tuple[str, ...], Collection[str]] = {}
        samples = [sample for i, sample in enumerate(table.samples) if i not in leave]
        self._laws = self._fit(samples)
        # A profiler adds to every node, and something may pass between nodes: the whole is not exactly their sum.
        sums = np.array([sum(self._times(s.widths).values()) for s in samples])
        self._whole = _line(sums, np.array([s.network for s in samples]))

    def __call__(self, plan: Plan) -> float:
        """Milliseconds of a run at the target's batch size."""
        return self.of_widths(self.traced.groups.widths(plan), plan.dropped)

    def segments(self, plan: Plan) -> dict[str, float]:
        """Milliseconds per segment, as the profiler would give them."""
        times, left = self._times(self.traced.groups.widths(plan)), self._left(plan.dropped)
        return {name: time if name in left else 0.0 for name, time in times.items()}

    @cached_property
    def dense(self) -> float:
        """Milliseconds of the unpruned network: measured, since that is the one network that is known beforehand. It
        fills the caches most, and may take a tenth longer than the laws of its layers say."""
        widths = self.traced.groups.widths(Plan())
        measured = (float(sample.network) for sample in self.table.samples if sample.widths == widths)
        return next(measured, self.of_widths(widths))

    @cached_property
    def errors(self) -> tuple[float, ...]:
        """For every measured network but the dense one: relative error of its predicted time, when the prediction does
        not know that network."""
        found = []
        for i, sample in enumerate(self.table.samples):
            if any(count < self.traced.groups[name].size for name, count in sample.widths.items()):
                predicted = Price(self.traced, self.table, leave=(i,)).of_widths(sample.widths)
                found.append(predicted / sample.network - 1)
        return tuple(found)

    def of_widths(self, widths: Mapping[str, int], dropped: tuple[str, ...] = ()) -> float:
        """Milliseconds of a run when every group keeps so many channels, and these blocks are dropped."""
        (slope, offset), left = self._whole, self._left(dropped)
        return slope * sum(time for name, time in self._times(widths).items() if name in left) + offset

    def _left(self, dropped: tuple[str, ...]) -> Collection[str]:
        """The segments of which a layer with weights is left."""
        if dropped not in self._segments_left:
            left = find_segments(self.traced.left_by(Plan(dropped=dropped))) if dropped else self._segments
            self._segments_left[dropped] = left.keys()
        return self._segments_left[dropped]

    def _times(self, widths: Mapping[str, int]) -> dict[str, float]:
        counts = {group.axis: widths[name] for name, group in self.traced.groups.items()}
        times = {}
        for name, segment in self._segments.items():
            key = (name, *(counts.get(axis) for axis in segment.axes))
            if key not in self._known:
                self._known[key] = float(self._laws[segment.signature] @ self._features(segment, counts))
            times[name] = self._known[key]
        return times

    def _features(self, segment: Segment, counts: Mapping[Axis, int]) -> np.ndarray:
        """What a segment's time consists of: 1, MACs, elements read, elements written, all with channels rounded up to
        whole tiles; MACs and elements read again where a width that it reads is off the grain, MACs and elements
        written again where one that it writes is."""
        whole = {axis: -(-n // self._tiles[axis]) * self._tiles[axis] for axis, n in counts.items()}
        macs, read, written = segment.sizes({**whole, **self._batch})
        off = {axis for axis, n in counts.items() if n % self._grains[axis]}
        odd_read, odd_written = bool(off & segment.read_axes), bool(off & segment.written_axes)
        return np.array(
            [1, macs, read, written, macs * odd_read, read * odd_read, macs * odd_written, written * odd_written], float
        )

    def _fit(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Coefficients per signature: least squares on relative errors, none below zero, since work takes time."""
        rows: dict[str, list[tuple[np.ndarray, float]]] = {segment.signature: [] for segment in self._segments.values()}
        for sample in samples:
            counts = {group.axis: sample.widths[name] for name, group in self.traced.groups.items()}
            for name, segment in self._segments.items():
                rows[segment.signature].append((self._features(segment, counts), sample.segments.get(name, 0.0)))
        return {signature: _nonnegative(found) for signature, found in rows.items()}


def _nonnegative(rows: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
    features, times = np.array([f for f, _ in rows]), np.array([t for _, t in rows])
    if not times.any():
        return np.zeros(features.shape[1])
    weights = 1 / np.maximum(times, times.max() * 1e-2)
    scale = np.maximum(features.max(axis=0), 1e-30)
    solution, _ = nnls(features / scale * weights[:, None], times * weights)
    return solution / scale


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and offset of y over x by least squares on relative errors; through zero where x hardly varies."""
    if len(x) < 4 or np.ptp(x) < 0.1 * x.mean():
        return float(np.median(y / x)), 0.0
    slope, offset = np.polyfit(x, y, 1, w=1 / y)
    return float(slope), float(offset)


def _positions(traced: TracedModel, channels: int) -> dict[Axis, int]:
    """Positions of every group's axis that make a multiple of so many channels."""
    return {
        group.axis: channels // math.gcd(channels, channels_per_position(traced, group))
        for group in traced.groups.values()
    }


def whole_tiles(traced: TracedModel, plan: Plan, tile: int) -> Plan:
    """The plan with its widths rounded up to whole tiles, as far as the groups have channels."""
    positions = _positions(traced, tile)
    for name, kept in plan.kept.items():
        group = traced.groups[name]
        step = positions[group.axis]
        more = min(group.size, -(-len(kept) // step) * step) - len(kept)
        if more > 0:
            cut = sorted(set(range(group.size)) - set(kept))
            plan = plan.with_kept(name, (*kept, *cut[:more]))
    return plan


def plans_to_measure(traced: TracedModel, rules: Mapping[str, WidthRule], count: int, tile: int) -> list[Plan]:
    """The dense network and `count` − 1 others, whose groups have widths spread evenly over what their rules allow, in
    random order each (a Latin hypercube), so that no two widths move together. Every other one has its widths on whole
    tiles, where the rules leave it open. The same for the same model."""
    draw, tiles = np.random.default_rng(0), _positions(traced, tile)
    orders = {name: draw.permutation(count - 1) for name in rules}
    plans = [Plan(structure=traced.groups.digest)]
    for i in range(count - 1):
        plan = plans[0]
        for name, rule in rules.items():
            ratio = NARROWEST + (1 - NARROWEST) * (orders[name][i] + draw.random()) / (count - 1)
            if i % 2:
                aligned = tiles[traced.groups[name].axis]
                if aligned % rule.align == 0:
                    rule = WidthRule.of(rule.size, rule.producers, aligned, rule.minimum / rule.size)
            plan = plan.with_kept(name, range(rule.kept(ratio)))
        plans.append(plan)
    return plans
