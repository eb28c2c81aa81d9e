"""Runs a job in the terminal: progress, how to go on when it is stopped, the table at the end."""

from collections.abc import Callable
from typing import Any

from ekgfx.cli.progress import Terminal
from ekgfx.cli.render import notes
from ekgfx.cli.summary import show
from ekgfx.errors import EkgfxError, TeamError
from ekgfx.runs.directory import Run


def work(run: Run, job: Callable[[Terminal], Any], *, logger: str | None = None) -> None:
    """Does `job` and shows its results; a job that stops is marked in run.json, with the reason."""
    notes.print(f"run {run.path}", soft_wrap=True)
    try:
        with _watch(run, logger) as terminal:
            job(terminal)
    except (KeyboardInterrupt, TeamError) as error:
        run.update(status="interrupted")
        go_on = f"go on with: ekgfx prune --resume {run.path}"
        if isinstance(error, TeamError):
            raise TeamError(f"{error}; {go_on}") from error
        raise KeyboardInterrupt(go_on) from error
    except EkgfxError as error:
        if run.manifest.get("status") == "running":  # else it was refused before anything of the run was changed
            run.fail(str(error))
        raise
    except OSError:
        raise
    except Exception as error:  # of a user's network, a library, or a fault of ours
        run.update(status="failed", error=f"{type(error).__name__}: {error}")
        raise
    show(run.path)


def _watch(run: Run, logger: str | None) -> Terminal:
    if logger is None:
        return Terminal()
    from ekgfx.cli.loggers import LOGGERS

    return LOGGERS[logger](run.path)
