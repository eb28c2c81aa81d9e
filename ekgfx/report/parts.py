"""What the page's sections are made of: headings, cards and tables."""

from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

from ekgfx.report.markup import Child, element


def section(title: str, *children: Child) -> Element:
    """A section of the page, under its heading."""
    return element("section", element("h2", title), *children)


def figure(title: str, chart: Element) -> Element:
    """A chart on a card, under its name."""
    return element("figure", element("figcaption", title), chart, class_="card")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> Element:
    """A table that scrolls where it is too wide. texts: how many columns at the left are words, not figures."""
    place: Callable[[int], str | None] = lambda column: None if column < texts else "number"  # noqa: E731
    head = element("tr", *(element("th", name, class_=place(column)) for column, name in enumerate(header)))
    body = [element("tr", *(element("td", text, class_=place(n)) for n, text in enumerate(row))) for row in rows]
    parts = [element("thead", head)] if any(header) else []
    return element("div", element("table", *parts, element("tbody", *body)), class_="scroll")


def share(now: float, before: float) -> str:
    """What is left of a figure, in percent."""
    return f"{100 * now / before:.1f}%" if before else "–"
