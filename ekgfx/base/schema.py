"""Plain JSON or YAML values as the dataclasses that describe them, strictly: what a file says is checked once, where it
is read, against the annotations, and is of its type from there on."""

import contextlib
import dataclasses
import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ekgfx.base.ranges import OutOfRange
from ekgfx.errors import EkgfxError

_SHOWN = 80
"""Most characters of a wrong value that a message repeats."""
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, _SHOWN, _SHOWN, _SHOWN
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read(hint: Any, value: object, where: str, error: type[EkgfxError], key: str = "") -> Any:
    """`value` as the annotated type `hint`.

    Takes dataclasses, int, float, str, bool, `Any`, `X | None`, `Literal`, `tuple[X, ...]`, `Sequence[X]` and
    `Mapping[str, X]`, nested. No guessing, except that a whole number may stand where a fraction is due. Numbers must
    be finite, and whole ones of 64 bits.

    where: names the file in messages; key: the value's own name there, dotted. Raises `error` for an unknown key (with
    what was probably meant), a missing one, or a value of another type.
    """
    return _Reader(where, error).convert(hint, value, key)


def show(value: object) -> str:
    """A value as a message repeats it: not more than a line of it. (A YAML file of a few lines can name itself so often
    that its whole text would fill the memory.)"""
    text = _BRIEF.repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 2]} …"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word[:_SHOWN], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The annotated types of a dataclass's fields."""
    found = typing.get_type_hints(cls)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


@dataclass(frozen=True)
class _Reader:
    where: str
    error: type[EkgfxError]

    def build(self, cls: Any, value: object, key: str) -> Any:
        values = self.mapping(value, key)
        prefix, known = f"{key}." if key else "", hints(cls)
        for name in values:
            if name not in known:
                raise self.error(
                    f"unknown key {prefix}{str(name)[:_SHOWN]} in {self.where}{did_you_mean(str(name), known)}"
                )
        for field in dataclasses.fields(cls):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and field.name not in values:
                raise self.error(f"{self.where} has no {prefix}{field.name}")
        parts = {name: self.convert(known[name], part, prefix + name) for name, part in values.items()}
        try:
            return cls(**parts)
        except OutOfRange as error:
            raise self.error(f"{prefix}{error}") from error

    def mapping(self, value: object, key: str) -> Mapping[Any, Any]:
        if not isinstance(value, Mapping):
            place = f"{key} of {self.where}" if key else self.where
            raise self.error(f"{place} must be keys with values, got {show(value)}")
        return value

    def convert(self, hint: Any, value: object, key: str) -> Any:
        if hint is Any:
            return value
        if dataclasses.is_dataclass(hint):
            return self.build(hint, value, key)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):  # the latter from `Literal[…] | None`
            if value is None:
                return None
            *alternatives, last = [part for part in arguments if part is not types.NoneType]
            for part in alternatives:
                with contextlib.suppress(self.error):
                    return self.convert(part, value, key)
            return self.convert(last, value, key)
        if origin is Literal:
            if any(value is known or (type(value) is type(known) and value == known) for known in arguments):
                return value
            raise self.refuse(key, f"one of {', '.join(map(str, arguments))}", value)
        if origin in (tuple, Sequence):
            if isinstance(value, list | tuple):
                return tuple(self.convert(arguments[0], item, key) for item in value)
            raise self.refuse(key, "a list", value)
        if origin is Mapping:
            made = {}
            for name, part in self.mapping(value, key).items():
                made[self.convert(str, name, key)] = self.convert(arguments[1], part, f"{key}.{str(name)[:_SHOWN]}")
            return made
        return self.number_or_text(hint, value, key)

    def number_or_text(self, hint: type, value: object, key: str) -> Any:
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise self.refuse(key, "a number of 64 bits", value)
        if hint is float and type(value) is int:
            return float(value)
        if type(value) is not hint:
            raise self.refuse(key, _KINDS[hint], value)
        if isinstance(value, float) and not math.isfinite(value):
            raise self.refuse(key, "a finite number", value)
        return value

    def refuse(self, key: str, wanted: str, value: object) -> EkgfxError:
        return self.error(f"{key or 'the value'} in {self.where} must be {wanted}; got {show(value)}")
