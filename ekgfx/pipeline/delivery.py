"""What a run delivers: its network as ONNX, checked against PyTorch and timed next to the original."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ekgfx.errors import EkgfxError
from ekgfx.export import Breakdown, ExportReport, break_down, export_report, parity_text
from ekgfx.latency.target import PRECISIONS, Target
from ekgfx.models.source import Built
from ekgfx.pipeline.job import Report, open_data
from ekgfx.runs import checkpoint
from ekgfx.runs.directory import Run
from ekgfx.settings.recipe import Export, parse
from ekgfx.tracing.trace import silently_traced

RESULT = "export.json"
FILES = (RESULT, "model.onnx", "dense.onnx")
IMAGES = 8
"""Real images that the parity is checked on."""
PROFILED = 10
"""Runs in which layers are timed."""


def export_run(run: Run, built: Built, asked: Export, report: Report) -> ExportReport:
    """Writes the run's network as model.onnx, and what was measured as export.json.

    built: the pruned network (`checkpoint.load_run`). Raises ExportError when the file cannot be made, differs from the
    model, or a provider is missing.
    """
    report.stage("export to ONNX, check and time")
    made = export_report(
        original(run) if asked.latency else None,
        built.model,
        real_inputs(run, built),
        run.path,
        fp16=asked.fp16,
        opset=asked.opset,
        metadata={"run": run.path.name, "plan": checkpoint.read_plan(run.path).digest},
        latency=asked.latency,
        batches=asked.batches,
        providers=asked.providers or None,
        on_setting=lambda provider, batch: report.note(f"timing on {provider}, batch {batch}"),
    )
    if made.latency is not None:
        made = replace(made, layers=layers_of(run, built, asked, made, report))
    for parity in made.parity.values():
        report.note(parity_text(parity))
    for name in made.files.values():
        run.adopt(name)
    run.write_json(RESULT, made.to_json())
    return made


def layers_of(run: Run, built: Built, asked: Export, made: ExportReport, report: Report) -> Breakdown | None:
    """Both networks layer by layer, on the first provider that can be profiled and at the first batch size; None where
    the original is not recorded, no such provider was timed, or the layers cannot be told apart (a note says why)."""
    dense = original(run)
    assert made.latency is not None
    here = next((t.provider for t in made.latency.timings if t.provider in PRECISIONS), None)
    if dense is None or here is None or "dense" not in made.files:
        return None
    target = Target(here, "fp16" if asked.fp16 else "fp32", asked.batches[0])
    report.note(f"timing the layers on {target}")
    inputs, plan = real_inputs(run, built), checkpoint.read_plan(run.path)
    files = {network: run.path / name for network, name in made.files.items()}
    try:
        traced = silently_traced(dense, inputs, leaf=plan.leaf, unused=plan.unused)
        found = break_down(traced, plan, files, inputs, target, runs=PROFILED)
    except EkgfxError as error:  # the export itself is done
        report.note(f"layers not timed: {error}")
        return None
    report.note(found.summary)
    if doubt := found.doubt(made.latency.timings):
        report.note(doubt)
    return found


def original(run: Run) -> nn.Module | None:
    """The original network, with any weights: they don't change how long it takes. None where it is not recorded."""
    source = checkpoint.recorded_source(run.manifest, run.path)
    if source is None:
        return None
    with torch.random.fork_rng(devices=[]):
        return source.without_weights().build().model


def real_inputs(run: Run, built: Built) -> tuple[Tensor, ...]:
    """Test images of the run's data, or the example inputs where it has none."""
    settings = run.manifest.get("settings")
    recipe = None if settings is None else parse(settings, str(run.path))
    if recipe is None or recipe.data is None:
        return built.example_inputs
    data = open_data(recipe.data, built, recipe.seed)
    return (next(iter(data.loader("test", IMAGES))).images,)
