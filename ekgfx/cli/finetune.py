"""`ekgfx finetune`: train the network of a run (further)."""

from pathlib import Path
from typing import Any

import click

from ekgfx.base import named
from ekgfx.cli.options import as_the_run_has_it, at_budget, given, logs, setting, training
from ekgfx.runs import directory
from ekgfx.runs.directory import Run, read_manifest


@click.command()
@as_the_run_has_it
@click.argument("run", type=click.Path(path_type=Path))
@setting("data", "--data", metavar="SPEC", help="Other data than the run's.")
@setting("finetune.epochs", "--epochs", help="Epochs to train for.")
@setting("finetune.lr", "--lr", help="Learning rate.")
@setting("finetune.batch_size", "--batch-size", help="Batch size.")
@setting("finetune.knowledge", "--knowledge", help="Who teaches: the search's sub-networks, the unpruned one, nobody.")
@setting("finetune.teachers", "--teachers", help="Size of the memory bank.")
@training
@setting("finetune.amp", "--amp", help="Half precision to compute in.")
@setting("device", "--device", metavar="auto|cpu|cuda[:N]", help="Where to compute.")
@at_budget
@logs
def finetune(
    run: Path,
    logger: str | None,
    flops: float | str | None,
    params: float | str | None,
    latency: float | str | None,
    **flags: Any,
) -> None:
    """Fine-tune the network of RUN with its memory bank, or go on where that was interrupted.

    What is not given stays as RUN has it.
    """
    changes = given(flags)
    read_manifest(run)
    run = directory.at_budget(run, {"flops": flops, "params": params, "latency": latency})
    named.check_data(changes.get("data"))
    if "data" in changes:
        changes["data"] = named.absolute(changes["data"])
    from ekgfx.cli.work import work
    from ekgfx.pipeline.jobs import finetune_job

    with Run.reopen(run) as opened:
        work(opened, lambda report: finetune_job(opened, report, changes), logger=logger)
