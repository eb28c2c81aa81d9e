"""Python source for values, sizes and names: what a written forward is spelled from."""

import contextlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree


def plain(spec: pytree.TreeSpec) -> bool:
    """Whether nested containers are tuples, lists and dicts only."""
    return spec.is_leaf() or (spec.type in (tuple, list, dict) and all(map(plain, spec.children())))


def written(value: Any) -> str:
    """Nested tuples, lists and dicts of texts as one text."""
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {written(v)}" for k, v in value.items()) + "}"
    return str(value)


def access(key: Any) -> str:
    if isinstance(key, pytree.SequenceKey):
        return f"[{key.idx}]"
    return f"[{key.key!r}]" if isinstance(key, pytree.MappingKey) else f".{key.name}"


def attribute(name: str) -> str:
    """What `self` holds under a qualified name."""
    text = "self"
    for step in name.split("."):
        text = f"{text}.{step}" if step.isidentifier() else f"getattr({text}, {step!r})"
    return text


def variable(name: str) -> str:
    """A name for what the module of that name returns."""
    last = name.rpartition(".")[2]
    return last if last.isidentifier() else re.sub(r"\W", "_", f"out_{name}")


def literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    return repr(value)


def scaled(expr: Any, old: int, new: int) -> Any:
    """An expression of sizes for what has changed from `old` to `new` in the example, in proportion for whatever
    inputs; None where it has no factor that can be exchanged."""
    if old == new:
        return expr
    factor, rest = expr.as_coeff_Mul()
    changed, left = divmod(factor * new, old)
    return None if left else changed * rest


_FUNCTIONS = {"FloorDiv": "//", "CleanDiv": "//", "Mod": "%", "PythonMod": "%"}


def spelled(expr: Any, known: Mapping[Any, str]) -> str:
    """An expression of sizes as Python, over the sizes at hand. Raises KeyError: they do not give it."""
    if expr in known:
        return known[expr]
    if expr.is_Integer:
        return str(expr)
    kind = type(expr).__name__
    if expr.is_Symbol:
        for other, text in known.items():  # a multiple of it is at hand
            factor, rest = other.as_coeff_Mul()
            if rest == expr and factor.is_Integer:
                return f"({text} // {factor})"
        raise KeyError(expr)
    for other, text in known.items():
        rest = _without(expr, other)
        if rest is not None:
            with contextlib.suppress(KeyError):
                return f"({text} {'+' if expr.is_Add else '*'} {spelled(rest, known)})"
    parts = [spelled(part, known) for part in expr.args]
    if expr.is_Add or expr.is_Mul:
        return f"({(' + ' if expr.is_Add else ' * ').join(parts)})"
    if expr.is_Relational:
        return f"({parts[0]} {expr.rel_op} {parts[1]})"
    if kind in ("And", "Or"):
        return f"({f' {kind.lower()} '.join(parts)})"
    if kind in _FUNCTIONS:
        return f"({f' {_FUNCTIONS[kind]} '.join(parts)})"
    if kind in ("Max", "Min"):
        return f"{'torch.sym_max' if kind == 'Max' else 'torch.sym_min'}({', '.join(parts)})"
    if expr.is_Pow and expr.args[1].is_Integer and expr.args[1] > 0:
        return f"({parts[0]} ** {parts[1]})"
    raise KeyError(expr)


def _without(expr: Any, other: Any) -> Any | None:
    """What is left of a sum or product once another one in it is taken out: `x * y * z` is held as one, though a tensor
    has `y * z`; None where it is not in it."""
    if expr.func is not other.func or not (expr.is_Add or expr.is_Mul):
        return None
    left = list(expr.args)
    for part in other.args:
        if part not in left:
            return None
        left.remove(part)
    return expr.func(*left)


_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*")


def released(lines: list[str], names: Iterable[str], taken: set[str]) -> list[str]:
    """The lines, with every value let go after its last use."""
    last = {word: i for i, line in enumerate(lines[:-1]) for word in _WORD.findall(line)}
    ours = {line.partition(" = ")[0] for line in lines if " = " in line}
    kept = set(_WORD.findall(lines[-1]))
    done: dict[int, list[str]] = {}
    for name in sorted(ours - kept):
        if name in last:
            done.setdefault(last[name], []).append(name)
    return [line + (f"; {' = '.join(done[i])} = None" if i in done else "") for i, line in enumerate(lines)]
