"""Weights: from a file, strictly; or timm's pre-trained ones, not waiting for a hub that is away."""

import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from ekgfx.errors import ModelError
from ekgfx.models.weight_files import read_file
from ekgfx.models.weight_fit import differences, fits_of, plain, told

log = logging.getLogger("ekgfx")

PROBE_SECONDS = 6.0


def read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict of a file in any of the forms that `ekgfx.models.weight_files` reads: of several the first one,
    without a "module." that all names begin with.

    Raises:
        ModelError: no such file, cut short, damaged, or of another kind.
    """
    state = {plain(name): tensor for name, tensor in next(iter(read_file(file).state_dicts.values())).items()}
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}


def load_weights(model: nn.Module, file: Path, *, ema: bool = False) -> str:
    """Copies a file's weights into the model, converted to the model's types (half precision to the model's float).

    A file may hold several state dicts, at any place and with any prefix of their names, such as "module." or "model.".
    The one that fits is taken; of several, the first that is no moving average, or, with `ema`, that is one.
    Tensors that hold NaN or infinite values afterwards are taken as they are, and named in a warning.

    Returns:
        Which ones were taken, in words; empty where the file holds nothing but the model's own names.

    Raises:
        ModelError: the file cannot be read, or names or shapes are not exactly the model's (counters may be missing).
    """
    contents = read_file(file)
    fits = [fit for place, state in contents.state_dicts.items() for fit in fits_of(model, place, state)]
    asked = [fit for fit in fits if fit.averaged] if ema else fits
    if not asked:
        raise ModelError(
            f"weights '{file}' hold no moving average (EMA), but {', '.join(map(str, fits))}; leave --ema out"
        )
    built = {name: value.clone() for name, value in model.state_dict().items() if _strange(value)}
    best = max(asked, key=lambda fit: (fit.exact, fit.fitting, not fit.averaged, -len(fit.unknown)))
    if not best.exact:
        raise ModelError(f"weights '{file}' are not those of this {type(model).__name__}: {differences(model, best)}")
    try:
        model.load_state_dict(dict(best.state), strict=False)  # what may be missing was checked above
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"weights '{file}' cannot be copied into this {type(model).__name__}: {reason}") from error
    _warn_of_strange(file, model.state_dict(), built)
    taken = told(best, [fit for fit in fits if fit is not best and fit.exact], contents.others)
    if taken:
        log.info("weights %s: %s", file.name, taken)
    return taken


def _strange(value: Tensor) -> str:
    """Which values that are not finite a tensor holds, in words; empty if none."""
    if value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return ""
    if value.is_floating_point() and value.element_size() == 1:  # isfinite does not know all 8-bit types
        value = value.float()
    if torch.isfinite(value).all():
        return ""
    counts = {"NaN": int(value.isnan().sum()), "infinite": int(value.isinf().sum())}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) + f" of {value.numel()}"


def _warn_of_strange(file: Path, state: Mapping[str, Tensor], built: Mapping[str, Tensor]) -> None:
    """Names the tensors that are not finite, without those that the model was built with, such as a mask of −∞."""
    found = {
        name: words
        for name, value in state.items()
        if (words := _strange(value)) and not (name in built and torch.equal(value, built[name]))
    }
    if found:
        averages = any(name.rpartition(".")[2] in ("running_mean", "running_var") for name in found)
        log.warning(
            "weights %s give values that are not finite, which are taken as they are: %s; half precision ends at "
            "65504, and a training that diverged leaves NaN%s",
            file.name,
            "; ".join(f"{name} ({words})" for name, words in found.items()),
            "; ekgfx prune estimates running statistics on images, as ekgfx.restore_statistics does" * averages,
        )


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
