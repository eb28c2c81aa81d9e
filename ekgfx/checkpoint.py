"""Saving and loading pruned models: weights as safetensors, everything else as JSON, no pickle anywhere.

A folder with run.json, plan.json and model.safetensors is enough: the original architecture is built again from its
source, pruned by the plan, and filled with the weights.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from ekgfx import trust
from ekgfx.errors import ModelError, PlanError, RunError
from ekgfx.files import read_json
from ekgfx.plan import Plan
from ekgfx.run import FORMAT, MANIFEST, Run, check_format, read_manifest, verify
from ekgfx.source import Built, Source
from ekgfx.surgery import prune
from ekgfx.typed import read

WEIGHTS = "model.safetensors"
PLAN = "plan.json"


def save(
    pruned: nn.Module,
    path: str | Path,
    *,
    plan: Plan,
    source: Source | None = None,
    example_inputs: tuple[Tensor, ...] | None = None,
) -> None:
    """Writes a pruned model to the folder `path` (a new one, or that of a run).

    Args:
        pruned: what `prune(model, plan)` returned, in any state of training.
        plan: the plan it was pruned by.
        source: how to build the original model (`ekgfx.source.parse`); without it `load` needs `model=`.
        example_inputs: what the original is traced with when it is loaded; needed only where neither the source nor
            the factory given to `load` says it.

    Raises:
        RunError: the folder is used by another process, holds other files, or cannot be written.
    """
    path = Path(path)
    with Run.reopen(path) if (path / MANIFEST).exists() else Run.create(path, status="done") as run:
        run.update(**origin(source, example_inputs))
        write_plan(run, plan)
        write_weights(run, pruned, plan)


def load(
    path: str | Path, model: Callable[[], Any] | None = None, example_inputs: tuple[Tensor, ...] | None = None
) -> nn.Module:
    """The pruned model saved in the folder `path`, in evaluation mode.

    Args:
        path: a run, or what `save` wrote.
        model: builds the original (unpruned) model, or `(model, example_inputs)`; by default the recorded source does.
        example_inputs: inputs to trace the original with, where nothing else says them.

    Raises:
        RunError: a file is missing, was changed or cut short, is of a newer format, or its weights do not fit.
        PlanError: the plan belongs to another model.
    """
    path = Path(path)
    return _rebuild(path, _recorded(path) if model is None else _called(path, model, example_inputs)).model


def load_run(path: Path) -> Built:
    """A run as a MODEL argument: its pruned model, with what is known of the original's input."""
    return _rebuild(path, _recorded(path))


def recorded_source(manifest: Mapping[str, Any], path: Path) -> Source | None:
    """How a run says that its original model is built; None where it does not.

    Raises ModelError where that would import code which the user has not named.
    """
    if manifest.get("source") is None:
        return None
    source: Source = read(Source, manifest["source"], str(path / MANIFEST), RunError, "source")
    trust.check(source.model, manifest, path)
    return source


def origin(source: Source | None, example_inputs: tuple[Tensor, ...] | None) -> dict[str, Any]:
    """Entries of run.json that say how to build the model before its last pruning.

    Where the source is itself a run, its source and plan are copied: the new run stays whole when the old one is gone.
    """
    described, ancestors = None if source is None else source.describe(), []
    if source is not None and source.is_run:
        parent = read_manifest(Path(source.model))
        described = parent.get("source")
        ancestors = [*parent.get("ancestors", []), read_plan(Path(source.model)).to_json()]
    inputs = None if example_inputs is None else [[list(x.shape), str(x.dtype)] for x in example_inputs]
    signed = {} if described is None else trust.sign(described["model"])
    return {"source": described, "ancestors": ancestors, "inputs": inputs, **signed}


def write_plan(run: Run, plan: Plan, **facts: Any) -> None:
    """Writes plan.json: the plan, and what is said about it (budget, sizes)."""
    run.write_json(PLAN, {**json.loads(plan.to_json()), **facts})


def read_plan(path: Path) -> Plan:
    """The plan of the run at `path`, after comparing the file with its checksum."""
    return Plan.from_json(json.dumps(read_json(verify(path, PLAN))))


def write_weights(run: Run, pruned: nn.Module, plan: Plan) -> None:
    """Writes model.safetensors, with the plan's digest and the way to build the model in its metadata."""
    metadata = {
        "format": "pt",
        "ekgfx_format": str(FORMAT),
        "plan": plan.digest,
        "source": json.dumps(run.manifest.get("source")),
        "ancestors": json.dumps(run.manifest.get("ancestors", [])),
    }
    with run.replacing(WEIGHTS) as partial:
        save_tensors(pruned, partial, metadata)


def save_tensors(model: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a module's state to a safetensors file; tied tensors once."""
    save_model(model, str(path), metadata)


def load_tensors(model: nn.Module, path: Path) -> None:
    """Fills a module from a safetensors file, strictly, in the file's types. RunError when they do not fit."""
    try:
        stored = load_file(path)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in stored and tensor.dtype != stored[name].dtype:
                tensor.data = tensor.data.to(stored[name].dtype)
        load_model(model, path)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise RunError(f"{path} does not hold the weights of this model: {' '.join(str(error).split())}") from error


def _rebuild(path: Path, original: Built) -> Built:
    """The original, pruned by its ancestors' plans and the run's own, with the run's weights."""
    manifest, plan, weights = read_manifest(path), read_plan(path), verify(path, WEIGHTS)
    _check_metadata(weights, plan)
    model = original.model
    for step in [*map(Plan.from_json, manifest.get("ancestors", [])), plan]:
        try:
            model = prune(model, step, example_inputs=original.example_inputs, graphs="allow")
        except PlanError as error:
            raise PlanError(f"{path} was not made from this {type(original.model).__name__}: {error}") from error
    load_tensors(model, weights)
    return replace(original, model=model.eval(), weights_origin=f"run {path.name}", leaf=plan.leaf)


def _check_metadata(weights: Path, plan: Plan) -> None:
    try:
        with safe_open(weights, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{weights} cannot be read: {error}; restore it, or make the run again") from error
    version = metadata.get("ekgfx_format", "")
    check_format({"format": int(version) if version.isdecimal() else None}, weights)
    if metadata.get("plan") != plan.digest:
        raise PlanError(
            f"{weights} was made by another plan ({metadata.get('plan')}) than the one beside it ({plan.digest}); "
            "restore the files of one run"
        )


def _recorded(path: Path) -> Built:
    source = recorded_source(read_manifest(path), path)
    if source is None:
        raise RunError(f"{path} does not say how to build its model: pass model=, a function that builds it")
    with torch.random.fork_rng(devices=[]):
        return source.without_weights().build()


def _called(path: Path, build: Callable[[], Any], example_inputs: tuple[Tensor, ...] | None) -> Built:
    with torch.random.fork_rng(devices=[]):
        made = build()
    model, own = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model= must build a module, or (module, example_inputs); it made a {type(made).__name__}")
    inputs = example_inputs or own
    if inputs is None:
        recorded = read_manifest(path).get("inputs")
        if recorded is None:
            raise RunError(f"nothing says what the model at {path} takes: pass example_inputs=")
        inputs = tuple(_example(shape, type_name) for shape, type_name in recorded)
    return Built(model.eval(), inputs, f"as {build!r} makes them")


def _example(shape: list[int], type_name: str) -> Tensor:
    """A recorded input: random numbers, or zeros of a type that counts or indexes."""
    dtype = getattr(torch, type_name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise RunError(f"{type_name!r} is no type of tensor; the run's inputs are damaged, restore {MANIFEST}")
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
