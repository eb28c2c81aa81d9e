"""`ekgfx prune`: the main job, from flags to a run directory and one table."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ekgfx.base import named
from ekgfx.base.units import several
from ekgfx.cli.options import given, images, logs, setting, training
from ekgfx.errors import RecipeError
from ekgfx.runs.directory import Run, fresh_path, read_manifest
from ekgfx.settings import recipe as recipes
from ekgfx.settings.budgets import BUDGETS, label_of
from ekgfx.settings.preprocessing import Preprocessing
from ekgfx.settings.recipe import Recipe

log = logging.getLogger("ekgfx")


@click.command()
@click.argument("model", required=False)
@click.option("--recipe", metavar="NAME|FILE", help="Start from a recipe; every other flag overrides it.")
@setting(
    "search.flops",
    "--flops",
    metavar="BUDGET",
    help="MACs to keep: a fraction (0.55, 55%), or an amount (2.0G); several with commas: a network for each.",
)
@setting("search.params", "--params", metavar="BUDGET", help="Parameters to keep: 0.6, 60%, or 5M.")
@setting("search.latency", "--latency", metavar="BUDGET", help="Time on --target to keep: 0.6, 60%, or 8ms.")
@setting(
    "search.target",
    "--target",
    metavar="SPEC",
    help="Where it shall be fast, such as cuda:fp16:batch=64 or cpu:fp32:batch=1:threads=4.",
)
@setting(
    "search.latency_table",
    "--latency-table",
    metavar="FILE",
    help="Timings of the layers that a run on the target's machine has measured (its latency_table.json).",
)
@setting(
    "data",
    "--data",
    metavar="SPEC",
    help="folder:DIR, cifar10:DIR, cifar100:DIR, npz:DIR, timm:NAME[@ROOT], digits or photos.",
)
@setting("weights", "--weights", metavar="auto|none|FILE", help="Weights of MODEL.")
@setting("ema", "--ema", help="Of a file with several state dicts, take the moving average.")
@setting("input", "--input", metavar="SHAPE", help="Shape of the example input, such as 1x3x32x32 (comma: several).")
@setting("classes", "--classes", help="Number of classes to build the model with.")
@images
@setting("leaf", "--leaf", metavar="GLOB", help="Modules without a graph, which run as they are, whole; repeatable.")
@setting("unused", "--unused", metavar="GLOB", help="Parameters or modules that nothing uses; repeatable.")
@setting("outputs", "--outputs", metavar="PLACE", help="Outputs that matter, by key, field or index; repeatable.")
@setting(
    "logits", "--logits", metavar="PLACE", help="Where the logits are in the model's output, where it is not clear."
)
@setting(
    "graphs",
    "--graphs",
    help="A module whose Python cannot express the cut gets another forward; warn names it, forbid prunes less.",
)
@setting("search.strategy", "--search", help="How widths are found.")
@setting("search.importance", "--importance", help="Which channels go first.")
@setting("search.knowledge", "--knowledge", help="What the search's reward compares with.")
@setting(
    "search.ignore",
    "--ignore",
    metavar="GLOB",
    help="Groups, parameters or modules that keep all channels; =NAME: one group alone; repeatable.",
)
@setting(
    "search.uniform_layers",
    "--uniform-layers/--no-uniform-layers",
    help="Find widths that the model's own configuration can say, so that its library loads the pruned model; without "
    "a configuration, repeated layers share their widths.",
)
@setting(
    "search.depth",
    "--depth/--no-depth",
    help="Whole residual blocks may be dropped as well, where that loses less for what it saves.",
)
@setting(
    "search.accept",
    "--accept",
    metavar="N",
    help="Best candidates that a step of the search takes together; the paper takes one.",
)
@setting(
    "search.val_batch_size", "--val-batch-size", metavar="N", help="Batch size of the images to judge candidates on."
)
@setting(
    "search.hardest_first",
    "--hardest-first/--no-hardest-first",
    help="Judge candidates on the hardest images first; with small batches a quicker search, whose plan may be worse.",
)
@setting("search.cache", "--cache", metavar="SIZE", help="Memory for values that the search's candidates share.")
@setting("search.amp", "--search-amp", help="Half precision to evaluate candidates in; can change a close choice.")
@setting(
    "search.align",
    "--align",
    metavar="N|auto",
    help="Kept channels are multiples of N; auto: of what the hardware computes at once.  "
    "[default: auto with --latency, else 1]",
)
@setting(
    "repair.enabled",
    "--repair/--no-repair",
    help="Refit the cut network, in closed form, to what the unpruned one computes on the data's images.",
)
@setting("finetune.epochs", "--epochs", help="Epochs of fine-tuning after the search.")
@setting(
    "finetune.budgets",
    "--finetune",
    metavar="BUDGET",
    help="Of several budgets, those whose networks are fine-tuned  [default: the tightest].",
)
@setting("finetune.lr", "--lr", help="Learning rate of the fine-tuning.")
@setting("finetune.batch_size", "--batch-size", help="Batch size of the fine-tuning.")
@training
@setting(
    "finetune.knowledge",
    "--finetune-knowledge",
    help="Who teaches in the fine-tuning: the search's sub-networks, the unpruned one, nobody.",
)
@setting("seed", "--seed", help="Seed of everything random.")
@setting("device", "--device", metavar="auto|cpu|cuda[:N]", help="Where to compute.")
@click.option("--onnx/--no-onnx", "export__onnx", default=None, help="Export to ONNX and time it at the end.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run directory  [default: a new one in runs/]",
)
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with an interrupted run.")
@logs
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def prune(
    model: str | None,
    recipe: str | None,
    output: Path | None,
    resume: Path | None,
    logger: str | None,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Prune MODEL to a budget, fine-tune it, and measure what it became.

    MODEL is timm:NAME, hf:NAME|DIR, torchvision:NAME, package.module:factory, path/file.py:factory or a run directory
    (to prune it further); `ekgfx models` lists them.
    Without --data the search runs label-free on photographs: the network's own predictions stand for labels, and
    no accuracy can be measured.
    """
    changes = given(flags) | ({} if model is None else {"model": model})
    asked = None
    if resume is None:
        asked = _settings(recipe, changes)
        if dry_run:
            return _preview(asked)
    elif changes or recipe or output or dry_run:
        raise RecipeError(f"--resume takes its settings from {resume}; leave the other flags out")
    else:
        read_manifest(resume)
    from ekgfx.cli.work import work
    from ekgfx.distributed.team import copied, joined
    from ekgfx.pipeline.job import Silent
    from ekgfx.pipeline.jobs import prune_job

    with joined() as mates:
        if not mates.first:
            with copied(Path(mates.broadcast_object(None))) as copy, Run.reopen(copy) as ours:
                mates.all_gather_object("copied")
                return prune_job(ours, Silent())
        with _run(asked, output, resume) as run:
            mates.broadcast_object(str(run.path))
            mates.all_gather_object("copied")
            work(run, lambda report: prune_job(run, report), logger=logger)


