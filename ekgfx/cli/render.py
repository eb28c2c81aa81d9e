"""How figures and tables look in the terminal; the same words and units everywhere."""

from collections.abc import Iterable, Sequence

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

# Progress and notes go to stderr, so that stdout holds the result alone and can be piped.
notes = Console(stderr=True, highlight=False)
out = Console(highlight=False, soft_wrap=True)


def human(value: float) -> str:
    """Three significant digits and a prefix: 4.12 G, 11.7 M, 940."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            scaled = value / limit
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {prefix}"
    return f"{value:g}"


def change(before: float, after: float) -> str:
    """`4.12 G → 2.26 G (54.9% kept, 45.1% removed)`"""
    kept = round(100 * after / before, 1) if before else 100.0
    return f"{human(before)} → {human(after)} ({kept:.1f}% kept, {100 - kept:.1f}% removed)"


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def percent(fraction: float | None) -> str:
    """`93.84%`, or a dash where there is nothing to measure."""
    return "–" if fraction is None else f"{100 * fraction:.2f}%"


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
