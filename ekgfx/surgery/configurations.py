"""The configuration that a library builds its models from: read, built from, and held again.

transformers' models hold an object with `to_dict`, which their class takes. diffusers' hold a dictionary of the
arguments of their class, which `from_config` takes and `register_to_config` replaces; here it is an object as well. So
it is with classes of `huggingface_hub.PyTorchModelHubMixin`, as segmentation_models_pytorch's, which keep their
arguments in `_hub_mixin_config`.
"""

import copy
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from ekgfx.rewriting.patched import forward_of

HUB = "_hub_mixin_config"


class Arguments(SimpleNamespace):
    """Arguments of a class of diffusers."""


class HubArguments(SimpleNamespace):
    """Arguments of a class of the hub's mixin."""


def configuration(model: nn.Module) -> Any | None:
    """What builds a model, its values as attributes; None where no configuration does."""
    held = getattr(model, "config", None)
    if hasattr(held, "to_dict"):
        return held
    if isinstance(held, Mapping) and callable(getattr(model, "from_config", None)):
        return Arguments(**{name: value for name, value in held.items() if not name.startswith("_")})
    mixed = getattr(model, HUB, None)
    return HubArguments(**copy.deepcopy(mixed)) if isinstance(mixed, Mapping) else None


def build(model: nn.Module, config: Any) -> nn.Module:
    """A model of the same class from another configuration, with weights as the class initializes them."""
    kind: Any = type(model) if forward_of(model) is None else type(model).__bases__[0]
    made: nn.Module
    match config:
        case Arguments():
            made = kind.from_config(vars(config))
        case HubArguments():
            made = kind(**{name: None if _fetches(name, value) else value for name, value in vars(config).items()})
        case _:
            made = kind(copy.deepcopy(config))
    return made


def _fetches(name: str, value: Any) -> bool:
    """Whether an argument names weights, which a class fetches as it is built."""
    return name.endswith("weights") and isinstance(value, str)


def hold(model: Any, config: Any) -> None:
    """Let a model, and all modules that hold its configuration or a part of it, hold another one."""
    if isinstance(config, HubArguments):
        setattr(model, HUB, dict(vars(config)))
        return
    if isinstance(config, Arguments):
        # diffusers' `from_config` would take defaults for those that it knows as such
        model.register_to_config(**vars(config), _use_default_values=[])
        return
    new = dict(_pairs(model.config, config))
    for module in model.modules():
        for name, value in vars(module).items():
            if id(value) in new:
                vars(module)[name] = new[id(value)]


def _pairs(old: Any, new: Any) -> Iterator[tuple[int, Any]]:
    """A configuration and those that it holds, by identity, with what takes their places."""
    yield id(old), new
    for name, value in vars(old).items():
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _pairs(value, vars(new)[name])