def _run(asked: Recipe | None, output: Path | None, resume: Path | None) -> Run:
    """The run to work on: a new one, or the one to go on with."""
    from ekgfx.models import source, trust
    from ekgfx.pipeline import timing

    if resume is not None:
        return Run.reopen(resume)
    assert asked is not None
    timing.check_settings(asked.search)
    model_source = source.of_recipe(asked)
    table = asked.search.latency_table
    places = {
        "model": model_source.model,
        "weights": model_source.weights,
        "data": named.absolute(asked.data),
        "search.latency_table": None if table is None else str(Path(table).expanduser().absolute()),
    }
    settings = recipes.override(asked, places).to_json()
    signed = {} if model_source.is_run else trust.sign(model_source.model)
    return Run.create(output or fresh_path(asked.model or ""), settings=settings, **signed)


def _settings(name: str | None, changes: dict[str, Any]) -> Recipe:
    """What is asked for, with all that can be seen to be wrong without importing torch refused."""
    base = recipes.load(name) if name else Recipe()
    budgets = [f"search.{key}" for key in BUDGETS]
    if any(key in changes for key in budgets):  # a budget typed replaces the recipe's
        changes = {**dict.fromkeys(budgets), **changes}
    asked = recipes.override(base, changes)
    if asked.model is None:
        raise RecipeError("nothing to prune: name a MODEL (such as timm:resnet50), or a --recipe")
    if not asked.search.budgets:
        raise RecipeError(
            "no budget: give --flops, --params or --latency, the fraction to keep (0.55 removes 45%) or an amount"
        )
    assert asked.each  # or it raises
    recipes.check_place(asked.search)
    named.check_model(asked.model)
    typed = {name: getattr(asked, name) for name in ("weights", "input", "classes", "ema", "model_kwargs")}
    named.check_of_run(asked.model, **typed)
    named.check_weights(asked.weights)
    named.check_input(asked.input)
    settings = read_manifest(Path(asked.model)).get("settings", {}) if Path(asked.model).is_dir() else {}
    if settings.get("preprocessing") and asked.preprocessing == Preprocessing():
        asked = recipes.override(asked, {"preprocessing": settings["preprocessing"]})
    if asked.data is None and settings.get("data"):
        asked = recipes.override(asked, {"data": settings["data"]})
        log.info("data: %s, the run's; --data takes others", asked.data)
    named.check_data(asked.data)
    return asked


