"""How tables look in the terminal, and where they go."""

from collections.abc import Iterable, Sequence

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from ekgfx.base.units import change, duration, human, percent

__all__ = ["change", "duration", "human", "notes", "out", "percent", "show_table", "table"]

# Progress and notes go to stderr, so that stdout holds the result alone and can be piped.
notes = Console(stderr=True, highlight=False)
out = Console(highlight=False, soft_wrap=True)

_NO_EDGE = 10_000


def table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()
) -> Table:
    """A table with its columns named; those whose positions are in `numbers` are aligned to the right."""
    made = Table(title=title, title_justify="left", header_style="bold", show_edge=False, pad_edge=False)
    for position, column in enumerate(columns):
        justify: JustifyMethod = "right" if position in numbers else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=position == 0)
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def show_table(shown: Table) -> None:
    """Prints a table with every cell whole.

    A file or a pipe has no edge. A window narrower than the table wraps its lines, where rich would shorten names and
    numbers to an ellipsis.
    """
    needed = Measurement.get(out, out.options.update(max_width=_NO_EDGE), shown)
    width = max(out.width, needed.minimum) if out.is_terminal else needed.maximum
    Console(highlight=False, soft_wrap=True, file=out.file, width=width).print(shown)
