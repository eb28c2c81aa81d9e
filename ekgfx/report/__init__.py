"""A run as one self-contained page: `write(run)` → RUN/report.html."""

from pathlib import Path

from ekgfx.base.files import write_text
from ekgfx.report.facts import Facts
from ekgfx.report.page import page

__all__ = ["FILE", "Facts", "page", "write"]

FILE = "report.html"


def write(run: Path, file: Path | None = None) -> Path:
    """Writes a run as one HTML page that needs no network. The same run gives the same page, to the byte.

    Args:
        run: the run's folder; it may be under way.
        file: the page; RUN/report.html if None.

    Returns:
        Where the page is.

    Raises:
        RunError: a file of the run is damaged, or the page cannot be written.

    Example:
        >>> page = ekgfx.report.write(run)
    """
    target = run / FILE if file is None else file
    write_text(target, page(Facts.of(run)))
    return target
