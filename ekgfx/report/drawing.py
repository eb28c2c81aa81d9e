"""A traced model as a picture: what computes channels, where branches meet, and a colour for every channel group.

The picture is one SVG file with its own style, for light and dark. Boxes stand in layers, each below all that it reads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from ekgfx.axes import Axis, axes
from ekgfx.base.files import write_text
from ekgfx.report.markup import element, picture, plain
from ekgfx.tracing.traced import TracedModel

BOX, HIGH, GAP, PITCH = 206, 30, 22, 58
"""Width and height of a box, the gap between two beside each other, the distance of two layers; pixels."""
GOLDEN = 137.508
"""Degrees between the hues of successive groups: no two of a few dozen look alike."""
STYLE = """
text { font: 11.5px system-ui, "Segoe UI", "Liberation Sans", sans-serif; fill: #1a1f29; }
.small { font-size: 10px; fill: #5b6575; }
.title { font-size: 14px; font-weight: 650; }
.box { fill: #ffffff; stroke: #b9c1cd; }
.edge { fill: none; stroke: #8792a3; stroke-width: 1.3; }
.back { fill: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  text { fill: #e7eaf0; } .small { fill: #9aa5b6; } .box { fill: #191e27; stroke: #3c4656; }
  .edge { stroke: #6b778a; } .back { fill: #11141a; }
}
"""


@dataclass(eq=False)
class Box:
    """One thing drawn. reads: boxes above it; groups: of its output; place: layer and column."""

    label: str
    detail: str
    groups: tuple[str, ...]
    reads: list["Box"] = field(default_factory=list)
    layer: int = 0
    column: float = 0.0

    @property
    def x(self) -> float:
        return self.column * (BOX + GAP)

    @property
    def y(self) -> float:
        return self.layer * PITCH


def boxes(traced: TracedModel) -> list[Box]:
    """What is drawn, in the order of the graph, in its layers: inputs, every operator that computes channels anew from
    a weight, every operator that reads two or more values of the data, and the output."""
    names = {group.axis: name for name, group in traced.groups.items()}
    carried: dict[fx.Node, tuple[Box, ...]] = {}  # node of the data → the boxes whose values it holds
    made = []
    for node in traced.graph.nodes:
        above = tuple(dict.fromkeys(box for source in node.all_input_nodes for box in carried.get(source, ())))
        branches = sum(source in carried for source in node.all_input_nodes)
        if node.op == "placeholder" and node.name in traced.inputs:
            box = Box(f"input {traced.inputs.index(node.name) + 1}" if len(traced.inputs) > 1 else "input", "", ())
        elif node.op == "output":
            box = Box("output", "", ())
        elif not above:
            continue
        elif (label := _label(traced, node, branches)) is not None:
            found = dict.fromkeys(names[axis] for axis in _axes(traced, node) if axis in names)
            box = Box(label, _detail(node), tuple(found))
        else:
            carried[node] = above
            continue
        box.reads = list(above)
        box.layer = max((read.layer + 1 for read in above), default=0)
        carried[node] = (box,)
        made.append(box)
    _arrange(made)
    return made


def _label(traced: TracedModel, node: fx.Node, branches: int) -> str | None:
    """The weight's module, or the operator's name where branches meet; None for what is not drawn."""
    operation = traced.operation(node)
    if operation is None:
        return None
    if operation.effect.produces is not None:
        weight = traced.root_weight(operation.args[operation.effect.produces[0]])
        if weight is not None:
            return weight.removesuffix(".weight")
    if branches < 2:
        return None
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0].strip("_")


def _detail(node: fx.Node) -> str:
    value: Any = node.meta.get("val")
    return "×".join(map(str, value.shape[1:])) if hasattr(value, "shape") else ""


def _axes(traced: TracedModel, node: fx.Node) -> Iterator[Axis]:
    for dims in traced.tensors.get(node.name, ()):
        for dim in dims:
            yield from axes(dim)


def _arrange(made: Sequence[Box]) -> None:
    """Columns: under the mean of what a box reads, pushed to the right of its neighbours; then every layer centred."""
    layers: dict[int, list[Box]] = {}
    for box in made:
        layers.setdefault(box.layer, []).append(box)
    for layer in sorted(layers):
        row = layers[layer]
        wish = {id(box): sum(read.column for read in box.reads) / max(len(box.reads), 1) for box in row}
        row.sort(key=lambda box: wish[id(box)])  # called at once
        for before, box in zip([None, *row], row, strict=False):
            box.column = wish[id(box)] if before is None else max(wish[id(box)], before.column + 1)
        shift = sum(wish.values()) / len(row) - sum(box.column for box in row) / len(row)
        for box in row:
            box.column += shift
    left = min((box.column for box in made), default=0.0)
    for box in made:
        box.column -= left


def draw(traced: TracedModel, title: str) -> str:
    """The picture as the text of an SVG file; every name in it is escaped."""
    made = boxes(traced)
    hues = {name: f"hsl({number * GOLDEN % 360:.0f} 62% 52%)" for number, name in enumerate(traced.groups)}
    bulges = [_bulge(box, read) for box in made for read in box.reads]
    left, top = 24.0, 56.0
    wide = max((box.x for box in made), default=0) + BOX + max(bulges, default=0) + 40
    tall = max((box.y for box in made), default=0) + HIGH
    rows = len(hues)
    per_column = max(12, int(tall // 19))
    legend = 250 * -(-rows // per_column)
    width, height = left + wide + legend + 8, top + max(tall, 19 * min(rows, per_column) + 24) + 24
    parts = [element("rect", width=width, height=height, class_="back")]
    parts.append(element("text", title, x=left, y=28, class_="title"))
    unit = f"{len(hues)} channel groups; a band shows the group of what a box computes, grey: not prunable"
    parts.append(element("text", unit, x=left, y=44, class_="small"))
    parts += [element("path", d=_path(box, read, left, top), class_="edge") for box in made for read in box.reads]
    for box in made:
        parts += _drawn(box, left, top, hues)
    for number, (name, hue) in enumerate(hues.items()):
        x, y = left + wide + 250 * (number // per_column), top + 19 * (number % per_column)
        parts.append(element("rect", x=x, y=y, width=12, height=12, rx=3, fill=hue))
        text = f"{_short(name, 26)}  {traced.groups[name].size}"
        parts.append(element("text", element("title", name), text, x=x + 18, y=y + 10))
    return picture(title, STYLE, width, height, *parts)


def write(traced: TracedModel, title: str, file: Path) -> None:
    """Writes the picture to `file`."""
    write_text(file, draw(traced, plain(title)))


def _drawn(box: Box, left: float, top: float, hues: dict[str, str]) -> list:
    x, y = left + box.x, top + box.y
    hint = f"{box.label}  {box.detail}  {', '.join(box.groups) or 'no prunable channels'}"
    parts = [element("rect", element("title", hint), x=x, y=y, width=BOX, height=HIGH, rx=6, class_="box")]
    bands = [hues[name] for name in box.groups] or ["#8792a355"]
    for number, hue in enumerate(bands):
        band = {"x": f"{x + 6 + number * (BOX - 12) / len(bands):.1f}", "width": f"{(BOX - 12) / len(bands):.1f}"}
        parts.append(element("rect", **band, y=y + HIGH - 7, height=4, rx=2, fill=hue))
    parts.append(element("text", _short(box.label, int((BOX - 22 - 5.8 * len(box.detail)) / 6.4)), x=x + 8, y=y + 17))
    parts.append(element("text", box.detail, x=x + BOX - 8, y=y + 17, class_="small", text_anchor="end"))
    return parts


def _bulge(box: Box, read: Box) -> float:
    """How far an edge that passes layers swings out to the right; 0 between neighbours."""
    passed = box.layer - read.layer
    return 0.0 if passed <= 1 else 26 + 9 * min(passed, 12)


def _path(box: Box, read: Box, left: float, top: float) -> str:
    x0, y0 = left + read.x + BOX / 2, top + read.y + HIGH
    x1, y1 = left + box.x + BOX / 2, top + box.y
    out = _bulge(box, read)
    if not out:
        middle = (y0 + y1) / 2
        return f"M{x0:.1f} {y0:.1f}C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    side = max(x0, x1) + BOX / 2 + out
    start, end = f"{x0 + BOX / 2:.1f} {y0 - HIGH / 2:.1f}", f"{x1 + BOX / 2:.1f} {y1 + HIGH / 2:.1f}"
    return f"M{start}C{side:.1f} {y0 - HIGH / 2:.1f} {side:.1f} {y1 + HIGH / 2:.1f} {end}"


def _short(text: str, most: int) -> str:
    """The end of a long name: there it differs from its neighbours'."""
    return text if len(text) <= most else f"…{text[1 - most :]}"
