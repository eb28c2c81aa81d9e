"""Command-line flags for settings: type and default come from the recipe's dataclasses, so that they cannot differ."""

import typing
from collections.abc import Callable
from typing import Any, Literal

import click
import yaml

from ekgfx.base.units import fraction_of
from ekgfx.errors import RecipeError
from ekgfx.settings import recipe
from ekgfx.settings.budgets import BUDGETS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _arguments(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any] | None:
    """NAME=VALUE, the value as YAML would read it: numbers, true, lists, else text."""
    found = {}
    for text in values:
        name, equals, value = text.partition("=")
        try:
            read = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            read = value
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{text[:80]!r}: use NAME=VALUE, such as drop_path_rate=0.1")
        found[name] = read if isinstance(read, int | float | list | dict | None) else str(value)
    return found or None


def images(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags for how images become the model's input, under timm's names, and for arguments of the model."""
    for flag in reversed(
        (
            setting("preprocessing.img_size", "--img-size", metavar="N", help="Side of the model's images."),
            setting("preprocessing.in_chans", "--in-chans", metavar="N", help="Channels of them."),
            setting("preprocessing.crop_pct", "--crop-pct", metavar="SHARE", help="Share of image files kept; 1: all."),
            setting("preprocessing.mean", "--mean", metavar="M,M,M", help="Mean per channel, of images on [0, 1]."),
            setting("preprocessing.std", "--std", metavar="S,S,S", help="Standard deviation per channel."),
            click.option(
                "--model-kwargs",
                "model_kwargs",
                metavar="NAME=VALUE",
                multiple=True,
                callback=_arguments,
                help="An argument of the model's factory, or of timm's; repeatable.",
            ),
        )
    ):
        command = flag(command)
    return command


def preprocessing_of(flags: dict[str, Any]) -> dict[str, Any]:
    """Takes the flags of `images` out of `flags`: what `ekgfx.models.source.parse` gets for them."""
    from ekgfx.settings.preprocessing import Preprocessing

    names = [name for name in flags if name.startswith("preprocessing__")]
    asked = {name.partition("__")[2]: value for name in names if (value := flags.pop(name)) is not None}
    return {"preprocessing": Preprocessing(**asked), "model_kwargs": flags.pop("model_kwargs")}


def training(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags for which epoch is kept, and for what is done to images and weights meanwhile."""
    for flag in reversed(
        (
            setting(
                "finetune.val_fraction",
                "--val-fraction",
                metavar="SHARE",
                help="Part of the training images that tells which epoch is kept; 0: train on all, keep the last.",
            ),
            setting("finetune.patience", "--patience", metavar="N", help="End after N epochs without a better one."),
            setting("finetune.augment", "--augment/--no-augment", help="Flips, crops and, in two views, colours."),
            setting(
                "finetune.ema", "--ema-decay", metavar="DECAY", help="Keep a moving average of the weights: 0.999."
            ),
            setting("finetune.mixup", "--mixup", metavar="ALPHA", help="Mix images in pairs (mixup)."),
            setting("finetune.cutmix", "--cutmix", metavar="ALPHA", help="Mix images in pairs (CutMix)."),
        )
    ):
        command = flag(command)
    return command


def as_the_run_has_it(command: Callable[..., Any]) -> Callable[..., Any]:
    """Takes the recipe's defaults out of the help of the flags below: what is not typed stays as the run has it."""
    for parameter in getattr(command, "__click_params__", ()):
        if isinstance(parameter, click.Option) and parameter.help:
            parameter.help = parameter.help.partition("  [default: ")[0]
    return command


def logs(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags for where figures are logged to besides the run's own files."""
    for name, help in (
        ("wandb", "Also log to Weights & Biases (needs: pip install wandb)."),
        ("tensorboard", "Also log to RUN/tensorboard (needs: pip install tensorboard)."),
    ):
        command = click.option(f"--{name}", "logger", flag_value=name, default=None, help=help)(command)
    return command


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


class _Numbers(click.ParamType):
    """Numbers with commas or spaces between them."""

    name = "numbers"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).replace(",", " ").split())
        except ValueError:
            self.fail(f"{str(value)[:80]!r}: use numbers with commas, such as 0.485,0.456,0.406", parameter, context)


class _Amount(click.ParamType):
    """A fraction, or an amount as text, or several with commas, which the recipe knows or refuses."""

    name = "amount"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if "," in str(value):
            return tuple(self.convert(part, parameter, context) for part in str(value).split(","))
        try:
            return fraction_of(str(value))
        except RecipeError:
            return str(value).strip()


AMOUNT = _Amount()


def at_budget(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that name one of the budgets of RUN."""
    for key in reversed(BUDGETS):
        said = "Of a run of several budgets, the network of this one." if key == "flops" else "Likewise."
        command = click.option(f"--{key}", type=AMOUNT, metavar="BUDGET", help=said)(command)
    return command


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
        return AMOUNT
    if origin is not tuple and any(typing.get_origin(part) is tuple for part in arguments):
        return _Numbers()
    if origin is not None:  # `int | None`, `tuple[str, ...]`
        return _type(arguments[0])
    return hint
