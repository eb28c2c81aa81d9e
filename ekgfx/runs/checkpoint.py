"""Saving and loading pruned models: weights as safetensors, everything else as JSON, no pickle anywhere.

A folder with run.json, plan.json and model.safetensors is enough: the original architecture is built again from its
source, pruned by the plan, and filled with the weights.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.base.files import read_json
from ekgfx.base.schema import read
from ekgfx.data.batches import Inputs, half_of
from ekgfx.errors import ModelError, PlanError, RunError
from ekgfx.graph.plan import Plan, as_plan, rounds_of
from ekgfx.models import trust
from ekgfx.models.source import AS_THE_MODEL_SAYS, Built, Source
from ekgfx.runs.directory import FORMAT, MANIFEST, Run, at_budget, check_format, read_manifest, verify
from ekgfx.surgery.cut import prune
from ekgfx.tracing.trace import silently_traced

Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Inputs to trace a model with, as `trace` takes them."""

WEIGHTS = "model.safetensors"
PLAN = "plan.json"


def save(
    pruned: nn.Module,
    path: str | Path,
    *,
    plan: Plan | Sequence[Plan] | None = None,
    source: Source | None = None,
    example_inputs: Example | None = None,
) -> None:
    """Writes a pruned model to the folder `path` (a new one, or that of a run).

    Args:
        pruned: what `prune(model, plan)` returned, in any state of training.
        path: the folder.
        plan: the plan it was pruned by, which a pruned module knows itself, with those of earlier rounds. Where it does
            not (its weights were loaded into another instance, say), a series of plans tells several rounds.
        source: how to build the original model (`ekgfx.models.source.parse`); without it `load` needs `model=`.
        example_inputs: what the original is traced with when it is loaded; needed only where neither the source nor
            the factory given to `load` says it.

    Raises:
        RunError: the folder is used by another process, holds other files, or cannot be written.
        PlanError: the module was pruned by another plan, or says nothing of it and none is given.

    Example:
        >>> ekgfx.save(pruned, "out")
    """
    path = Path(path)
    *earlier, last = _rounds(pruned, plan)
    with Run.reopen(path) if (path / MANIFEST).exists() else Run.create(path, status="done") as run:
        run.update(**origin(source, example_inputs, earlier))
        write_plan(run, last)
        write_weights(run, pruned, last)


def _rounds(pruned: nn.Module, plan: Plan | Sequence[Plan] | None) -> tuple[Plan, ...]:
    """The plans that a module was pruned by, oldest first, as it knows them or is said."""
    known = rounds_of(pruned)
    given = known if plan is None else (as_plan(plan),) if isinstance(plan, Plan) else tuple(map(as_plan, plan))
    if not given:
        raise PlanError(f"this {type(pruned).__name__} does not say what it was pruned by: pass plan=")
    last = known[len(known) - len(given) :]
    if not known or (len(given) == 1 and len(known) > 1 and given[0].alike(Plan.of(pruned))):
        return given
    if len(last) < len(given) or not all(a.alike(b) for a, b in zip(last, given, strict=True)):
        raise PlanError(f"this {type(pruned).__name__} was pruned by another plan than the one given; leave plan= out")
    return known


def load(
    path: str | Path,
    model: nn.Module | Callable[[], Any] | None = None,
    example_inputs: Example | None = None,
    *,
    also: Sequence[Any] = (),
    **budget: float | str,
) -> nn.Module:
    """The pruned model saved in the folder `path`, in evaluation mode.

    Args:
        path: a run, or what `save` wrote.
        model: builds the original (unpruned) model, or `(model, example_inputs)`; or the original itself, which is left
            as it is; by default the recorded source builds it.
        example_inputs: inputs to trace the original with, where nothing else says them: a tensor, a tuple, or a mapping
            of inputs by name.
        also: further calls, as in `trace`, where the plan was made with such.
        budget: of a run of several budgets the one whose network is loaded, such as `flops=0.75`; the tightest's by
            default.

    Returns:
        The pruned module, of the original's class, in evaluation mode.

    Raises:
        BudgetError: the run has no such budget.
        RunError: a file is missing, was changed or cut short, is of a newer format, or its weights do not fit.
        PlanError: the plan belongs to another model.

    Example:
        >>> ekgfx.save(pruned, "out")
        >>> again = ekgfx.load("out", model=ekgfx.models.digits_cnn, example_inputs=images)
    """
    path = at_budget(Path(path), budget)
    return _rebuild(path, _recorded(path) if model is None else _called(path, model, example_inputs), also).model


def load_run(path: Path) -> Built:
    """A run's pruned model, with what is known of the original's input."""
    return _rebuild(path, _recorded(path))


def build(source: Source) -> Built:
    """The model of a source, which may be a run. ModelError for images of another kind than a run's network takes."""
    if not source.is_run:
        return source.build()
    built, asked = load_run(Path(source.model)), source.preprocessing
    shape = tuple(built.example_inputs[0].shape)
    if asked.img_size not in (None, *shape[2:]) or asked.in_chans not in (None, *shape[1:2]):
        raise ModelError(f"{source.model} takes {'×'.join(map(str, shape))}: leave --img-size and --in-chans out")
    return built if source.preprocessing == AS_THE_MODEL_SAYS else replace(built, asked=source.preprocessing)


