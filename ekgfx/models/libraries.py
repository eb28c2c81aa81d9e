"""Libraries that a MODEL may name before a colon: `hf:NAME|DIR`, `torchvision:NAME`, and what plug-ins bring.

A plug-in is an entry point of the group `ekgfx.models`. Its name stands before the colon; it loads to a function

    build(name, pretrained, **arguments) -> model, or (model, example_inputs)

where `arguments` are those that the user gives (`--model-kwargs`, and `num_classes` for `--classes`). An attribute
`names` of it, a function without arguments, says which models there are.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.base import named
from ekgfx.errors import EkgfxError, ModelError
from ekgfx.models.factories import torchvision_config
from ekgfx.models.weights import PROBE_SECONDS, hub_offline, unreachable

FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
TOKENS = 16
"""Length of the example's sequences, where a model takes tokens."""


@dataclass(frozen=True)
class Made:
    """A library's model. origin: where its weights come from; config: what it says of its images, as timm does."""

    model: nn.Module
    origin: str
    inputs: tuple[Tensor, ...] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def make(model: str, pretrained: bool, arguments: Mapping[str, Any]) -> Made:
    """The model that `library:NAME` names.

    Raises:
        ModelError: there is no such library or model, it is not installed, or it cannot be built; says what to do.
    """
    library, _, name = model.partition(":")
    try:
        if library in BUILT_IN:
            return BUILT_IN[library](name, pretrained, arguments)
        return _plugged(library, name, pretrained, arguments)
    except EkgfxError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:400]
        raise ModelError(f"{library} cannot build {name!r} with {dict(arguments)}: {told}") from error


def names(library: str) -> list[str] | None:
    """The models of a library; None where it does not say."""
    if library == "timm":
        return sorted(named.timm_names())
    if library == "torchvision":
        from torchvision.models import list_models  # type: ignore[import-untyped]

        return list(list_models())
    if library == "hf":
        try:
            from transformers import CONFIG_MAPPING  # type: ignore[import-not-found]
        except ImportError:
            return None
        return sorted(CONFIG_MAPPING.keys())
    say = getattr(named.plugins()[library].load(), "names", None)
    return None if say is None else list(say())


def _plugged(library: str, name: str, pretrained: bool, arguments: Mapping[str, Any]) -> Made:
    entry = named.plugins()[library]
    made = entry.load()(name, pretrained, **arguments)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    if not isinstance(model, nn.Module):
        raise ModelError(f"the plug-in {entry.value} returned {type(model).__name__} for {name!r}, no torch.nn.Module")
    return Made(model, f"as {entry.value} makes them", inputs)


def _torchvision(name: str, pretrained: bool, arguments: Mapping[str, Any]) -> Made:
    from torchvision import models  # type: ignore[import-untyped]

    known = models.list_models()
    if name.lower() not in known:
        raise ModelError(named.no_function(name, known, "torchvision", "model"))
    config = {"input_size": (3, 224, 224), **torchvision_config(f"torchvision.models:{name.lower()}")}
    published = models.get_model_weights(name)
    if pretrained and len(published):
        url = published.DEFAULT.url
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(url).name).is_file()
        away = None if cached else unreachable(url, PROBE_SECONDS)
        if away is None:
            return Made(models.get_model(name, weights="DEFAULT", **arguments), f"torchvision {name}", None, config)
        origin = f"random (hub unreachable: {away})"
    else:
        origin = "random (none are published)" if pretrained else "random (--weights none)"
    backbone = {"weights_backbone": None} if _has_backbone(name) else {}
    return Made(models.get_model(name, weights=None, **backbone, **arguments), origin, None, config)


def _has_backbone(name: str) -> bool:
    from torchvision.models import get_model_builder

    return "weights_backbone" in inspect.signature(get_model_builder(name)).parameters


def _hugging_face(name: str, pretrained: bool, arguments: Mapping[str, Any]) -> Made:
    """A folder or a repository with a config.json, or an architecture (`bert`) as its configuration has it by default.

    Code of a repository is never run. The class is the one that the configuration names.
    """
    import transformers

    arguments = {("num_labels" if key == "num_classes" else key): value for key, value in arguments.items()}
    place, options = Path(name).expanduser(), dict(arguments)
    if name in transformers.CONFIG_MAPPING:
        config, stored = transformers.AutoConfig.for_model(name, **options), False
        origin = f"random ({name} of transformers)"
    elif place.is_dir():
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=True, **options)
        stored = any(next(place.glob(pattern), None) is not None for pattern in FILES)
        origin = f"folder {place.name}" if stored else f"random (only config.json lies in {place.name})"
    else:
        away = unreachable("https://huggingface.co", PROBE_SECONDS)
        with hub_offline(away is not None):
            try:
                config, stored = transformers.AutoConfig.from_pretrained(name, **options), True
            except OSError as error:
                why = f"the hub does not answer ({away})" if away else "the hub has no such repository"
                raise ModelError(
                    f"no model hf:{name}: it is no folder, no architecture of transformers, and {why}; "
                    f"`ekgfx models 'hf:*'` lists architectures"
                ) from error
        origin = f"hub {name}"
    kind = _class_of(config)
    if stored and pretrained:
        model = kind.from_pretrained(place if place.is_dir() else name, config=config)
    else:
        origin = origin if origin.startswith("random") else "random (--weights none)"
        auto = kind.__name__.startswith("Auto")
        model = kind.from_config(config) if auto else kind(config)
    return Made(model, origin, _tokens(model), _of_images(model, place))


def _class_of(config: Any) -> Any:
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModel


def _tokens(model: Any) -> tuple[Tensor, ...] | None:
    """Example tokens, where the first argument of the model takes them; None where it takes something else. A model of
    an encoder and a decoder is given some for both, and between them a mask that hides nothing."""
    first, *others = inspect.signature(model.forward).parameters
    if first != "input_ids" or model.main_input_name != "input_ids":
        return None
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    if model.config.is_encoder_decoder and others[:2] == ["attention_mask", "decoder_input_ids"]:
        return tokens, torch.ones_like(tokens), tokens
    return (tokens,)


def _of_images(model: Any, place: Path) -> dict[str, Any]:
    """What a model, and the preprocessor saved beside it, say of images."""
    config, said = model.config, place / "preprocessor_config.json"
    size = getattr(config, "image_size", None)
    if model.main_input_name != "pixel_values":
        return {}
    sides = tuple(size) if isinstance(size, list | tuple) else (size or 224,) * 2
    found: dict[str, Any] = {"input_size": (getattr(config, "num_channels", 3), *sides)}
    told = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}
    if "image_mean" in told and "image_std" in told:
        found |= {"mean": tuple(told["image_mean"]), "std": tuple(told["image_std"])}
    return found


BUILT_IN: Mapping[str, Callable[[str, bool, Mapping[str, Any]], Made]] = {
    "hf": _hugging_face,
    "torchvision": _torchvision,
}
