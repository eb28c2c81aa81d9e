"""The stages of a job that change a network: trained and adapted, cut, repaired, fine-tuned with the memory bank.

Each leaves its result in the run directory, and takes it from there where it is known.
"""

import json
import shutil
from dataclasses import asdict, fields, replace
from typing import Any, Literal

from torch import nn

from ekgfx import bank
from ekgfx.base.units import percent
from ekgfx.distributed.team import team
from ekgfx.errors import DataError
from ekgfx.pipeline.job import DENSE, Job
from ekgfx.repair import repair
from ekgfx.rewriting.patched import replaced
from ekgfx.runs import checkpoint
from ekgfx.search import SearchResult
from ekgfx.settings.recipe import Training
from ekgfx.surgery.calibrate import calibrate
from ekgfx.surgery.cut import needs_forward, prune
from ekgfx.surgery.restored import restore_statistics
from ekgfx.training import step_zero
from ekgfx.training.finetune import finetune
from ekgfx.training.keeping import History
from ekgfx.training.loss import KnowledgeSource

EPOCHS, LOG = "finetune.jsonl", "finetune.csv"
"""The epochs of the fine-tuning: when it is done; after each of them, as a table."""
PRETRAINING, TUNING = "pretrain.safetensors", "finetune.safetensors"
"""Checkpoints of trainings that are under way."""
REPAIR, MENDING = "repair.json", "repair.safetensors"
"""What a repair did, and the checkpoint of one that is under way."""
BANK = "bank"
RESIDENT_SAMPLES = 200_000
"""Banks of fewer samples are held in the GPU's memory during fine-tuning."""
NORM_SAMPLES = 1024
"""Most images that BatchNorm's running statistics are corrected on after the cut; a quarter where there are no labels,
since nothing can be measured there that more would improve."""
NO_TEACHERS = "fine-tuning without labels needs the memory bank: give data with labels, or teachers"


def settled(job: Job) -> Literal["allow", "forbid"]:
    """What surgery may do; the job itself tells what it did."""
    return "forbid" if job.recipe.graphs == "forbid" else "allow"


def keep_what_needs_a_forward(job: Job) -> None:
    """Where no forward may be replaced, groups that need it keep all channels, which is known before the search."""
    if job.recipe.graphs == "forbid":
        found = needs_forward(job.traced)
        if found:
            job.report.note(f"keep all channels, since a cut needs another forward: {', '.join(found)}")
            ignored = (*job.recipe.search.ignore, *(f"={name}" for name in found))
            job.recipe = replace(job.recipe, search=replace(job.recipe.search, ignore=ignored))


def prepare(job: Job) -> None:
    """The weights that the search works on: trained where the recipe says so, then adapted (step 0 of the paper)."""
    recipe, model = job.recipe, job.built.model
    if job.dense is not None:
        job.keep_score("before", model, None)  # on other data than before, where fine-tuning changed them
        return
    restore(job)
    if recipe.pretrain.epochs:
        job.report.stage("train the model")
        if job.data is None or not job.labelled:
            raise DataError("training before the search needs data with labels; give --data, or leave pretrain out")
        fit(job, model, recipe.pretrain, PRETRAINING)
    job.keep_score("before", model, None)
    asked = recipe.search
    if job.data is not None and job.labelled and asked.strategy == "ekg" and asked.train_per_class:
        job.report.stage("adapt the model to the search's images")
        size, seed = job.batch_size, recipe.seed
        step_zero.adapt(model, job.data, asked.train_per_class, asked.val_per_class, size, job.logits, seed)
    with job.run.replacing(DENSE) as partial:
        checkpoint.save_tensors(model, partial)
    (job.run.path / PRETRAINING).unlink(missing_ok=True)


