"""The MODEL argument: a model of a library, a factory, or a run directory → a model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.base import named
from ekgfx.base.schema import read
from ekgfx.errors import ModelError
from ekgfx.models import libraries
from ekgfx.models.factories import IN_CHANNELS, call_factory, torchvision_config
from ekgfx.models.weights import create_pretrained, load_weights
from ekgfx.settings.preprocessing import Preprocessing
from ekgfx.settings.recipe import Recipe

AS_THE_MODEL_SAYS = Preprocessing()
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
    asked: Preprocessing = AS_THE_MODEL_SAYS
    """What was asked for of the images, which goes before what the model says."""

    @property
    def data_options(self) -> dict[str, Any]:
        """What `ekgfx.data.load` should know of the model: image_size, channels, mean, std, crop_pct, interpolation."""
        options: dict[str, Any] = {"interpolation": self.interpolation}
        if self.asked.img_size is None:  # a crop that was made for another size says nothing of this one
            options["crop_pct"] = self.crop_pct
        if self.normalization is not None:
            options["mean"], options["std"] = self.normalization
        if self.example_inputs[0].ndim == 4:
            options["image_size"] = tuple(self.example_inputs[0].shape[2:])
            options["channels"] = self.example_inputs[0].shape[1]
        return {key: value for key, value in options.items() if value is not None} | dict(self.asked.data_options())

    @property
    def origins(self) -> dict[str, str]:
        """Who says what `data_options` holds, in words."""
        return dict.fromkeys(self.data_options, "the model") | dict(self.asked.flags())


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
    preprocessing: Preprocessing = AS_THE_MODEL_SAYS
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the factory, of `timm.create_model`, or of a library's configuration."""

    def build(self) -> Built:
        """Builds the model, in evaluation mode. Random weights come from torch's global generator.

        A run's network comes of its files: `ekgfx.runs.checkpoint.build` makes that too.

        Raises:
            ModelError: it cannot be built, or the weights do not fit.
        """
        file = None if self.weights in ("auto", "none") else Path(self.weights).expanduser()
        told: Mapping[str, Any] = {}
        if self.model.startswith("timm:"):
            model, origin = _build_timm(self, pretrained=self.weights == "auto")
            inputs = None
        elif named.in_library(self.model):
            made = libraries.make(self.model, self.weights == "auto", self._arguments())
            model, origin, inputs, told = made.model, made.origin, made.inputs, made.config
        else:
            model, inputs = call_factory(self.model, self._arguments())
            origin = f"as {self.model} makes them"
        if file is not None:
            taken = load_weights(model, file, ema=self.ema)
            origin = f"file {file.name}" + (f" ({taken})" if taken else "")
        # timm's protocol, also ours
        config: Mapping[str, Any] = told or getattr(model, "pretrained_cfg", None) or torchvision_config(self.model)
        return Built(
            model.eval(),
            _example_inputs(self, inputs, config),
            origin,
            (tuple(config["mean"]), tuple(config["std"])) if "mean" in config and "std" in config else None,
            config.get("crop_pct"),
            config.get("interpolation"),
            asked=self.preprocessing,
        )

    def _arguments(self) -> dict[str, Any]:
        """What a factory of the user's gets."""
        asked = {"num_classes": self.classes, IN_CHANNELS[0]: self.preprocessing.in_chans}
        return {name: value for name, value in asked.items() if value is not None} | dict(self.model_kwargs)

    @property
    def is_run(self) -> bool:
        """Whether the model is that of a run, which is pruned already."""
        return (Path(self.model) / "run.json").is_file()

    def without_weights(self) -> "Source":
        """The same architecture, for weights that are loaded afterwards: nothing is fetched or read."""
        return replace(self, weights="none")

    def timm_options(self) -> dict[str, Any]:
        """What `timm.create_model` gets besides the name, where the model is timm's."""
        from timm.models import get_pretrained_cfg

        options: dict[str, Any] = {} if self.classes is None else {"num_classes": self.classes}
        asked = self.preprocessing
        if asked.in_chans is not None:
            options["in_chans"] = asked.in_chans
        config = get_pretrained_cfg(self.model.removeprefix("timm:"))
        if self.input is not None and config is not None:
            _, channels, *size = (*named.shapes(self.input)[0], 0, 0)[:4]
            if channels != config.input_size[0]:
                options["in_chans"] = channels
            if config.fixed_input_size and tuple(size) != config.input_size[1:]:
                options["img_size"] = tuple(size)
        elif asked.img_size is not None and config is not None and config.fixed_input_size:
            options["img_size"] = asked.img_size
        return {**options, **self.model_kwargs}

    def describe(self) -> dict[str, Any]:
        """JSON values that build the same model from another working directory; `from_description` reads them."""
        return asdict(self)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Source":
        """What `describe` told of. Raises ModelError where it tells something else."""
        source: Source = read(cls, description, "the source", ModelError)
        return source


