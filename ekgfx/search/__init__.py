"""The search for a plan within a budget: `search(traced, batches, flops=0.55)`."""

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ekgfx.base.units import budget_of, bytes_of, fraction_of, human
from ekgfx.errors import BudgetError, DataError, RecipeError
from ekgfx.execution.subnetwork import BATCH_NORM
from ekgfx.graph.arguments import check_inputs
from ekgfx.graph.plan import Plan
from ekgfx.search import ekg, global_, importance_peers, uniform
from ekgfx.search.company import check_mixed
from ekgfx.search.details import AUTHORS, PAPER, Details, authors_cost
from ekgfx.search.ignore import Ignored, as_patterns, ignored_groups
from ekgfx.search.importance import Criterion, at_random, taylor
from ekgfx.search.latency import LayerTable, Price
from ekgfx.search.problem import Budget, Computing, Problem, quicker_channels_last, tied_rules
from ekgfx.search.recorder import Recorder
from ekgfx.search.result import Candidate, Measure, SearchResult, Step, as_steps
from ekgfx.search.reward import (
    Knowledge,
    KnowledgeMode,
    Objective,
    evaluate,
    label_free,
    validation_batches,
)
from ekgfx.surgery.tied import ties_of
from ekgfx.tracing.trace import TracedModel, check_traced
from ekgfx.training.loss import cross_entropy
from ekgfx.training.outputs import Logits, finder, logits_of

log = logging.getLogger("ekgfx")

__all__ = [
    "AUTHORS",
    "PAPER",
    "Candidate",
    "Details",
    "Measure",
    "SearchResult",
    "Step",
    "authors_cost",
    "find_budget",
    "search",
]

Strategy = Literal["ekg", "global", "uniform"]
STRATEGIES = get_args(Strategy)
ONE_STEP = {"global": global_.run, "uniform": uniform.run}

IMPORTANCE: Mapping[str, Criterion] = {
    "taylor": taylor,
    "magnitude": importance_peers.magnitude,
    "fpgm": importance_peers.fpgm,
    "bn-scale": importance_peers.bn_scale,
    "hessian": importance_peers.hessian,
    "lamp": importance_peers.lamp,
    "random": at_random,
}
NEEDS_DATA = ("taylor", "hessian")


