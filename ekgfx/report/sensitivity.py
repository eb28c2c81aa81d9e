"""What each group costs when it alone is cut, as a picture: a row for each group, a dot for each share."""

from pathlib import Path

from ekgfx.base.files import write_text
from ekgfx.report.charts import ticks
from ekgfx.report.markup import element, picture, plain
from ekgfx.search.sensitivity import Sensitivity

ROW, NAMES, PLOT, TOP = 19, 240, 460, 78
"""Height of a row, widths of the names and of the plot, height above the rows; pixels."""
STYLE = """
text { font: 11.5px system-ui, "Segoe UI", "Liberation Sans", sans-serif; fill: #1a1f29; }
.small { font-size: 10px; fill: #5b6575; }
.title { font-size: 14px; font-weight: 650; }
.back { fill: #f6f7f9; }
.grid { stroke: #dde2e9; }
.row { stroke: #b9c1cd; stroke-width: 2; }
.mark { stroke: #5b6575; stroke-dasharray: 4 3; }
.dot { fill: #2f6fde; stroke: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  text { fill: #e7eaf0; } .small { fill: #9aa5b6; } .back { fill: #11141a; } .grid { stroke: #262d39; }
  .row { stroke: #3c4656; } .mark { stroke: #9aa5b6; } .dot { fill: #6ea2ff; stroke: #11141a; }
}
"""


def draw(found: Sensitivity, title: str) -> str:
    """The picture as the text of an SVG file; every name in it is escaped."""
    values = [found.value(cut.worth) for group in found.groups for cut in group.cuts]
    dense = found.value(found.unpruned)
    low, high = min([dense, *values]), max([dense, *values])
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    width, bottom = NAMES + PLOT + 60, TOP + ROW * len(found.groups)

    def across(value: float) -> float:
        return round(NAMES + PLOT * (value - low) / (high - low), 1)

    def written(value: float) -> str:
        return f"{value:.3g}" if found.measure == "error" else f"{100 * value:.3g}%"

    parts = [
        element("rect", width=width, height=bottom + 24, class_="back"),
        element("text", title, x=24, y=26, class_="title"),
        element("text", plain(found.caption), x=24, y=43, class_="small"),
    ]
    for tick in ticks(low, high):
        at = across(tick)
        parts.append(element("line", x1=at, x2=at, y1=TOP - 8, y2=bottom, class_="grid"))
        parts.append(element("text", written(tick), x=at, y=TOP - 14, class_="small", text_anchor="middle"))
    at = across(dense)
    parts.append(element("line", x1=at, x2=at, y1=TOP - 8, y2=bottom, class_="mark"))
    parts.append(element("text", "unpruned", x=at, y=bottom + 14, class_="small", text_anchor="middle"))
    for number, group in enumerate(found.groups):
        y = TOP + ROW * number + ROW / 2
        name = group.name if len(group.name) <= 34 else f"…{group.name[-33:]}"
        parts.append(element("text", element("title", group.name), name, x=NAMES - 14, y=y + 4, text_anchor="end"))
        reach = [across(found.value(cut.worth)) for cut in group.cuts]
        parts.append(element("line", x1=min(*reach, at), x2=max(*reach, at), y1=y, y2=y, class_="row"))
        for cut, x in zip(group.cuts, reach, strict=True):
            hint = f"{group.name}, {cut.kept} of {group.size} channels: {found.text(cut.worth)}"
            parts.append(
                element("circle", element("title", hint), cx=x, cy=y, r=2.5 + 4 * (1 - cut.share), class_="dot")
            )
    shares = ", ".join(f"{share:.0%}" for share in found.shares)
    legend = f"dots, small to large: {shares} of the group's channels kept"
    parts.append(element("text", legend, x=24, y=bottom + 14, class_="small"))
    return picture(title, STYLE, width, bottom + 24, *parts)


def write(found: Sensitivity, title: str, file: Path) -> None:
    """Writes the picture to `file`."""
    write_text(file, draw(found, plain(title)))