def parse(
    model: str,
    weights: str = "auto",
    input: str | None = None,
    classes: int | None = None,
    ema: bool = False,
    preprocessing: Preprocessing = AS_THE_MODEL_SAYS,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Source:
    """Reads a MODEL argument; paths become absolute.

    Args:
        model: `timm:NAME`, `hf:NAME|DIR`, `torchvision:NAME`, `package.module:factory`, `path/file.py:factory`, or a
            run's folder.
        weights: "auto" (those that are published), "none" (random ones), or a file.
        input: the shape of the example input, such as `1x3x32x32`; of several inputs joined by commas. None takes what
            the model or its factory says.
        classes: number of the model's outputs, where it is built with another one than its own.
        ema: take the moving average of the weights, where the file has both.
        preprocessing: what of the images' preparation differs from what the model says.
        model_kwargs: further arguments of the factory.

    Returns:
        The source; `build()` makes the model.

    Raises:
        ModelError: an unknown name, form or file, an input that is no shape, no classes; says what was probably meant.

    Example:
        >>> built = ekgfx.models.source.parse("ekgfx.models:digits_cnn").build()
        >>> traced = ekgfx.trace(built.model, built.example_inputs)
    """
    named.check_input(input)
    if classes is not None and classes < 1:
        raise ModelError(f"classes {classes}: use at least 1")
    if weights not in ("auto", "none"):
        weights = str(Path(weights).expanduser().absolute())
    named.check_model(model)
    place, _, factory = model.rpartition(":")
    if model.startswith("timm:"):
        _check_tag(model.removeprefix("timm:"))
    elif named.in_library(model):
        folder = Path(model.partition(":")[2]).expanduser()
        model = f"hf:{folder.absolute()}" if model.startswith("hf:") and folder.is_dir() else model
    elif Path(model).is_dir():
        named.check_of_run(model, weights=weights, input=input, classes=classes, ema=ema, model_kwargs=model_kwargs)
        model = str(Path(model).absolute())
    elif place.endswith(".py"):
        model = f"{Path(place).expanduser().absolute()}:{factory}"
    return Source(model, weights, input, classes, ema, preprocessing, dict(model_kwargs or {}))


def of_recipe(recipe: Recipe) -> Source:
    """The source of a recipe's model, as `parse` reads it."""
    asked, images, options = recipe, recipe.preprocessing, recipe.model_kwargs
    return parse(asked.model or "", asked.weights, asked.input, asked.classes, asked.ema, images, options)


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


def _example_inputs(source: Source, inputs: tuple[Tensor, ...] | None, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """`--input` before the factory's own before the model's `input_size`; of images, with the size and channels that
    are asked for; random normal, the same every time."""
    asked = source.preprocessing
    resized = asked.img_size is not None or asked.in_chans is not None
    if source.input is not None:
        shapes = named.shapes(source.input)
    elif inputs is not None:
        if not resized:
            return inputs
        shapes = [tuple(value.shape) for value in inputs]
    elif "input_size" in config:
        shapes = [(1, *config["input_size"])]
    elif asked.img_size is not None:
        shapes = [(1, 3, asked.img_size, asked.img_size)]
    else:
        raise ModelError(f"{source.model} does not say what input it takes: use --input, such as --input 1x3x224x224")
    if resized and len(shapes[0]) != 4:
        raise ModelError(f"{source.model} takes {shapes[0]}, no images: leave --img-size and --in-chans out")
    if resized:
        batch, channels, *size = shapes[0]
        size = size if asked.img_size is None else [asked.img_size] * 2
        shapes = [(batch, asked.in_chans or channels, *size), *shapes[1:]]
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=draw) for shape in shapes)
