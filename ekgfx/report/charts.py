"""Charts as inline SVG: lines over steps, columns along the network, paired bars, and a square of shades.

Colours and fonts come from the page's style sheet through classes, so that a chart follows light and dark; a `title` in
each mark is what a browser shows on hovering.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from ekgfx.base.units import human
from ekgfx.report.markup import element

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 20, 38
DOTS = 4000
"""Most faint dots that a chart shows; of more, every n-th."""

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """A named line through (x, y) points. dots: further points behind it, such as candidates that were not taken."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: Sequence[tuple[float, float]] = ()


def lines(
    label: str,
    shown: Sequence[Line],
    *,
    x: str,
    marks: Sequence[tuple[str, float]] = (),
    form: Format = "{:.4g}".format,
) -> Element:
    """Lines over whole numbers. label: what the chart shows, for those who cannot see it; x: the axis's name;
    marks: named horizontal lines; form: how values are written."""
    finite = [(a, b) for line in shown for a, b in [*line.points, *line.dots] if math.isfinite(b)]
    heights = [b for _, b in finite] + [value for _, value in marks if math.isfinite(value)]
    low, high = _padded(min(heights, default=0.0), max(heights, default=1.0))
    across = _scale(min(a for a, _ in finite), max(a for a, _ in finite), LEFT, WIDTH - RIGHT) if finite else _nowhere
    up = _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = _frame([(up(tick), form(tick)) for tick in ticks(low, high)])
    if finite:
        first, last = min(a for a, _ in finite), max(a for a, _ in finite)
        parts += [_below(across(t), f"{t:g}") for t in ticks(first, last, 6) if t == int(t)]
    parts.append(element("text", x, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, class_="axis middle"))
    for name, value in marks:
        y = _round(up(value))
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="mark"))
        parts.append(element("text", name, x=LEFT + 4, y=y - 5, class_="halo"))
    for number, line in enumerate(shown):
        kind = f"s{number}"
        points = [(across(a), up(b)) for a, b in line.points if math.isfinite(b)]
        dots = [(across(a), up(b)) for a, b in line.dots if math.isfinite(b)][:: max(1, len(line.dots) // DOTS)]
        if dots:
            parts.append(element("path", d="".join(f"M{_round(a)} {_round(b)}h0" for a, b in dots), class_="faint"))
        path = "M" + "L".join(f"{_round(a)} {_round(b)}" for a, b in points)
        if len(points) > 1:
            parts.append(element("path", d=path, class_=f"line {kind}"))
        for (a, b), (step, value) in zip(points, (p for p in line.points if math.isfinite(p[1])), strict=True):
            if len(points) <= 60:
                hint = element("title", f"{line.name}, {x} {step:g}: {form(value)}")
                parts.append(element("circle", hint, cx=_round(a), cy=_round(b), r=3, class_=f"dot {kind}"))
    return _svg(label, HEIGHT, parts)


@dataclass(frozen=True)
class Spot:
    """A named point with the interval of its height. marked: with its name beside it."""

    name: str
    x: float
    y: float
    interval: tuple[float, ...] | None = None
    marked: bool = False


def spots(label: str, shown: Sequence[Spot], *, x: str, form: Format, across_form: Format) -> Element:
    """A curve through points, from left to right, with error bars. x: the axis's name; form, across_form: how heights
    and places on that axis are written."""
    shown = sorted(shown, key=lambda spot: spot.x)
    heights = [value for spot in shown for value in (spot.y, *(spot.interval or ()))]
    low, high = _padded(min(heights, default=0.0), max(heights, default=1.0))
    left, right = _padded(min((s.x for s in shown), default=0.0), max((s.x for s in shown), default=1.0))
    across, up = _scale(left, right, LEFT, WIDTH - RIGHT), _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = _frame([(up(tick), form(tick)) for tick in ticks(low, high)])
    parts += [_below(across(tick), across_form(tick)) for tick in ticks(left, right)]
    parts.append(element("text", x, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, class_="axis middle"))
    path = "M" + "L".join(f"{_round(across(spot.x))} {_round(up(spot.y))}" for spot in shown)
    parts += [element("path", d=path, class_="line s0")] if len(shown) > 1 else []
    for spot in shown:
        at, y = _round(across(spot.x)), _round(up(spot.y))
        if spot.interval:
            bottom, top = (_round(up(value)) for value in spot.interval)
            parts.append(element("line", x1=at, x2=at, y1=bottom, y2=top, class_="bar"))
        hint = element("title", f"{spot.name}: {form(spot.y)} at {across_form(spot.x)}")
        parts.append(element("circle", hint, cx=at, cy=y, r=5 if spot.marked else 3, class_="dot s0"))
        if spot.marked:
            end = at > (LEFT + WIDTH) / 2
            kind = "halo end" if end else "halo"
            parts.append(element("text", spot.name, x=at + (-8 if end else 8), y=y + 16, class_=kind))
    return _svg(label, HEIGHT, parts)


def columns(
    label: str, shown: Sequence[tuple[str, int, int]], unit: str, form: Format | None = None, height: int = 230
) -> Element:
    """(name, before, after) in the order of the network: a column each, what was kept of it filled. unit: of before and
    after; form: how their values are written on the axis, None shows the share that was kept instead."""
    width, bottom = 940, 22
    top = 100.0 if form is None else float(max((before for _, before, _ in shown), default=0) or 1)
    up = _scale(0, top, height - bottom, TOP)
    levels = [(up(tick), f"{tick:g}%" if form is None else form(tick)) for tick in ticks(0, top, 4)]
    parts = _frame(levels, width)
    pitch = (width - LEFT - RIGHT) / max(len(shown), 1)
    gap = min(4.0, 0.25 * pitch)
    for number, (name, before, after) in enumerate(shown):
        share = after / before if before else 1.0
        whole = top if form is None else before
        hint = f"{name}: {human(before)} → {human(after)} {unit} ({100 * share:.1f}% kept)"
        at = {"x": _round(LEFT + number * pitch + gap / 2), "width": _round(min(pitch, 90) - gap)}
        marks = [
            element("rect", **at, y=_round(up(value)), height=_round(up(0) - up(value)), rx=2, class_=kind)
            for kind, value in (("whole", whole), ("kept", whole * share))
        ]
        parts.append(element("g", element("title", hint), *marks))
    parts.append(element("text", "input", x=LEFT, y=height - 4, class_="axis"))
    parts.append(element("text", "output", x=width - RIGHT, y=height - 4, class_="axis end"))
    return _svg(label, height, parts, width)


def bars(label: str, shown: Sequence[tuple[str, Sequence[tuple[str, float]]]], form: Format) -> Element:
    """Groups of horizontal bars on one scale each: (title, ((name, value), …)). The first is the reference."""
    parts, y, left = [], 4.0, 74
    for title, values in shown:
        parts.append(element("text", title, x=0, y=_round(y + 14), class_="axis strong"))
        y += 22
        largest = max((value for _, value in values), default=0.0) or 1.0
        for number, (name, value) in enumerate(values):
            length = (WIDTH - left - 84) * value / largest
            parts.append(element("text", name, x=left - 8, y=_round(y + 14), class_="axis end"))
            kind = "whole" if number == 0 else "kept"
            parts.append(element("rect", x=left, y=_round(y), width=_round(length), height=19, rx=3, class_=kind))
            parts.append(element("text", form(value), x=_round(left + length + 6), y=_round(y + 14), class_="value"))
            y += 24
        y += 10
    return _svg(label, y, parts)


def square(label: str, names: Sequence[str], shares: Sequence[Sequence[float]]) -> Element:
    """A matrix of shares between 0 and 1, darker where they are larger, with its values written in."""
    left, top = 66, 26
    cell = min(64.0, (WIDTH - left - RIGHT) / max(len(names), 1))
    low = min((share for row in shares for share in row), default=0.0)
    parts = []
    for i, row in enumerate(shares):
        middle = _round(top + (i + 0.5) * 0.62 * cell + 4)
        parts.append(element("text", names[i], x=left - 8, y=middle, class_="axis end"))
        parts.append(element("text", names[i], x=_round(left + (i + 0.5) * cell), y=top - 8, class_="axis middle"))
        for j, share in enumerate(row):
            strength = 0.15 + 0.85 * (share - low) / ((1 - low) or 1)
            x, y = _round(left + j * cell), _round(top + i * 0.62 * cell)
            size = {"width": _round(cell - 2), "height": _round(0.62 * cell - 2), "rx": 3}
            hint = element("title", f"{names[i]} and {names[j]}: {100 * share:.2f}%")
            parts.append(element("rect", hint, x=x, y=y, **size, class_="shade", fill_opacity=f"{strength:.2f}"))
            if cell >= 34:
                written = {
                    "x": _round(x + cell / 2 - 1),
                    "y": middle,
                    "class_": "middle on" if strength > 0.6 else "middle",
                }
                parts.append(element("text", f"{100 * share:.0f}" if share < 0.9995 else "100", **written))
    return _svg(label, top + 0.62 * cell * len(names) + 6, parts)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` + 1 of them."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """[low, high] → [start, end]; the middle where both ends are one."""
    if not high > low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _nowhere(value: float) -> float:
    return float(LEFT)


def _frame(levels: Sequence[tuple[float, str]], width: int = WIDTH) -> list[Element]:
    """Horizontal grid lines with their values."""
    parts = []
    for y, text in levels:
        parts.append(element("line", x1=LEFT, x2=width - RIGHT, y1=_round(y), y2=_round(y), class_="grid"))
        parts.append(element("text", text, x=LEFT - 8, y=_round(y + 4), class_="axis end"))
    return parts


def _below(x: float, text: str) -> Element:
    return element("text", text, x=_round(x), y=HEIGHT - BOTTOM + 17, class_="axis middle")


def _round(value: float) -> float:
    return round(value, 1)


def _svg(label: str, height: float, parts: Sequence[Element], width: int = WIDTH) -> Element:
    return element("svg", element("title", label), *parts, viewBox=f"0 0 {width} {_round(height)}", role="img")
