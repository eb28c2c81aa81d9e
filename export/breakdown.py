"""Where did it go? MACs and milliseconds of each layer before and after, what bounds it, what alignment would give.

Layers are the segments of `ekgfx.latency.segments`: a weighted operator with all that is computed after it up to the
next ones.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ekgfx.axes import Axis
from ekgfx.graph.plan import Plan
from ekgfx.latency.segments import Segment, find_segments
from ekgfx.latency.target import Target
from ekgfx.search.latency import whole_tiles
from ekgfx.surgery.cut import prune
from ekgfx.tracing.traced import TracedModel

from .exporter import to_onnx
from .latency import Timing
from .layers import fp16, to_known
from .profile import profile


@dataclass(frozen=True)
class LayerTime:
    """A layer. macs_before, macs_after: per sample; ms_before, ms_after: of a run at the target's batch size;
    ms_aligned: with all widths rounded up to whole tiles, None where they are whole already; bound: what the time after
    goes into, "compute", "memory" or "launch"."""

    name: str
    macs_before: int
    macs_after: int
    ms_before: float
    ms_after: float
    ms_aligned: float | None
    bound: str


@dataclass(frozen=True)
class Breakdown:
    """All layers, in the order of the network. target: where they were timed; tile: channels that the hardware computes
    at once."""

    target: str
    tile: int
    layers: tuple[LayerTime, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def summary(self) -> str:
        """One line: what was saved, and what stands in the way of more."""
        macs = [sum(getattr(layer, f"macs_{when}") for layer in self.layers) for when in ("before", "after")]
        times = [sum(getattr(layer, f"ms_{when}") for layer in self.layers) for when in ("before", "after")]
        kept = times[1] / (times[0] or 1)
        time = (
            f"and {1 - kept:.0%} of the time saved"
            if kept <= 1
            else f"saved, but the time grew to {kept:.2f} of what it was"
        )
        said = f"layers on {self.target}: {1 - macs[1] / (macs[0] or 1):.0%} of the MACs {time}"
        for bound in ("launch", "memory"):
            share = sum(layer.ms_after for layer in self.layers if layer.bound == bound) / (times[1] or 1)
            said += f"; {share:.0%} of what is left is {bound}-bound"
        aligned = [layer.ms_aligned for layer in self.layers if layer.ms_aligned is not None]
        if aligned:
            said += f"; widths rounded up to {self.tile} would take {sum(aligned) / (times[1] or 1):.2f} of it"
        return said

    def doubt(self, timings: Sequence[Timing]) -> str:
        """A warning where the unpruned network, timed whole, takes less than half of what its layers add up to: most of
        that is the profiler's own time then. Empty where it is not, or the network was not timed there."""
        total = sum(layer.ms_before for layer in self.layers)
        whole = [
            timing.median_ms
            for timing in timings
            if timing.network == "dense" and f"{timing.provider}:{timing.precision}:batch={timing.batch}" == self.target
        ]
        if not whole or total <= 2 * whole[0]:
            return ""
        return (
            f"the layers add up to {total:.3g} ms, but the network takes {whole[0]:.3g} ms: most of it is the "
            "profiler's own time, which tells little about the layers"
        )


def break_down(
    traced: TracedModel,
    plan: Plan,
    files: Mapping[str, Path],
    inputs: Tensor | Sequence[Tensor],
    target: Target,
    *,
    runs: int = 30,
) -> Breakdown:
    """Profile the unpruned and the pruned network layer by layer, and the same plan with its widths rounded up.

    Args:
        traced: the unpruned model; plan: what was cut.
        files: "dense" and "pruned" → ONNX file in the target's precision.
        inputs: as for the export.
        target: provider, precision, batch size, threads.
        runs: of each file, of which the shortest time of every operator counts.

    Raises ExportError when the target or a file cannot be used.
    """
    times = {name: to_known(profile(file, inputs, target, runs=runs), traced) for name, file in files.items()}
    rounded = whole_tiles(traced, plan, target.staircase.tile)
    if rounded != plan:
        with tempfile.TemporaryDirectory() as folder:
            network = prune(traced.model, rounded, traced, graphs="allow")
            file = to_onnx(network, inputs, Path(folder) / "aligned.onnx", fp16=fp16(target))
            times["aligned"] = to_known(profile(file, inputs, target, runs=runs), traced)
    segments = find_segments(traced)
    networks = {"dense": traced.model, "pruned": prune(traced.model, plan, traced, graphs="allow")}
    work = {
        name: {
            key: _work(segment, _counts(traced, plan if name == "pruned" else Plan(), target.batch), network, target)
            for key, segment in segments.items()
        }
        for name, network in networks.items()
    }
    rates = _Rates.of([(work[n][key], times[n].get(key, 0.0)) for n in networks for key in segments])
    layers = []
    for key in segments:
        spent = {name: found.get(key, 0.0) for name, found in times.items()}
        if not any(spent.values()):
            continue
        macs = {name: work[name][key].macs // target.batch for name in networks}
        bound = rates.bound(work["pruned"][key])
        layers.append(
            LayerTime(key, macs["dense"], macs["pruned"], spent["dense"], spent["pruned"], spent.get("aligned"), bound)
        )
    return Breakdown(str(target), target.staircase.tile, tuple(layers))


@dataclass(frozen=True)
class _Work:
    """macs and bytes of a run (activations read and written, and weights)."""

    macs: int
    bytes: int


def _counts(traced: TracedModel, plan: Plan, batch: int) -> dict[Axis, int]:
    widths = traced.groups.widths(plan)
    counts = {group.axis: widths[name] for name, group in traced.groups.items()}
    return {**counts, traced.batch: batch} if traced.batch.size else counts


def _work(segment: Segment, counts: Mapping[Axis, int], network: nn.Module, target: Target) -> _Work:
    macs, read, written = segment.sizes(counts)
    module = dict(network.named_modules()).get(segment.name) if segment.name else None
    weights = 0 if module is None else sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return _Work(macs, (read + written + weights) * (2 if fp16(target) else 4))


@dataclass(frozen=True)
class _Rates:
    """A roofline drawn by the network itself: the best that any of its layers reaches here. macs, bytes: per
    millisecond; launch: milliseconds of the shortest layer."""

    macs: float
    bytes: float
    launch: float

    @classmethod
    def of(cls, found: Sequence[tuple[_Work, float]]) -> "_Rates":
        timed = [(work, ms) for work, ms in found if ms > 0]
        return cls(
            max((work.macs / ms for work, ms in timed), default=0.0),
            max((work.bytes / ms for work, ms in timed), default=0.0),
            min((ms for _, ms in timed), default=0.0),
        )

    def bound(self, work: _Work) -> str:
        """What takes longest at these rates."""
        parts = {
            "compute": work.macs / self.macs if self.macs else 0.0,
            "memory": work.bytes / self.bytes if self.bytes else 0.0,
            "launch": self.launch,
        }
        return max(parts, key=parts.__getitem__)