def search(
    traced: TracedModel,
    batches: Iterable[Any] = (),
    *,
    flops: float | str | None = None,
    params: float | str | None = None,
    latency: float | str | None = None,
    table: LayerTable | None = None,
    cost: Callable[[Plan], float] | None = None,
    budget: float | str | None = None,
    strategy: Strategy = "ekg",
    importance: str = "taylor",
    knowledge: KnowledgeMode = "ensemble",
    step: float = 0.2,
    accept: int = 1,
    align: int = 1,
    min_width: float = 0.0,
    ignore: Ignored | Sequence[Ignored] = (),
    uniform_layers: bool = False,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    logits: Logits = logits_of,
    rescale: bool | None = None,
    details: Details = PAPER,
    seed: int = 0,
    cache: int | str = "2GiB",
    early_stop: bool | None = None,
    amp: Literal["bf16", "fp16"] | None = None,
    channels_last: bool | None = None,
    on_step: Callable[[Step], None] | None = None,
    resume_from: Sequence[Step | Mapping[str, Any]] | None = None,
) -> SearchResult:
    """Search for the sub-network within a budget that keeps the most potential.

    Args:
        traced: the model; neither its weights nor its running averages are changed.
        batches: validation batches: `(images, labels, …)`, `(images, None, …)` or images; images may be a tuple of
            inputs or a mapping of them by name, and a batch a mapping with labels in it. Without labels, the unpruned
            network's soft predictions are the labels. Every batch should mix the classes, since BatchNorm takes its
            statistics; a warning is logged where they are sorted. They are read once and held on the model's device.
            `uniform` and `global` with an importance of the weights alone need none.
        flops, params, latency: the budget: fraction of the MACs, the parameters or the milliseconds that is kept (0.55
            or "55%"), or an amount ("2.0G" MACs per sample, "5M" parameters, "8ms"); for milliseconds with `table`, the
            layers' timings (`ekgfx.export.measure_layers`). Or `cost`, any function of a plan, with `budget`, the
            fraction of it that is kept. At least one; of several, all must hold.
        strategy: "ekg"; "uniform" (one width for all groups), "global" (one threshold for all channels).
        importance: which channels go first: "taylor" (the paper's), or torch-pruning's "magnitude" (L1), "fpgm",
            "bn-scale", "hessian", "lamp"; or "random", the baseline: any channels, as `seed` draws them.
        knowledge: what the reward compares with: the running "ensemble" of the sub-networks found so far, the "single"
            unpruned network, or "none".
        step: r, the width ratio that a group made by one layer loses at once.
        accept: how many of the best candidates a step takes together. The paper takes one; k make the search k times
            shorter (see `quick_accept`), and its history too.
        align: kept channels are a multiple of this where the group is at least that wide.
        min_width: least width ratio of every group.
        ignore: groups, parameters or modules that keep all their channels: glob patterns of their names, the modules
            themselves, or classes of modules.
        uniform_layers: whether widths are found that the model's configuration can say, so that `from_pretrained`
            takes the pruned model back; without one, repeated layers share their widths. Groups for whose width a
            module's Python has one number share it in any case (`ekgfx.surgery.tied`).
        loss: label loss, `loss(output, target)` → mean over the batch; cross-entropy is that of the logits.
        logits: where the logits B × K × …, which the knowledge is compared with, are in a model's output: a function of
            it, or a key, a field or an index. By default they are found, where it is clear
            (`ekgfx.training.outputs.logits_of`).
        rescale: whether cut kernels of convolutions and linear layers keep their norm (recorded in the plan). None: as
            the authors do where the model has BatchNorm, which cancels the factor almost everywhere; without it the
            factor would change what the network computes, and they are left alone.
        details: departures from the paper, for comparisons with the authors' program.
        seed: for networks that draw random numbers and for the importance "random"; all else is deterministic.
        cache: memory for values of the current network that its candidates go on from (bytes, or as "2GiB"); only time
            depends on it.
        early_stop: whether a candidate is left when it cannot be the best any more. The plan and the accepted steps do
            not depend on it; the record of such a candidate says at what bound it was left, and not its loss. None:
            where the loss is cross-entropy and `details` are the paper's.
        amp: half precision to evaluate candidates in, which can change a close choice.
        channels_last: memory format of images; results differ by rounding. None: on the CPU, where its convolutions
            and norms are faster, for models with convolutions.
        on_step: called after every step.
        resume_from: the steps of an interrupted search (or their JSON) to go on after.

    Raises:
        BudgetError: nothing can be pruned, or the budget cannot be reached; says how far it can go.
        DataError: batches are missing, or don't fit the model's output.
        PlanError: an ignore pattern matches nothing; `resume_from` belongs to another model, data or search.
        TrainingError: the loss is not finite.
        RecipeError: an option has an unknown value, or the table is of another model.
    """
    check_traced(traced, "search")
    _check_option("strategy", strategy, STRATEGIES)
    _check_option("importance", importance, IMPORTANCE)
    _check_option("knowledge", knowledge, get_args(KnowledgeMode))
    if align < 1 or accept < 1 or not 0 < step <= 1 or not 0 <= min_width < 1:
        raise RecipeError(
            f"align {align}, accept {accept}, step {step}, min_width {min_width}: use at least 1 for align and accept, "
            "a step in (0, 1], and a least width in [0, 1)"
        )
    history = as_steps(resume_from or ())
    ignore = as_patterns(traced, ignore)
    _check_option("amp", amp or "bf16", ("bf16", "fp16"))
    asked = find_budget(traced, flops=flops, params=params, latency=latency, table=table, cost=cost, budget=budget)
    early_stop = details == PAPER if early_stop is None else early_stop
    channels_last = quicker_channels_last(traced) if channels_last is None else channels_last
    computing = Computing(bytes_of(cache), early_stop, amp, channels_last)
    ties = ties_of(traced, uniform_layers)
    if uniform_layers and ties.held:
        whole = "; ".join(f"{name} ({why})" for name, why in list(ties.held.items())[:3])
        more = f"; and {len(ties.held) - 3} more" if len(ties.held) > 3 else ""
        log.info("uniform layers: these groups stay whole: %s%s", whole, more)
    rules, members = tied_rules(traced, ties, ignored_groups(traced.groups, ignore), align, min_width)
    problem = Problem(
        traced=traced,
        batches=tuple(map(computing.prepared, validation_batches(batches, traced.model))),
        objective=Objective(loss, finder(logits), details.batch_size),
        budget=asked,
        rules=rules,
        members=members,
        guided=knowledge != "none",
        ensemble=knowledge == "ensemble",
        rescale=_has_batch_norm(traced) if rescale is None else rescale,
        computing=computing,
        seed=seed,
    )
    problem.check_reachable()
    for batch in problem.batches:
        check_inputs(traced, *batch.inputs)
    if not problem.batches and (strategy == "ekg" or importance in NEEDS_DATA):
        raise DataError(f"strategy {strategy!r} with importance {importance!r} needs validation batches; pass some")
    recorder = Recorder(problem, on_step)
    with _reproducible(seed):
        pace = ekg.Pace(step, accept)
        given = problem.batches
        problem, baseline, unpruned = _measure_unpruned(problem)
        check_mixed(problem, given, unpruned)
        if strategy == "ekg":
            ekg.run(problem, IMPORTANCE[importance], recorder, unpruned, pace=pace, details=details, history=history)
        elif history:
            recorder.again(history[0])
        else:
            ONE_STEP[strategy](problem, IMPORTANCE[importance], recorder)
    return SearchResult(
        full=problem.full(),
        sizes={name: group.size for name, group in traced.groups.items()},
        baseline=baseline,
        steps=tuple(recorder.steps),
        settings={
            "budget": {"unit": problem.budget.unit, "keep": problem.budget.keep},
            "strategy": strategy,
            "importance": importance,
            "knowledge": knowledge,
            "step": step,
            "accept": accept,
            "align": align,
            "min_width": min_width,
            "ignore": list(ignore),
            "uniform_layers": uniform_layers,
            "rescale": problem.rescale,
            "details": asdict(details),
            "seed": seed,
            "early_stop": early_stop,
            "amp": amp,
            "channels_last": channels_last,
            "samples": sum(batch.samples for batch in problem.batches),
        },
    )


