"""The jobs: from a model to a pruned, fine-tuned and exported one; a further fine-tuning; a repair afterwards.

Everything is in the run directory: the settings at the start, each stage's result when it is done. A stage whose
result is there is not done again, so that a run that was interrupted anywhere goes on where it stopped, and ends with
the same plan as one that was not.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ekgfx.data import SPLITS, Data
from ekgfx.distributed.team import team
from ekgfx.errors import DataError, RecipeError, RunError
from ekgfx.pipeline import delivery, frontier, timing
from ekgfx.pipeline.job import LABEL_FREE, Job, Report, open_data, pick_device
from ekgfx.pipeline.planning import align_of, find_plan, smallest
from ekgfx.pipeline.stages import NO_TEACHERS, REPAIR, TUNING, cut, keep_what_needs_a_forward, prepare, train
from ekgfx.runs import checkpoint
from ekgfx.runs.directory import Run
from ekgfx.search import SearchResult
from ekgfx.settings.recipe import Recipe, override


def prune_job(run: Run, report: Report) -> None:
    """The whole job of a run, from its settings to the end, or from where it was interrupted.

    A process that is not the first one works on a copy of the run, and does its parts of the search, of the memory bank
    and of the fine-tuning.
    """
    job = Job.of(run, report)
    run.update(status="running")
    *looser, own = job.recipe.each
    result = to_the_plan(job)
    for recipe, point in zip(looser, result.points, strict=False) if team().first else ():
        with frontier.run_of(job, recipe, result.at(**point.asked), point) as part:
            if part.manifest["status"] != "done":
                finish(job.at(part, recipe, point.label), result.at(**point.asked))
    mine = job.at(run, own, result.points[-1].label) if looser else job
    finish(mine, result, "running" if looser else "done")
    if looser and team().first:
        frontier.compare(job, result)
        run.update(status="done", error=None)


def to_the_plan(job: Job) -> SearchResult:
    """The stages up to the plan, or what they found before."""
    *looser, _ = job.recipe.each
    if team().size > 1 and any(recipe.finetune.epochs for recipe in looser):
        raise RecipeError("several processes train the network of the tightest budget alone; leave --finetune out")
    if not job.run.has(checkpoint.PLAN):
        keep_what_needs_a_forward(job)
        timing.check_settings(job.recipe.search)
        table = timing.layer_table(job)
        smallest(job.traced, job.recipe.search, align_of(job, table), table)  # before anything takes its time
    prepare(job)
    return find_plan(job)


def finish(job: Job, result: SearchResult, status: str = "done") -> None:
    """The stages from the plan on. status: of the run, afterwards."""
    pruned = cut(job, result)
    if team().first:
        timing.keep_promise(job, result.plan, pruned)
    if job.recipe.finetune.epochs:
        train(job, pruned, result)
    if team().first and job.recipe.export.onnx and not job.run.has(delivery.RESULT):
        delivery.export_run(job.run, replace(job.built, model=pruned), job.recipe.export, job.report)
    job.run.update(status=status, error=None)


def finetune_job(run: Run, report: Report, changes: Mapping[str, Any]) -> None:
    """Fine-tunes the network of a finished run (further), with some settings changed; its weights are replaced.

    A training that was interrupted goes on where the settings are the same, and starts anew where they are not.
    """
    job = Job.of(run, report)
    if not run.has(checkpoint.WEIGHTS):
        raise RunError(
            f"the run at {run.path} has no pruned network yet; finish it with `ekgfx prune --resume {run.path}`"
        )
    asked = override(job.recipe, changes)
    check_finetune(job, asked)
    results = run.manifest.get("results", {})
    if asked != job.recipe:
        (run.path / TUNING).unlink(missing_ok=True)
    stale = set(results) if asked.data != job.recipe.data else {"finetuned"}
    kept = {name: score for name, score in results.items() if name not in stale}
    status = run.manifest["status"]
    run.update(settings=asked.to_json(), results=kept, status="running")
    run.drop(*delivery.FILES, frontier.FILE)  # they are of the network before
    try:
        prune_job(run, report)
    except DataError:  # an image that cannot be read: the run goes on with its own
        run.update(settings=job.recipe.to_json(), results=results, status=status)
        raise


def check_finetune(job: Job, asked: Recipe) -> None:
    """Refuses settings that a fine-tuning of the run could not go on with, while the run is as it was."""
    wanted = asked.finetune
    if wanted.epochs < 1:
        raise RecipeError(f"no epochs to fine-tune for ({wanted.epochs}): give --epochs")
    images = check_images(job, asked)
    if images.classes is None and (wanted.knowledge == "none" or not wanted.teachers):
        raise DataError(NO_TEACHERS)


def check_images(job: Job, asked: Recipe) -> Data:
    """The data that a run would go on with; refuses those, and the device, that it could not."""
    pick_device(asked.device)
    images = open_data(asked.data or LABEL_FREE, job.built, asked.seed, job.logits)
    for split in SPLITS:
        images.size(split)
    return images


def repair_job(run: Run, report: Report, changes: Mapping[str, Any]) -> None:
    """Repairs the network of a run that was cut without, from the cut on; its weights are replaced."""
    job = Job.of(run, report)
    if not run.has(checkpoint.WEIGHTS):
        raise RunError(
            f"the run at {run.path} has no pruned network yet; finish it with `ekgfx prune --resume {run.path}`"
        )
    results = run.manifest.get("results", {})
    if "finetuned" in results:
        raise RunError(
            f"the network of {run.path} was fine-tuned, and a repair comes before that; prune anew without --no-repair"
        )
    if job.recipe.data is None and not job.needs_data and "data" not in changes:
        raise DataError(f"the run at {run.path} has no images to repair on; give --data")
    asked = override(job.recipe, {"repair.enabled": True, **changes})
    check_images(job, asked)
    fresh = set(results) - {"repaired"} if asked.data == job.recipe.data else set()
    kept = {name: score for name, score in results.items() if name in fresh}
    run.update(settings=asked.to_json(), results=kept, status="running")
    run.drop(checkpoint.WEIGHTS, REPAIR, *delivery.FILES, frontier.FILE)
    prune_job(run, report)
