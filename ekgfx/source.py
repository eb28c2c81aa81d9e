"""The MODEL argument: `timm:NAME`, `package.module:factory`, `path/file.py:factory` or a run directory → a model."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx import named
from ekgfx.errors import EkgfxError, ModelError
from ekgfx.recipe import Recipe
from ekgfx.weights import create_pretrained, load_weights

Normalization = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Built:
    """A model that can be called on its example inputs."""

    model: nn.Module
    example_inputs: tuple[Tensor, ...]
    weights_origin: str
    """Where the weights come from, in words; begins with "random" where they are."""
    normalization: Normalization | None = None
    """(mean, std) per channel of images on [0, 1]; None if the model does not say."""
    crop_pct: float | None = None
    """Share of the short side that evaluation crops keep; None if the model does not say."""
    interpolation: str | None = None
    leaf: tuple[str, ...] = ()
    """Modules that have to run as they are, where the model is a run that says so."""
    outputs: tuple[str, ...] = ()
    """Outputs that matter, where the model is a run that says so."""

    @property
    def data_options(self) -> dict[str, Any]:
        """What `ekgfx.data.load` should know of the model: image_size, channels, mean, std, crop_pct, interpolation."""
        options: dict[str, Any] = {"crop_pct": self.crop_pct, "interpolation": self.interpolation}
        if self.normalization is not None:
            options["mean"], options["std"] = self.normalization
        if self.example_inputs[0].ndim == 4:
            options["image_size"] = tuple(self.example_inputs[0].shape[2:])
            options["channels"] = self.example_inputs[0].shape[1]
        return {key: value for key, value in options.items() if value is not None}


@dataclass(frozen=True)
class Source:
    """How to build a model. A plain value: `describe` and `from_description` take it through JSON."""

    model: str
    weights: str = "auto"
    """`auto` (timm's pre-trained; a factory's own), `none`, or a file."""
    input: str | None = None
    """Shapes of the example inputs, such as "1x3x32x32" or "1x3x32x32,1x10"."""
    classes: int | None = None
    ema: bool = False
    """Of a file with several state dicts, take the moving average of the weights."""

    def build(self) -> Built:
        """Builds the model, in evaluation mode. Random weights come from torch's global generator.

        Raises:
            ModelError: it cannot be built, or the weights do not fit.
        """
        if self.is_run:
            return importlib.import_module("ekgfx.checkpoint").load_run(Path(self.model))
        file = None if self.weights in ("auto", "none") else Path(self.weights).expanduser()
        if self.model.startswith("timm:"):
            model, origin = _build_timm(self, pretrained=self.weights == "auto")
            inputs = None
        else:
            model, inputs = _call_factory(self)
            origin = f"as {self.model} makes them"
        if file is not None:
            taken = load_weights(model, file, ema=self.ema)
            origin = f"file {file.name}" + (f" ({taken})" if taken else "")
        config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}  # timm's protocol, also ours
        return Built(
            model.eval(),
            _example_inputs(self, inputs, config),
            origin,
            (tuple(config["mean"]), tuple(config["std"])) if "mean" in config and "std" in config else None,
            config.get("crop_pct"),
            config.get("interpolation"),
        )

    @property
    def is_run(self) -> bool:
        return (Path(self.model) / "run.json").is_file()

    def without_weights(self) -> "Source":
        """The same architecture, for weights that are loaded afterwards: nothing is fetched or read."""
        return replace(self, weights="none")

    def timm_options(self) -> dict[str, Any]:
        """What `timm.create_model` gets besides the name, where the model is timm's."""
        from timm.models import get_pretrained_cfg

        options: dict[str, Any] = {} if self.classes is None else {"num_classes": self.classes}
        config = get_pretrained_cfg(self.model.removeprefix("timm:"))
        if self.input is not None and config is not None:
            _, channels, *size = (*_shapes(self.input)[0], 0, 0)[:4]
            if channels != config.input_size[0]:
                options["in_chans"] = channels
            if config.fixed_input_size and tuple(size) != config.input_size[1:]:
                options["img_size"] = tuple(size)
        return options

    def describe(self) -> dict[str, Any]:
        """JSON values that build the same model from another working directory; `from_description` reads them."""
        return asdict(self)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Source":
        return cls(**description)


