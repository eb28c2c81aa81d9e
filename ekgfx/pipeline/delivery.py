"""What a run delivers: its network as ONNX, checked against PyTorch and timed next to the original."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ekgfx.errors import DataError, EkgfxError
from ekgfx.export import Breakdown, ExportReport, Samples, break_down, export_report, parity_text
from ekgfx.export.io import device_of, named_tensors
from ekgfx.graph.untouched import untouched
from ekgfx.latency.target import PRECISIONS, Target
from ekgfx.models.source import Built
from ekgfx.pipeline.job import DENSE, LABEL_FREE, Job, Report, open_data
from ekgfx.runs import checkpoint
from ekgfx.runs.directory import Run
from ekgfx.settings.recipe import Export, Recipe
from ekgfx.tracing.trace import silently_traced

RESULT = "export.json"
FILES = (RESULT, *(f"{name}{kind}.onnx" for name in ("model", "dense") for kind in ("", "-int8", "-fp16")))
IMAGES = 8
"""Real images that the parity is checked on."""
CALIBRATION = 128
"""Training images that INT8 is calibrated on and chosen by."""
JUDGED = 512
"""Test images that precisions are compared on."""
PROFILED = 10
"""Runs in which layers are timed."""


def export_run(run: Run, built: Built, asked: Export, report: Report) -> ExportReport:
    """Writes the run's network as model.onnx, and what was measured as export.json.

    built: the pruned network (`checkpoint.load_run`). Raises ExportError when the file cannot be made, differs from the
    model, or a provider is missing.
    """
    dense = original(run) if asked.latency else None
    samples = samples_of(run, built, dense, report) if asked.int8 else None
    threads = asked.threads or (1 if asked.int8 else None)
    report.stage("export to ONNX, check and time")
    made = export_report(
        dense,
        built.model,
        real_inputs(run, built),
        run.path,
        fp16=asked.fp16,
        opset=asked.opset,
        metadata={"run": run.path.name, "plan": checkpoint.read_plan(run.path).digest},
        latency=asked.latency,
        batches=asked.batches,
        providers=asked.providers or None,
        int8=samples,
        threads=threads,
        on_setting=lambda provider, batch: report.note(f"timing on {provider}, batch {batch}"),
    )
    if made.latency is not None:
        made = replace(made, layers=layers_of(run, built, asked, made, report))
    for parity in made.parity.values():
        report.note(parity_text(parity))
    for name in made.files.values():
        run.adopt(name)
    run.drop(*(set(FILES) - {RESULT, *made.files.values()}))  # of an earlier export, in other precisions
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
    target = Target(here, "fp16" if asked.fp16 else "fp32", asked.batches[0], asked.threads or int(asked.int8))
    report.note(f"timing the layers on {target}")
    inputs, plan = real_inputs(run, built), checkpoint.read_plan(run.path)
    files = {network: run.path / made.files[network] for network in ("dense", "pruned")}
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
    """The original network, with the weights that it was pruned from where the run has them, else with any: they don't
    change how long it takes. None where it is not recorded."""
    source = checkpoint.recorded_source(run.manifest, run.path)
    if source is None:
        return None
    with torch.random.fork_rng(devices=[]):
        model = source.without_weights().build().model
    if has_weights(run):
        checkpoint.load_tensors(model, run.path / DENSE)
    return model


def has_weights(run: Run) -> bool:
    """Whether the run has the original's weights: those of a second round are of a network that was pruned already."""
    return run.has(DENSE) and not run.manifest.get("ancestors")


def samples_of(run: Run, built: Built, dense: nn.Module | None, report: Report) -> Samples:
    """The run's images: training images to quantize by, test images to judge by.

    Raises DataError where the run has none.
    """
    job = Job.of(run, report) if run.manifest.get("settings") is not None else None
    if job is None or (job.recipe.data is None and not job.needs_data):
        raise DataError(f"the run at {run.path} has no images to calibrate INT8 on; prune with --data SPEC")
    data = open_data(job.recipe.data or LABEL_FREE, built, job.recipe.seed, job.logits)
    batch = IMAGES
    calibration = data.loader("train", batch).mixed(CALIBRATION)
    test = data.loader("test", batch).mixed(JUDGED)
    example = next(iter(calibration)).images
    with untouched(built.model), torch.no_grad():
        output = built.model(example.to(device_of(built.model)))
    outputs, logits = named_tensors(output), job.logits(output)
    name = next((name for name, value in outputs.items() if value is logits), None)
    return Samples(calibration, test, name, dense is not None and has_weights(run), on_note=report.note)


def real_inputs(run: Run, built: Built) -> tuple[Tensor, ...]:
    """Test images of the run's data, or the example inputs where it has none."""
    settings = run.manifest.get("settings")
    recipe = None if settings is None else Recipe.from_json(settings, str(run.path))
    if recipe is None or recipe.data is None:
        return built.example_inputs
    data = open_data(recipe.data, built, recipe.seed)
    return (next(iter(data.loader("test", IMAGES))).images,)
