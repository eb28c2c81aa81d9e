"""Weights: from a file, strictly, without pickle; or timm's pre-trained ones, not waiting for a hub that is away."""

import logging
import pickle  # for the name of an exception; nothing is unpickled
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ekgfx.errors import ModelError
from ekgfx.models import tensorflow_state_dict

log = logging.getLogger("ekgfx")

PROBE_SECONDS = 6.0


def read_weights(file: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors, .npz or PyTorch file (.pth, .pt, .th, .bin; only tensors are read from those).

    A PyTorch file may hold the state dict under "state_dict" or "model", with names that begin with "module.". A .npz
    of the EKG authors' TensorFlow variables is translated.

    Raises:
        ModelError: no such file, cut short, damaged, or of another kind.
    """
    if file.suffix not in READERS:
        raise ModelError(f"weights '{file}': use auto, none, or a file that ends in {', '.join(READERS)}")
    if not file.is_file():
        raise ModelError(f"weights '{file}': no such file")
    try:
        return READERS[file.suffix](file)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"weights '{file}' hold more than tensors, which is refused: {reason}") from error
    except ModelError:
        raise
    except Exception as error:  # what a library makes of damaged bytes may be anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"weights '{file}' cannot be read (cut short or damaged?): {reason}") from error


def _read_npz(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as content, np.load(content) as arrays:  # allow_pickle is off by default
        variables = {name: arrays[name] for name in arrays.files}
    if all(name.endswith(":0") for name in variables):
        return tensorflow_state_dict(variables)
    return {name: torch.from_numpy(array) for name, array in variables.items()}


def _read_torch(file: Path) -> dict[str, Tensor]:
    content: Any = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"weights '{file}' hold no state dict (a mapping of names to tensors)")
    return {name.removeprefix("module."): value for name, value in content.items()}


READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": load_file,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".th": _read_torch,
    ".bin": _read_torch,
}


def load_weights(model: nn.Module, file: Path) -> None:
    """Copies a file's weights into the model, converted to the model's types (half precision to the model's float).

    Raises:
        ModelError: the file's names or shapes are not exactly the model's (BatchNorm's batch counters may be missing).
    """
    state = read_weights(file)
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} is {tuple(state[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    differences = [
        f"{len(found)} {kind}: {', '.join(found[:3])}{' …' if len(found) > 3 else ''}"
        for kind, found in (("missing", missing), ("unknown", unexpected), ("of another shape", reshaped))
        if found
    ]
    if differences:
        raise ModelError(f"weights '{file}' are not those of this {type(model).__name__}: {'; '.join(differences)}")
    model.load_state_dict(state, strict=False)  # what may be missing was checked above


def create_pretrained(name: str, options: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """A timm model with its published weights, or with random ones if there are none or no hub answers.

    Returns:
        The model, and where its weights come from, in words.

    Raises:
        ModelError: the weights were fetched but do not fit.
    """
    import timm
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        return _random(name, options, "none are published")
    url = _hub() if config.hf_hub_id else str(config.url)
    away = unreachable(url, PROBE_SECONDS)
    if away and not config.hf_hub_id and not _in_torch_cache(url):
        return _random(name, options, f"hub unreachable: {away}")
    try:
        with hub_offline(away is not None):
            model = timm.create_model(name, pretrained=True, **options)
    except OSError as error:
        return _random(name, options, f"hub unreachable: {away or str(error).splitlines()[0]}")
    except RuntimeError as error:  # timm's own check and load_state_dict's: the weights came, but do not fit
        raise ModelError(f"timm's weights of {name} do not fit {dict(options)}: {error}; try --weights none") from error
    return model, f"timm {config.architecture}.{config.tag}" if config.tag else f"timm {config.architecture}"


def _random(name: str, options: Mapping[str, Any], reason: str) -> tuple[nn.Module, str]:
    import timm

    log.warning(
        "no pre-trained weights for %s (%s): going on with RANDOM weights; structure, cost and latency do not depend "
        "on them, accuracy does. Give a file with --weights FILE.",
        name,
        reason,
    )
    return timm.create_model(name, **options), f"random ({reason})"


def _hub() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _in_torch_cache(url: str) -> bool:
    return Path(torch.hub.get_dir(), "checkpoints", Path(url).name).is_file()


def unreachable(url: str, seconds: float) -> str | None:
    """Why a server does not answer within `seconds`, or None if it does (whatever it says).

    The library's own download would try for a minute. The request runs in a thread because a name look-up cannot be
    given a time limit. HF_HUB_OFFLINE counts as no answer; proxies are used as the environment says.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host = urlsplit(url).hostname or url
    reasons: list[str | None] = [f"no answer from {host} in {seconds:g} s"]

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            reasons.append(None)  # an answer, if a refusal
        except urllib.error.URLError as error:
            reasons.append(f"{host}: {error.reason}")
        except (OSError, HTTPException, ValueError) as error:
            reasons.append(f"{host}: {error}")
        else:
            reasons.append(None)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return reasons[-1]


@contextmanager
def hub_offline(offline: bool) -> Iterator[None]:
    """Lets huggingface_hub use only its local cache, without trying the network."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
