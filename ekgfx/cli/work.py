"""Runs a job in the terminal: progress, how to go on when it is stopped, the table at the end."""

from collections.abc import Callable
from typing import Any

import click

from ekgfx.cli.progress import Terminal
from ekgfx.cli.render import notes
from ekgfx.cli.summary import show
from ekgfx.errors import EkgfxError, TeamError
from ekgfx.run import Run


def work(run: Run, job: Callable[[Terminal], Any], *, tensorboard: bool = False) -> None:
    """Does `job` and shows its results; a job that stops is marked in run.json, with the reason."""
    notes.print(f"run {run.path}", soft_wrap=True)
    try:
        with _watch(run, tensorboard) as terminal:
            job(terminal)
    except (KeyboardInterrupt, TeamError):
        run.update(status="interrupted")
        click.echo(f"stopped; go on with: ekgfx prune --resume {run.path}", err=True)
        raise
    except EkgfxError as error:
        run.fail(str(error))
        raise
    show(run.path)


def _watch(run: Run, tensorboard: bool) -> Terminal:
    if not tensorboard:
        return Terminal()
    from ekgfx.cli.tensorboard import FOLDER, TensorBoard

    return TensorBoard(run.path / FOLDER)
