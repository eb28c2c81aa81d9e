"""Command-line flags for settings: type and default come from the recipe's dataclasses, so that they cannot differ."""

import typing
from collections.abc import Callable
from typing import Any, Literal, cast

import click

from ekgfx import recipe
from ekgfx.errors import RecipeError
from ekgfx.units import fraction_of

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


tensorboard = click.option(
    "--tensorboard", is_flag=True, help="Also log to RUN/tensorboard (needs: pip install 'ekgfx[tensorboard]')."
)


def setting(key: str, *flags: str, help: str, metavar: str | None = None) -> Decorator:
    """A flag that sets the recipe's `key` (dotted). Not given, it leaves the recipe as it is."""
    hint, default = recipe.declared(key)
    many = typing.get_origin(hint) is tuple
    shown = "" if many or default is None or default == "" else f"  [default: {default}]"
    name = key.replace(".", "__")
    if hint is bool and not any("/" in flag for flag in flags):
        return click.option(name, *flags, is_flag=True, default=None, help=help)
    return click.option(name, *flags, type=_type(hint), multiple=many, default=None, metavar=metavar, help=help + shown)


def given(parameters: dict[str, Any]) -> dict[str, Any]:
    """The settings that were typed, by dotted key; None and empty tuples were not."""
    return {name.replace("__", "."): value for name, value in parameters.items() if value not in (None, ())}


class _Amount(click.ParamType):
    """A fraction, or an amount as text, which the recipe knows or refuses."""

    name = "amount"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float | str:
        try:
            return cast(float, fraction_of(str(value)))
        except RecipeError:
            return str(value)


class _Number(click.ParamType):
    """A whole number, or a word that the recipe knows or refuses."""

    name = "number"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int | str:
        return int(value) if str(value).isdecimal() else str(value)


def _type(hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return click.Choice(arguments)
    if int in arguments and any(
        typing.get_origin(part) is Literal for part in arguments
    ):  # `int | Literal["auto"] | None`
        return _Number()
    if {float, str} <= set(arguments):
        return _Amount()
    if origin is not None:  # `int | None`, `tuple[str, ...]`
        return _type(arguments[0])
    return hint
