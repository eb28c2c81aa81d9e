"""Functions that a MODEL names: found, imported and called, with errors that say what was probably meant."""

import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ekgfx.base import named
from ekgfx.errors import EkgfxError, ModelError

IN_CHANNELS = ("in_chans", "in_channels")
"""What factories call the number of channels of their images."""


def call_factory(model: str, asked: Mapping[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    """What a factory makes: the model, and its example inputs where it says any. A model itself is one of its own: it
    gives a copy with the weights that it has.

    asked: arguments, of which `num_classes` must be the factory's own, and IN_CHANNELS[0] is given where it takes it,
    under any of these names. Raises ModelError when it has none of the first, or fails.
    """
    place, _, name = model.rpartition(":")
    factory = _find(_import(place), name, model)
    if isinstance(factory, nn.Module):
        unknown = next((name for name in asked if name != IN_CHANNELS[0]), None)
        if unknown is not None:
            raise ModelError(f"{model} is a model and no factory, so it cannot take {unknown}={asked[unknown]}")
        return copy.deepcopy(factory), None
    try:
        takes: Mapping[str, inspect.Parameter] = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # of some built-in types
        takes = {}
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    if "num_classes" in asked and "num_classes" not in takes and not anything:
        raise ModelError(
            f"factory {model} has no parameter num_classes, so it cannot take {asked['num_classes']} classes"
        )
    arguments = {name: value for name, value in asked.items() if name != IN_CHANNELS[0]}
    channels = next((name for name in IN_CHANNELS if name in takes), None)
    if IN_CHANNELS[0] in asked and channels is not None:
        arguments[channels] = asked[IN_CHANNELS[0]]
    try:
        made = factory(**arguments)
    except EkgfxError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"factory {model} failed: {type(error).__name__}: {error}") from error
    network, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    fits = inputs is None or (isinstance(inputs, tuple) and inputs and all(isinstance(x, Tensor) for x in inputs))
    if not isinstance(network, nn.Module) or not fits:
        raise ModelError(
            f"factory {model} returned {type(made).__name__}: return the model (a torch.nn.Module), or "
            "(model, example_inputs) with a tuple of tensors"
        )
    return network, inputs


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


def torchvision_config(model: str) -> Mapping[str, Any]:
    """What the published weights of a torchvision classifier say of its images, as timm's `pretrained_cfg` would."""
    place, _, name = model.rpartition(":")
    if place.split(".")[:2] != ["torchvision", "models"]:
        return {}
    from torchvision import models  # type: ignore[import-untyped]

    try:
        shown = next(iter(models.get_model_weights(name))).transforms()
        size, resized = shown.crop_size[0], shown.resize_size[0]
    except (ValueError, AttributeError, StopIteration):  # no such model, or none that classifies
        return {}
    return {
        "input_size": (3, size, size),
        "mean": shown.mean,
        "std": shown.std,
        "crop_pct": size / resized,
        "interpolation": shown.interpolation.value,
    }
