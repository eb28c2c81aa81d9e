"""A job's budget of milliseconds: the table of its layers' timings, and what became of the promise."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import platformdirs
from torch import nn

from ekgfx.base.files import write_json
from ekgfx.distributed.team import team
from ekgfx.errors import ExportError, RecipeError, RunError
from ekgfx.export.environment import environment
from ekgfx.export.layers import NETWORKS, measure_layers, threads_of, write_for
from ekgfx.export.profile import whole_runs
from ekgfx.export.providers import provider
from ekgfx.graph.plan import Plan
from ekgfx.latency.target import Staircase, Target, staircase
from ekgfx.pipeline.job import Job
from ekgfx.search.ignore import ignored_groups
from ekgfx.search.latency import VERSION, LayerTable, Price
from ekgfx.search.problem import width_rules
from ekgfx.search.widths import WidthRule
from ekgfx.settings.recipe import Search, check_place
from ekgfx.tracing.traced import TracedModel

FILE = "latency_table.json"
"""In a run: the timings that its search was priced by, so that it goes on with the same ones."""


def layer_table(job: Job) -> LayerTable | None:
    """The timings for a job whose budget is latency: the run's, those of the file that is asked for, the ones that were
    measured here before, or new ones. None for another budget."""
    asked = job.recipe.search
    if asked.latency is None:
        return None
    if job.run.has(FILE):
        return LayerTable.from_json(job.run.read(FILE), str(job.run.path / FILE))
    if team().size > 1 and asked.latency_table is None:
        raise RecipeError(
            "processes that share a search must agree on the layers' timings: give --latency-table, such as the "
            "latency_table.json of a run on one process"
        )
    table = given_table(asked, job.traced) or _measured(job, Target.parse(asked.target or ""))
    errors = np.abs(Price(job.traced, table).errors)
    job.run.write_json(FILE, table.to_json())
    job.run.update(
        latency={
            "target": table.target,
            "prediction_error": {"median": float(np.median(errors)), "worst": float(errors.max())},
        }
    )
    job.report.note(
        f"{len(table.samples)} networks timed on {table.target}; the price of each from the others is off by "
        f"{np.median(errors):.1%} in the median, {errors.max():.1%} at most"
    )
    return table


def given_table(asked: Search, traced: TracedModel) -> LayerTable | None:
    """The table of `--latency-table`, checked against the model and the target; None where there is none."""
    if asked.latency_table is None:
        return None
    table = LayerTable.load(Path(asked.latency_table))
    table.check(traced, asked.target)
    return table


def known_table(asked: Search, traced: TracedModel) -> LayerTable | None:
    """The table that a job would use, if it need not be measured first."""
    given = given_table(asked, traced)
    if given is not None or asked.target is None:
        return given
    target = Target.parse(asked.target)
    file = cache_file(traced, target, rules_of(traced, asked, alignment(asked)))
    return LayerTable.load(file) if file.exists() and len(LayerTable.load(file).samples) == NETWORKS else None


def alignment(asked: Search, table: LayerTable | None = None, device: str = "cpu", half: bool = False) -> int:
    """The alignment that the settings ask for, in channels. "auto", the default under a latency budget, is the tile of
    the table's hardware, else of the target's, else of the device's."""
    if isinstance(asked.align, int):
        return asked.align
    if asked.align is None and asked.latency is None:
        return 1
    if table is not None:
        return table.tile
    if asked.target is not None:
        return Target.parse(asked.target).staircase.tile
    steps: Staircase = staircase("cuda" if device.startswith("cuda") else "cpu", "fp16" if half else "fp32")
    return steps.tile


def rules_of(traced: TracedModel, asked: Search, align: int) -> dict[str, WidthRule]:
    """The widths that the groups may take under the settings."""
    return width_rules(traced, ignored_groups(traced.groups, asked.ignore), align, asked.min_width)