def restore(job: Job) -> None:
    """Statistics that the weights' file could not hold are estimated on the training images, and that is said."""
    if job.data is None:
        return
    batches = job.data.loader("train", job.batch_size, shuffle=True, seed=job.recipe.seed)
    try:
        found = restore_statistics(job.built.model, batches, limit=-(-NORM_SAMPLES // 4 // job.batch_size))
    except DataError as error:
        job.report.note(f"statistics that are not finite stay so: {error}")
        return
    if found:
        job.report.note(f"estimated on training images, since the weights' file holds no number: {', '.join(found)}")


def cut(job: Job, result: SearchResult) -> nn.Module:
    """The pruned model: cut, verified, BatchNorm's statistics corrected, saved and scored; or as it was saved.

    Processes other than the first only cut it: they are sent the weights before they train.
    """
    traced, known = job.traced, job.run.has(checkpoint.WEIGHTS)
    if not known:
        job.report.stage("prune and verify")
    pruned = prune(job.built.model, result.plan, traced, graphs=settled(job))
    if known:
        checkpoint.load_tensors(pruned, job.run.path / checkpoint.WEIGHTS)
    if known or not team().first:
        return pruned
    replacements = [] if job.recipe.graphs == "allow" else replaced(pruned)
    for replacement in replacements:
        job.report.note(f"another forward for {replacement}")
    if found := replaced(pruned):
        job.run.update(replaced=[asdict(replacement) for replacement in found])
    if job.data is not None:
        size = job.batch_size
        full = job.data.size("train") >= size  # a short last batch may be too small to have statistics
        batches = job.data.loader("train", size, shuffle=True, seed=job.recipe.seed, drop_last=full)
        samples = NORM_SAMPLES if job.labelled else NORM_SAMPLES // 4
        calibrate(pruned, batches, traced=traced, limit=-(-samples // size))
    job.keep_score("searched", pruned, result.plan)
    mend(job, pruned, result)
    checkpoint.write_weights(job.run, pruned, result.plan)
    job.run.drop(MENDING)
    return pruned


def mend(job: Job, pruned: nn.Module, result: SearchResult) -> None:
    """Refits the cut network on images, and scores it; what was done is in the run's repair.json."""
    asked = job.recipe.repair
    if not asked.enabled or job.data is None:
        return
    job.report.stage("repair")
    if job.random:
        job.report.note("left out: the weights are random, and there is nothing to give back")
        return
    images = (batch.images for batch in job.data.loader("train", job.batch_size, shuffle=True, seed=job.recipe.seed))
    found = repair(
        pruned,
        job.traced,
        result.plan,
        images,
        most=asked.images,
        positions=asked.positions,
        seed=job.recipe.seed,
        checkpoint=job.run.path / MENDING,
        on_layer=job.report.layer,
    )
    job.report.note(str(found))
    job.run.write_json(REPAIR, found.to_json())
    job.keep_score("repaired", pruned, result.plan)


def train(job: Job, pruned: nn.Module, result: SearchResult) -> None:
    """Fine-tuning with the memory bank; the run's weights are replaced when it is done."""
    if "finetuned" in job.run.manifest.get("results", {}):
        return
    asked = job.recipe.finetune
    team().broadcast_model(pruned)  # what the first one cut and estimated, or read
    teachers = None
    if asked.knowledge != "none" and asked.teachers:
        teachers = fill_bank(job, result)
    elif not job.labelled:
        raise DataError(NO_TEACHERS)
    job.report.stage("fine-tune")
    epochs = fit(
        job, pruned, asked, TUNING, csv=job.run.path / LOG, bank=teachers, temperature=asked.temperature, parallel=True
    )
    if not team().first:
        return
    with job.run.replacing(EPOCHS) as partial:
        partial.write_text("".join(json.dumps(asdict(epoch)) + "\n" for epoch in epochs), encoding="utf-8")
    checkpoint.write_weights(job.run, pruned, result.plan)
    job.keep_score("finetuned", pruned, result.plan)
    compare(job)
    (job.run.path / TUNING).unlink(missing_ok=True)


def compare(job: Job) -> None:
    """Says so where the fine-tuned network does worse on the test images than the one that fine-tuning began with."""
    scores = job.run.manifest["results"]
    name = next((name for name in ("repaired", "searched") if name in scores), None)
    if name is None:  # what was measured before was measured on other data
        return
    before, after = scores[name], scores["finetuned"]
    quality = "accuracy" if before["accuracy"] is not None else "agreement"
    if before[quality] is not None and after[quality] < before[quality]:
        job.report.note(
            f"fine-tuning ended below the network that it began with, {percent(after[quality])} after "
            f"{percent(before[quality])} on the test images; try a lower --lr, more --epochs, or leave it out"
        )


def fill_bank(job: Job, result: SearchResult) -> KnowledgeSource:
    """The run's memory bank for its training data, built where it is missing or was built for other data."""
    assert job.data is not None  # fine-tuning needs data
    asked, folder = job.recipe.finetune, job.run.path / BANK
    wanted = {"data": job.data.spec, "knowledge": asked.knowledge, "teachers": asked.teachers, "top_k": asked.top_k}
    wanted |= {"statistics": f"averages corrected on {bank.STATISTICS} samples", "images": job.data.digest("train")}
    if job.run.manifest.get("bank") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        (job.run.path / TUNING).unlink(missing_ok=True)  # a training with what another bank taught
        job.run.update(bank=wanted)
    job.report.stage("build the memory bank")
    samples = job.data.size("train")
    built = bank.build_bank(
        job.traced,
        result,
        job.data.loader("train", job.batch_size, workers=asked.workers),
        folder,
        asked.teachers,
        knowledge="single" if asked.knowledge == "single" else "ensemble",
        top_k=asked.top_k,
        logits=job.logits,
        on_progress=lambda progress: job.report.bank(progress, samples),
        parallel=True,
    )
    return built.resident(job.device) if job.device.type != "cpu" and samples < RESIDENT_SAMPLES else built


def fit(job: Job, model: nn.Module, asked: Training, file: str, **options: Any) -> History:
    """Training in place, with a checkpoint in the run's `file` to go on from."""
    assert job.data is not None  # every caller has looked
    if asked.augment:
        colours = ", colours" if (asked.views or (2 if options.get("bank") is not None else 1)) > 1 else ""
        job.report.note(f"augmentation: {job.data.augmented}{colours}")
    test = job.data.loader("test", job.batch_size, workers=asked.workers).mixed() if job.labelled else None
    return finetune(
        model,
        job.data,
        test=test,
        logits=job.logits,
        checkpoint=job.run.path / file,
        on_epoch=lambda epoch: job.report.epoch(epoch, asked.epochs),
        on_batch=job.report.batch,
        seed=job.recipe.seed,
        **{field.name: getattr(asked, field.name) for field in fields(Training)},
        **options,
    )
