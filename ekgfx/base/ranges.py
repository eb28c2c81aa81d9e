"""Numbers that are out of their range, said by name."""

import math
from typing import Any

from ekgfx.errors import RecipeError


class OutOfRange(RecipeError):
    """A setting that is out of its range. What reads a whole recipe (`ekgfx.base.schema.read`) says of which part."""


def at_least(settings: Any, least: int, *keys: str) -> None:
    """OutOfRange where one of these fields is a number below that; what is None or a word was left out."""
    for key in keys:
        value = getattr(settings, key)
        refuse(settings, key, not isinstance(value, int | float) or least <= value < math.inf, f"at least {least}")


def refuse(settings: Any, key: str, right: bool, allowed: str) -> None:
    """OutOfRange where the field is not right. allowed: what is, in words."""
    if not right:
        raise OutOfRange(f"{key} {getattr(settings, key)}: use {allowed}")