def _measured(job: Job, target: Target) -> LayerTable:
    """From the cache, where a measurement that was interrupted goes on."""
    rules = rules_of(job.traced, job.recipe.search, alignment(job.recipe.search))
    file = cache_file(job.traced, target, rules)
    begun = LayerTable.load(file) if file.exists() else None
    if begun is not None and len(begun.samples) == NETWORKS:
        return begun
    job.report.stage(f"time the layers on {target}")
    unkept: list[Exception] = []

    def on_network(table: LayerTable) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, table.to_json())
        except (OSError, RunError) as error:  # as in a home that nobody may write to
            if not unkept:
                job.report.note(f"timings are not kept for the next run ({error}); EKGFX_CACHE names another folder")
            unkept.append(error)
        job.report.note(f"network {len(table.samples)} of {NETWORKS}: {table.samples[-1].network:.3g} ms")

    return measure_layers(job.traced, target, rules, count=NETWORKS, begun=begun, on_network=on_network)


def cache_file(traced: TracedModel, target: Target, rules: Mapping[str, WidthRule]) -> Path:
    """Where the timings of this model, in these widths, on this device with these versions are kept."""
    facts = environment(threads_of(target))
    device = {key: facts[key] for key in ("cpu", "gpu", "threads", "onnxruntime", "driver") if key in facts}
    shapes = [list(value.shape[1:]) for value in traced.example[0]]
    widths = {name: (rule.size, rule.align, rule.minimum) for name, rule in rules.items()}
    key = json.dumps([VERSION, NETWORKS, traced.groups.digest, shapes, str(target), device, widths], sort_keys=True)
    return cache_folder() / "latency" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def cache_folder() -> Path:
    """Where measurements are kept from one run to the next: EKGFX_CACHE, or the system's place for such things."""
    return Path(os.environ.get("EKGFX_CACHE") or platformdirs.user_cache_path("ekgfx", appauthor=False))


def keep_promise(job: Job, plan: Plan, pruned: nn.Module) -> None:
    """Times the pruned network beside the unpruned one on the target and records it with the prediction, where the
    target is at hand and the table was measured on such a device."""
    facts = job.run.manifest.get("latency", {})
    if not facts or "measured" in facts:
        return
    table = LayerTable.from_json(job.run.read(FILE))
    price = Price(job.traced, table)
    predicted, measured = price(plan) / price.dense, None
    times: Mapping[str, float] = {"dense": price.dense, "pruned": price(plan)}
    if here(table):
        job.report.stage(f"time the network on {table.target}")
        times = _times(job, pruned, Target.parse(table.target))
        measured = times["pruned"] / times["dense"]
        job.report.note(f"latency kept: {measured:.1%} measured, {predicted:.1%} predicted")
    job.run.update(latency={**facts, "predicted": predicted, "measured": measured, "milliseconds": times})


def here(table: LayerTable) -> bool:
    """Whether this machine's device is the one that the table was measured on."""
    target = Target.parse(table.target)
    try:
        provider(target.provider)
    except ExportError:
        return False
    facts, key = environment(threads_of(target)), "cpu" if target.provider == "cpu" else "gpu"
    return facts.get(key) == table.environment.get(key)


def _times(job: Job, pruned: nn.Module, target: Target) -> Mapping[str, float]:
    """Milliseconds of a run of the dense and of the pruned network."""
    inputs = job.built.example_inputs
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: write_for(target, model, inputs, Path(folder) / f"{name}.onnx")
            for name, model in {"dense": job.built.model, "pruned": pruned}.items()
        }
        return whole_runs(files, inputs, target)


def check_settings(asked: Search) -> None:
    """RecipeError for settings of the latency budget that cannot go together."""
    check_place(asked)
    if asked.target is not None:
        target = Target.parse(asked.target)
        if asked.latency is not None and asked.latency_table is None:
            try:
                provider(target.provider)
            except ExportError as error:
                raise RecipeError(f"{error}; a table measured elsewhere can be given with --latency-table") from error
