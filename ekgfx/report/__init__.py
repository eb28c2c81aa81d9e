"""A run as one self-contained page: `write(run)` → RUN/report.html."""

from pathlib import Path

from ekgfx.base.files import write_text
from ekgfx.report.facts import Facts
from ekgfx.report.page import page

__all__ = ["FILE", "Facts", "page", "write"]

FILE = "report.html"


def write(run: Path, file: Path | None = None) -> Path:
    """Writes the page of the run at `run` to `file` (RUN/report.html by default) and returns where it is.

    The run may be under way. The same run gives the same page, to the byte. Raises RunError when a file of the run is
    damaged, or the page cannot be written.
    """
    target = run / FILE if file is None else file
    write_text(target, page(Facts.of(run)))
    return target