def parse(
    model: str, weights: str = "auto", input: str | None = None, classes: int | None = None, ema: bool = False
) -> Source:
    """Reads a MODEL argument; paths become absolute.

    Raises:
        ModelError: an unknown name, form or file, or an input that is no shape; says what was probably meant.
    """
    if input is not None:
        _shapes(input)
    if weights not in ("auto", "none"):
        weights = str(Path(weights).expanduser().absolute())
    named.check_model(model)
    place, _, factory = model.rpartition(":")
    if model.startswith("timm:"):
        _check_tag(model.removeprefix("timm:"))
    elif Path(model).is_dir():
        model = str(Path(model).absolute())
    elif place.endswith(".py"):
        model = f"{Path(place).expanduser().absolute()}:{factory}"
    return Source(model, weights, input, classes, ema)


def of_recipe(recipe: Recipe) -> Source:
    """The source of a recipe's model, as `parse` reads it."""
    return parse(recipe.model or "", recipe.weights, recipe.input, recipe.classes, recipe.ema)


def _check_tag(name: str) -> None:
    import timm

    architecture, _, tag = name.partition(".")
    tags = [other.partition(".")[2] for other in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ModelError(f"timm has no weights '{tag}' for {architecture}: use one of {', '.join(tags) or 'none'}")


def _build_timm(source: Source, pretrained: bool) -> tuple[nn.Module, str]:
    import timm

    name, options = source.model.removeprefix("timm:"), source.timm_options()
    if pretrained:
        return create_pretrained(name, options)
    try:
        return timm.create_model(name, **options), "random (--weights none)"
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"timm cannot build {name} with {options}: {error}") from error


def _call_factory(source: Source) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    place, _, name = source.model.rpartition(":")
    factory = _find(_import(place), name, source.model)
    arguments: dict[str, Any] = {}
    if source.classes is not None:
        if "num_classes" not in inspect.signature(factory).parameters:
            raise ModelError(
                f"factory {source.model} has no parameter num_classes, so it cannot take {source.classes} classes"
            )
        arguments["num_classes"] = source.classes
    try:
        made = factory(**arguments)
    except EkgfxError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"factory {source.model} failed: {type(error).__name__}: {error}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    fits = inputs is None or (isinstance(inputs, tuple) and inputs and all(isinstance(x, Tensor) for x in inputs))
    if not isinstance(model, nn.Module) or not fits:
        raise ModelError(
            f"factory {source.model} returned {type(made).__name__}: return the model (a torch.nn.Module), or "
            "(model, example_inputs) with a tuple of tensors"
        )
    return model, inputs


def find_function(place: str) -> Callable[..., Any]:
    """What `package.module:function` or `path/file.py:function` names.

    Raises ModelError when there is no such file, module or function.
    """
    where, _, name = place.rpartition(":")
    if not where or not name:
        raise ModelError(f"'{place}' names no function: use package.module:function or path/file.py:function")
    if where.endswith(".py"):
        where = str(Path(where).expanduser().absolute())
    return _find(_import(where), name, place, "function")


def _find(module: ModuleType, name: str, model: str, kind: str = "factory") -> Callable[..., Any]:
    known = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    if name in known:
        return known[name]
    raise ModelError(named.no_function(name, known, model.rpartition(":")[0], kind))


def _import(place: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _import_file(Path(place), Path(place).stat().st_mtime_ns)
        return importlib.import_module(place)
    except EkgfxError:
        raise
    except Exception as error:  # the user's module may raise anything
        raise ModelError(f"cannot import '{place}': {type(error).__name__}: {error}") from error


@cache
def _import_file(path: Path, changed: int) -> ModuleType:
    """Imports a file once for each of its versions (`changed`: its time stamp), so that its classes stay the same."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # a file may import its neighbours, as a script may
    spec = importlib.util.spec_from_file_location(f"ekgfx_model_{path.stem}_{changed}", path)
    if spec is None or spec.loader is None:
        raise ModelError(f"'{path}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _example_inputs(source: Source, inputs: tuple[Tensor, ...] | None, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """`--input` before the factory's own before the model's `input_size`; random normal, the same every time."""
    if source.input is not None:
        shapes = _shapes(source.input)
    elif inputs is not None:
        return inputs
    elif "input_size" in config:
        shapes = [(1, *config["input_size"])]
    else:
        raise ModelError(f"{source.model} does not say what input it takes: use --input, such as --input 1x3x224x224")
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=draw) for shape in shapes)


def _shapes(text: str) -> list[tuple[int, ...]]:
    """ "1x3x32x32,1x10" → [(1, 3, 32, 32), (1, 10)]"""
    try:
        shapes = [tuple(int(side) for side in shape.split("x")) for shape in text.split(",")]
    except ValueError:
        shapes = []
    if not shapes or any(side < 1 for shape in shapes for side in shape):
        raise ModelError(f"input '{text}' is no shape: write 1x3x32x32, and more inputs after commas")
    return shapes