def _preview(asked: Recipe) -> None:
    """What --dry-run says: every group with the fewest channels it may come down to, and how far the budget is."""
    from ekgfx.pipeline import timing

    timing.check_settings(asked.search)
    from ekgfx.cli.render import change, human, out, show_table, table
    from ekgfx.models import source
    from ekgfx.pipeline import job
    from ekgfx.pipeline.planning import budget_of, smallest
    from ekgfx.runs import checkpoint
    from ekgfx.tracing.trace import silently_traced

    fetched = asked.weights == "auto"  # which a dry run does not do; a file is looked at
    built = checkpoint.build(source.of_recipe(replace(asked, weights="none") if fetched else asked))
    if not fetched:
        out.print(f"weights: {built.weights_origin}", markup=False)
    leaf, outputs = (*built.leaf, *asked.leaf), (*built.outputs, *asked.outputs) or None
    traced = silently_traced(built.model, built.example_inputs, leaf=leaf, unused=asked.unused, outputs=outputs)
    for note in traced.notes:
        out.print(note)
    if asked.data is not None:
        images = job.open_data(asked.data, built, asked.seed)
        out.print(job.preprocessing_of(images, built), markup=False)
        classes = "no labels" if images.classes is None else several(images.classes, "class", "classes")
        out.print(
            f"data: {several(images.size('train'), 'image')} to train on, {images.size('test')} to test on; {classes}\n"
        )
    table_here = timing.known_table(asked.search, traced) if asked.search.latency is not None else None
    if asked.search.latency is not None and table_here is None:
        out.print(f"the layers would be timed on {asked.search.target} first; how far the budget can go is known then")
        return
    align = timing.alignment(asked.search, table_here, asked.device, asked.export.fp16)
    least = smallest(traced, asked.search, align, table_here)
    rows = [
        (
            group.name,
            str(group.size),
            str(len(least.kept[group.name])) if group.name in least.kept else "ignored",
            human(group.macs),
        )
        for group in traced.groups.values()
    ]
    show_table(table(None, ("group", "channels", "at least", "MACs governed"), rows, numbers=(1, 2, 3)))
    full, floor = traced.cost(), traced.cost(least)
    out.print(f"\nsmallest sub-network: MACs {change(full.macs, floor.macs)}")
    out.print(f"                      parameters {change(full.params, floor.params)}")
    budget = budget_of(traced, asked.search, table_here)
    parts = [f"{part.keep:.1%} of the {part.unit}" for part in budget.parts or (budget,)]
    if len(points := asked.search.points) > 1:
        out.print(f"a network for each of {'; '.join(map(label_of, points))}")
    out.print(f"budget: {' and '.join(parts)}; search {asked.search.strategy} on {asked.data or 'photos'}")
