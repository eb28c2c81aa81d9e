"""`ekgfx repair`: refit the network of a run that was cut without."""

from pathlib import Path
from typing import Any

import click

from ekgfx.base import named
from ekgfx.cli.options import as_the_run_has_it, given, logs, setting
from ekgfx.runs.directory import Run, read_manifest


@click.command()
@as_the_run_has_it
@click.argument("run", type=click.Path(path_type=Path))
@setting("data", "--data", metavar="SPEC", help="Other images than the run's.")
@setting("repair.images", "--images", help="Images that are used.")
@setting("device", "--device", metavar="auto|cpu|cuda[:N]", help="Where to compute.")
@logs
def repair(run: Path, logger: str | None, **flags: Any) -> None:
    """Refit the network of RUN to what the unpruned one computes, in closed form and without labels.

    `ekgfx prune` does so by itself; this is for runs that were made with --no-repair, or without images. What is not
    given stays as RUN has it.
    """
    changes = given(flags)
    read_manifest(run)
    named.check_data(changes.get("data"))
    if "data" in changes:
        changes["data"] = named.absolute(changes["data"])
    from ekgfx.cli.work import work
    from ekgfx.pipeline.jobs import repair_job

    with Run.reopen(run) as opened:
        work(opened, lambda report: repair_job(opened, report, changes), logger=logger)
