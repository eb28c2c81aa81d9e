"""A training checkpoint in one safetensors file: weights, optimizer, loss scale, and the history in its header."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ekgfx.base.files import replacing
from ekgfx.base.schema import read
from ekgfx.errors import RunError

FORMAT = 1


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    identity: dict[str, Any],
    history: list[dict[str, Any]],
    facts: dict[str, Any],
    others: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write the checkpoint, wholly or not at all. identity: what `load_state` must be asked with again. facts: plain
    values to keep. others: further weights of the model by name, such as the best so far.

    Raises RunError when the disk refuses.
    """
    slots = optimizer.state_dict()["state"]
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for kind, weights in others.items():
        tensors.update({f"{kind}.{name}": value for name, value in weights.items()})
    plain: dict[str, dict[str, Any]] = {}
    for parameter, slot in slots.items():
        for name, value in slot.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{parameter}.{name}"] = value
            else:
                plain.setdefault(str(parameter), {})[name] = value
    state = {
        "format": FORMAT,
        "identity": identity,
        "history": history,
        "optimizer": plain,
        "scaler": scaler.state_dict(),
        "facts": facts,
    }
    whole = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file(whole, partial, metadata={"training": json.dumps(state)})


def load_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    identity: dict[str, Any],
) -> "State":
    """Put a checkpoint's state into model, optimizer and scaler; returns the rest of it.

    Raises RunError when the file is damaged, of a newer format, or of another model or training.
    """
    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {})["training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no iterator of its own
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise RunError(f"{path} is no training checkpoint, or damaged ({error}); delete it to start anew") from error
    version = state.get("format") if isinstance(state, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise RunError(f"{path} has checkpoint format {version}, this ekgfx reads up to {FORMAT}: upgrade ekgfx")
    told: _Told = read(_Told, state, str(path), RunError)
    other = {name for name in {*identity, *told.identity} if identity.get(name) != told.identity.get(name)}
    if other:
        raise RunError(
            f"{path} was written by a training with another {', '.join(sorted(other))}; delete it to start anew"
        )
    try:
        slots: dict[int, dict[str, Any]] = {int(parameter): dict(slot) for parameter, slot in told.optimizer.items()}
        others: dict[str, dict[str, Tensor]] = {"model": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                parameter, _, slot = rest.partition(".")
                slots.setdefault(int(parameter), {})[slot] = value
            else:
                others.setdefault(kind, {})[rest] = value
        model.load_state_dict(others.pop("model"))
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        scaler.load_state_dict(dict(told.scaler))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} holds the weights of another model; delete it to start anew") from error
    return State([dict(epoch) for epoch in told.history], dict(told.facts), others)


@dataclass(frozen=True)
class State:
    """What a checkpoint holds besides model, optimizer and scaler; see `save_state`."""

    history: list[dict[str, Any]]
    facts: dict[str, Any]
    others: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class _Told:
    """What a checkpoint says besides its tensors."""

    format: int
    identity: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]
    optimizer: Mapping[str, Mapping[str, Any]]
    scaler: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