def recorded_source(manifest: Mapping[str, Any], path: Path) -> Source | None:
    """How a run says that its original model is built; None where it does not.

    Raises ModelError where that would import code which the user has not named.
    """
    if manifest.get("source") is None:
        return None
    source: Source = read(Source, manifest["source"], str(path / MANIFEST), RunError, "source")
    trust.check(source.model, manifest, path)
    return source


def origin(source: Source | None, example_inputs: Example | None, earlier: Sequence[Plan] = ()) -> dict[str, Any]:
    """Entries of run.json that say how to build the model before its last pruning. earlier: plans of the rounds before.

    Where the source is itself a run, its source and plan are copied: the new run stays whole when the old one is gone.
    """
    described, ancestors = None if source is None else source.describe(), [plan.to_json() for plan in earlier]
    if source is not None and source.is_run:
        parent = read_manifest(Path(source.model))
        described = parent.get("source")
        parents = [*parent.get("ancestors", []), read_plan(Path(source.model)).to_json()]
        ancestors = max(parents, ancestors, key=len)  # rounds after the run's, where the module knows of them
    inputs = None if example_inputs is None else Inputs.of(example_inputs)
    facts: dict[str, Any] = {"inputs": None if inputs is None else [_kind(value) for value in inputs.args]}
    if inputs is not None and inputs.kwargs:
        facts["named_inputs"] = {name: _kind(value) for name, value in inputs.kwargs.items()}
    signed = {} if described is None else trust.sign(described["model"])
    return {"source": described, "ancestors": ancestors, **facts, **signed}


def _kind(value: Tensor) -> list[Any]:
    return [list(value.shape), str(value.dtype)]


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


def _rebuild(path: Path, original: Built, also: Sequence[Any] = ()) -> Built:
    """The original, pruned by its ancestors' plans and the run's own, with the run's weights."""
    manifest, plan, weights = read_manifest(path), read_plan(path), verify(path, WEIGHTS)
    _check_metadata(weights, plan)
    model = original.model
    if plan.also != len(also):
        raise PlanError(
            f"the plan of {path} was made of a model that was traced with {plan.also} further calls, not {len(also)}: "
            "pass those of ekgfx.trace(…, also=[…]) as also="
        )
    steps, done = [*map(Plan.from_json, manifest.get("ancestors", [])), plan], rounds_of(model)
    if all(a.alike(b) for a, b in zip(done, steps, strict=False)):  # of a model that was built from an earlier round
        steps = steps[len(done) :]
    for step in steps:
        try:
            inputs, leaf, unused = original.example_inputs, step.leaf, step.unused
            outputs = step.outputs or None
            traced = silently_traced(model, inputs, leaf=leaf, also=also, unused=unused, outputs=outputs)
            model = prune(model, step, traced, graphs="allow")
        except PlanError as error:
            raise PlanError(f"{path} was not made from this {type(original.model).__name__}: {error}") from error
    load_tensors(model, weights)
    return replace(
        original,
        model=model.eval(),
        example_inputs=_in_precision_of(model, original.example_inputs),
        weights_origin=f"run {path.name}",
        leaf=plan.leaf,
        outputs=plan.outputs,
    )


def _in_precision_of(model: nn.Module, inputs: Any) -> Any:
    """Example inputs in the half precision that a model's weights were saved in, if they were."""
    half = half_of(model)
    if half is None:
        return inputs
    return pytree.tree_map_only(Tensor, lambda value: value.to(half) if value.is_floating_point() else value, inputs)


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


def _called(path: Path, build: nn.Module | Callable[[], Any], example_inputs: Example | None) -> Built:
    if not callable(build):
        raise ModelError(f"model= takes the original module or a function that builds it, not a {type(build).__name__}")
    with torch.random.fork_rng(devices=[]):
        made = copy.deepcopy(build) if isinstance(build, nn.Module) else build()
    model, own = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model= must build a module, or (module, example_inputs); it made a {type(made).__name__}")
    inputs: Any = own if example_inputs is None else example_inputs
    if inputs is None:
        manifest = read_manifest(path)
        recorded, named = manifest.get("inputs"), manifest.get("named_inputs")
        if recorded is None:
            raise RunError(f"nothing says what the model at {path} takes: pass example_inputs=")
        inputs = tuple(_example(*kind) for kind in recorded)
        if named:
            inputs = {name: _example(*kind) for name, kind in named.items()}
    return Built(model.eval(), inputs, f"as {type(model).__name__} has them")


def _example(shape: list[int], type_name: str) -> Tensor:
    """A recorded input: random numbers, or zeros of a type that counts or indexes."""
    dtype = getattr(torch, type_name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise RunError(f"{type_name!r} is no type of tensor; the run's inputs are damaged, restore {MANIFEST}")
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
