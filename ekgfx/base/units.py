"""How figures are written; the same words and units in the terminal, in reports and in documents."""

import re

from ekgfx.errors import RecipeError

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "kB": 10**3, "MB": 10**6, "GB": 10**9}
"""Bytes in a unit of memory."""

_COUNTS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_TIMES = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
AMOUNTS = {"flops": _COUNTS, "params": {**_COUNTS, "B": 1e9}, "latency": _TIMES}
"""Units of a budget that is an amount: of MACs per sample, parameters, milliseconds of a run."""
_EXAMPLES = {"flops": "2.0G", "params": "5M", "latency": "8ms"}


def budget_of(kind: str, value: float | str) -> tuple[float, bool]:
    """A budget: a fraction to keep, in (0, 1), or an amount such as "2.0G", "5M" or "8ms".

    kind: "flops", "params" or "latency". Returns the number (of MACs, parameters or milliseconds for an amount), and
    whether it is an amount. RecipeError for anything else.
    """
    text, example = str(value).strip(), _EXAMPLES[kind]
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})\s*([a-zA-Zµ]+)", text)
    if match is not None and match[2] in AMOUNTS[kind]:
        amount = float(match[1]) * AMOUNTS[kind][match[2]]
        if amount > 0:
            return amount, True
    try:
        fraction = fraction_of(text)
    except RecipeError:
        raise RecipeError(
            f"{kind}: {text[:80]!r} is no fraction and no amount; write what is kept as 0.55 or 55%, or an amount such "
            f"as {example}"
        ) from None
    if fraction is None or not 0 < fraction < 1:
        hint = f"; did you mean {fraction:g}%?" if fraction is not None and 1 < fraction < 100 else ""
        raise RecipeError(
            f"{kind} is the fraction to keep, between 0 and 1 (0.55 keeps 55%), or an amount such as {example}; "
            f"got {text[:80]}{hint}"
        )
    return fraction, False


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


def fraction_of(value: float | str | None) -> float | None:
    """A fraction as a number: 0.55, "0.55" and "55%" are one; None stays None. RecipeError for other text."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d*\.?\d+|\d+\.)\s*(%?)\s*", value)
    if match is None:
        raise RecipeError(f"{value[:80]!r} is no fraction; write what is kept as 0.55 or 55%")
    return float(match[1]) / 100 if match[2] else float(match[1])


def bytes_of(size: str | int) -> int:
    """A number of bytes: 2147483648, "2GiB", "500 MB", "0". RecipeError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", str(size))
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise RecipeError(f"{str(size)[:80]!r} is no size of memory; write it as 2GiB, 500MiB or 0")
    return int(float(match[1]) * units[match[2].lower()])


def several(count: int, thing: str, many: str = "") -> str:
    """A number of things in words.

    many: more than one of them, where that is not thing with an s.

    Example:
        >>> several(1, "image"), several(1200, "image"), several(0, "class", "classes")
        ('1 image', '1,200 images', '0 classes')
    """
    return f"{count:,} {thing if count == 1 else many or thing + 's'}"