def _measure_unpruned(problem: Problem) -> tuple[Problem, Measure, Knowledge]:
    """Θ₀ measured, its logits per batch (T₀), and the problem with labels where it had none."""
    network, objective = problem.network(problem.full()), problem.objective
    if problem.batches and problem.batches[0].target is None:
        if objective.loss is not cross_entropy:
            raise DataError("a loss of your own needs targets, and the validation batches have none")
        problem = replace(problem, batches=label_free(network, problem.batches, objective))
    if not problem.batches:
        return problem, problem.measure(problem.full(), None), ()
    evaluation, logits = evaluate(network, problem.batches, objective, None, check=True)
    if problem.guided:
        evaluation, _ = evaluate(network, problem.batches, objective, logits)
    return problem, problem.measure(problem.full(), evaluation), logits


def find_budget(
    traced: TracedModel,
    *,
    flops: float | str | None = None,
    params: float | str | None = None,
    latency: float | str | None = None,
    table: LayerTable | None = None,
    cost: Callable[[Plan], float] | None = None,
    budget: float | str | None = None,
) -> Budget:
    """The budget that is given, or all of several, see `search`. BudgetError for none, a half of one, or one that the
    unpruned model is within."""
    given = {"flops": flops, "params": params, "latency": latency}
    budget = fraction_of(budget)
    none = all(asked is None for asked in (*given.values(), budget))
    if none or (cost is None) != (budget is None) or (table is None) != (latency is None):
        raise BudgetError(
            "give one budget: flops=…, params=…, latency=… with table=…, or cost=… with budget=…, the fraction that is "
            "kept; several of them must all hold"
        )
    costs: dict[str, tuple[Callable[[Plan], float], str]] = {
        "flops": (lambda plan: traced.cost(plan).macs, "MACs"),
        "params": (lambda plan: traced.cost(plan).params, "parameters"),
    }
    parts = []
    if table is not None:
        price = Price(traced, table)
        costs["latency"] = price, "latency"
    for key, asked in given.items():
        if asked is None:
            continue
        measure, unit = costs[key]
        full = price.dense if key == "latency" else measure(Plan())
        keep, amount = budget_of(key, asked) if isinstance(asked, str) else (asked, False)
        if amount and keep >= full:
            raise BudgetError(f"a budget of {asked} asks for nothing: the model has {human(full)} of {unit}; give less")
        keep = keep / full if amount else keep
        parts.append(Budget.of(measure, keep, unit, full=full, weighed=key == "latency"))
    if cost is not None and budget is not None:
        parts.append(Budget.of(cost, budget, "cost"))
    return Budget.all_of(parts)


def _check_option(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), list(known), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}"
        raise RecipeError(f"unknown {name} {value!r}; {hint}")


def _has_batch_norm(traced: TracedModel) -> bool:
    return any(operation.target is BATCH_NORM for operation in traced.operations)


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """The same random numbers and the same convolution algorithms every time; the user's are put back afterwards."""
    backend = torch.backends.cudnn
    with torch.random.fork_rng(), backend.flags(enabled=backend.enabled, benchmark=False, deterministic=True):
        torch.manual_seed(seed)
        yield
