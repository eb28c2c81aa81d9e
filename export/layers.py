"""Measures the table of layer timings that prices a plan (`ekgfx.search.latency`)."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ekgfx.graph.plan import Plan
from ekgfx.graph.untouched import deep_copy
from ekgfx.latency.segments import find_segments
from ekgfx.latency.target import Target
from ekgfx.search.latency import LayerTable, Sample, input_shapes, plans_to_measure
from ekgfx.search.widths import WidthRule
from ekgfx.surgery.cut import prune
from ekgfx.tracing.traced import TracedModel

from .environment import available_cpus, environment
from .exporter import to_onnx
from .int8 import Quantizer, Recipe, scratch
from .profile import profile, whole_runs
from .providers import provider

NETWORKS = 12
"""Networks that are measured: so many points for the coefficients of a segment that occurs once."""


def measure_layers(
    traced: TracedModel,
    target: Target,
    rules: Mapping[str, WidthRule],
    *,
    count: int = NETWORKS,
    begun: LayerTable | None = None,
    on_network: Callable[[LayerTable], None] | None = None,
) -> LayerTable:
    """Time the segments and the whole of `count` networks, cut out of the model in widths that the rules allow.

    begun: a table that an interrupted measurement left; on_network: called with the table so far after each network.
    Raises ExportError when the target cannot be used here or a network cannot be exported.
    """
    provider(target.provider)
    resolved = replace(target, threads=threads_of(target))
    steps = target.staircase
    table = LayerTable(
        traced.groups.digest,
        input_shapes(traced),
        str(target),
        steps.tile,
        steps.grain,
        (),
        environment(resolved.threads),
    )
    if begun is not None and (begun.structure, begun.target, begun.inputs) == (
        table.structure,
        table.target,
        table.inputs,
    ):
        table = begun
    plans = plans_to_measure(traced, rules, count, table.tile)
    for plan in plans[len(table.samples) :]:
        table = replace(table, samples=(*table.samples, measure(traced, plan, resolved)))
        if on_network is not None:
            on_network(table)
    return table


def measure(traced: TracedModel, plan: Plan, target: Target) -> Sample:
    """What one network takes, segment by segment and as a whole."""
    network = network_of(traced, plan)
    inputs = tuple(traced.example[0])
    with tempfile.TemporaryDirectory() as folder:
        file = write_for(target, network, inputs, Path(folder) / "net.onnx")
        times = profile(file, inputs, target)
        whole = whole_runs({"": file}, inputs, target)[""]
    return Sample(traced.groups.widths(plan), to_known(times, traced), whole)


def write_for(target: Target, network: nn.Module, inputs: Sequence[Tensor], path: Path) -> Path:
    """The network as the file that is timed on the target. INT8 takes its ranges from the example inputs: how long it
    takes does not depend on them."""
    to_onnx(network, inputs, path, fp16=fp16(target))
    if target.precision == "int8":
        with scratch() as folder:
            images = [tuple(value[:1] if value.ndim else value for value in inputs)]
            Quantizer(path, images, Path(folder), threads_of(target))(Recipe(), path)
    return path


def threads_of(target: Target) -> int:
    """CPU threads that run there."""
    return target.threads or available_cpus()


def fp16(target: Target) -> bool:
    """Whether the files for a target are written in half precision."""
    return target.precision == "fp16"


def network_of(traced: TracedModel, plan: Plan) -> nn.Module:
    """The network that a plan leaves; a copy of the model where it leaves all."""
    return prune(traced.model, plan, traced, graphs="allow") if plan.kept else deep_copy(traced.model)


def to_known(times: Mapping[str, float], traced: TracedModel) -> dict[str, float]:
    """Times of segments that the graph does not know (the exporter may name a product after an inner module) go to the
    segment of the module around it."""
    known = find_segments(traced)
    total: dict[str, float] = {}
    for name, time in times.items():
        while name not in known:
            name = name.rpartition(".")[0]
        total[name] = total.get(name, 0.0) + time
    return total
