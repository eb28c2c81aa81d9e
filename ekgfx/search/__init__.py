"""The search for a plan within a budget: `search(traced, batches, flops=0.55)`."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Unpack

import torch
from torch import Tensor

from ekgfx.base.units import budget_of, bytes_of, fraction_of, human
from ekgfx.errors import BudgetError, DataError, PruneError, RecipeError
from ekgfx.execution.channels_last import quicker_channels_last
from ekgfx.execution.subnetwork import has_batch_norm
from ekgfx.graph.arguments import check_inputs
from ekgfx.graph.blocks import Block
from ekgfx.graph.plan import Plan
from ekgfx.search.company import check_mixed
from ekgfx.search.criteria import IMPORTANCE, NEEDS_DATA, of_weights
from ekgfx.search.details import AUTHORS, PAPER, Details, authors_cost
from ekgfx.search.ignore import as_patterns, enclosing, ignored_groups
from ekgfx.search.latency import LayerTable, Price
from ekgfx.search.own import check_takes, name_of
from ekgfx.search.problem import DROP, Budget, Computing, Problem, tied_rules
from ekgfx.search.recorder import Recorder
from ekgfx.search.result import Candidate, Measure, Point, SearchResult, Step, as_steps
from ekgfx.search.reward import Objective, Reward, assess, label_free, validation_batches
from ekgfx.search.settings import STRATEGIES, SearchOptions, SearchSettings, check_known
from ekgfx.settings.budgets import label_of
from ekgfx.surgery.description import description
from ekgfx.surgery.dropped import check_droppable
from ekgfx.surgery.tied import ties_of
from ekgfx.tracing.traced import TracedModel, check_traced
from ekgfx.training.loss import cross_entropy
from ekgfx.training.outputs import Logits, finder, logits_of

log = logging.getLogger("ekgfx")

__all__ = [
    "AUTHORS",
    "IMPORTANCE",
    "NEEDS_DATA",
    "PAPER",
    "STRATEGIES",
    "Candidate",
    "Details",
    "Measure",
    "Point",
    "SearchResult",
    "SearchSettings",
    "Step",
    "authors_cost",
    "find_budget",
    "of_weights",
    "search",
]


def search(
    traced: TracedModel,
    batches: Iterable[Any] = (),
    settings: SearchSettings | None = None,
    *,
    table: LayerTable | None = None,
    cost: Callable[[Plan], float] | None = None,
    budget: float | str | None = None,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    logits: Logits = logits_of,
    reward: Reward | None = None,
    on_step: Callable[[Step], None] | None = None,
    resume_from: Sequence[Step | Mapping[str, Any]] | None = None,
    **options: Unpack[SearchOptions],
) -> SearchResult:
    """Search for the sub-network within a budget that keeps the most potential.

    Args:
        traced: the model; neither its weights nor its running averages are changed.
        batches: validation batches: `(images, labels, …)`, `(images, None, …)` or images; images may be a tuple of
            inputs or a mapping of them by name, and a batch a mapping with labels in it. Without labels, the unpruned
            network's soft predictions are the labels. Every batch should mix the classes, since BatchNorm takes its
            statistics; a warning is logged where they are sorted. They are read once and held on the model's device.
            `uniform` and `global` with an importance of the weights alone need none.
        settings: how to search, and the budget; the defaults are the paper's.
        table: under a budget of `latency`, the layers' timings (`ekgfx.export.measure_layers`).
        cost: any function of a plan, for a budget instead of the settings' or beside them. There must be one budget at
            least; of several, all must hold.
        budget: the fraction of `cost` that is kept.
        loss: label loss, `loss(output, target)` → mean over the batch; cross-entropy is that of the logits.
        logits: where the logits B × K × …, which the knowledge is compared with, are in a model's output: a function of
            it, or a key, a field or an index. By default they are found, where it is clear
            (`ekgfx.training.outputs.logits_of`).
        reward: in place of eq. 4, a function `reward(logits, target, knowledge)` → mean over the batch, the higher the
            better: of a sub-network's logits, the batch's labels, and the logits T that it is compared with (None for
            the knowledge "none"). The importance "taylor" is of its gradient.
        on_step: called after every step.
        resume_from: the steps of an interrupted search (or their JSON) to go on after.
        options: fields of `SearchSettings`, which replace those of `settings`: `flops=0.55, importance="magnitude"`.

    Returns:
        The plan, and every step to it.

    Raises:
        BudgetError: nothing can be pruned, or the budget cannot be reached; says how far it can go.
        DataError: batches are missing, or don't fit the model's output.
        PlanError: an ignore pattern matches nothing; `resume_from` belongs to another model, data or search.
        TrainingError: the loss is not finite.
        RecipeError: an option has an unknown name or value, or the table is of another model.

    Example:
        >>> result = ekgfx.search(traced, batches, flops=0.55)
        >>> pruned = ekgfx.prune(model, result.plan, traced)
    """
    check_traced(traced, "search")
    check_known(options)
    asked = replace(settings or SearchSettings(), **options)
    if reward is not None:
        check_takes(reward, "reward", "logits", "target", "knowledge")
    lead, criterion = asked.lead, asked.criterion
    history = as_steps(resume_from or ())
    points = asked.points
    limits = [find_budget(traced, **point, table=table, cost=cost, budget=budget) for point in points]
    if asked.depth:
        limits = [replace(limit, weighed=True) for limit in limits]
    limit = limits[-1]
    asked = replace(
        asked,
        ignore=as_patterns(traced, asked.ignore),
        rescale=has_batch_norm(traced) if asked.rescale is None else asked.rescale,
        early_stop=asked.details == PAPER if asked.early_stop is None else asked.early_stop,
        channels_last=quicker_channels_last(traced.model) if asked.channels_last is None else asked.channels_last,
    )
    problem = _problem(traced, batches, asked, limit, Objective(loss, finder(logits), asked.details.batch_size, reward))
    with _reproducible(asked.seed):
        given = problem.batches
        problem, baseline = _measure_unpruned(problem)
        check_mixed(problem, given)
        others = dict(zip(map(label_of, points[:-1]), limits, strict=False))
        recorder = Recorder(problem, on_step, history, others)
        lead(problem, criterion, recorder)
        for label in others.keys() - recorder.ways.keys():  # of a strategy that does not know them
            lead(replace(problem, budget=others[label]), criterion, recorder.leave(label, 0))
    return SearchResult(
        full=problem.full(),
        sizes={name: group.size for name, group in traced.groups.items()},
        baseline=baseline,
        steps=tuple(recorder.steps),
        settings={
            "budget": {"unit": limit.unit, "keep": limit.keep},
            **asked.to_json(),
            "samples": sum(batch.samples for batch in problem.batches),
        },
        points=_points(points, limits, recorder) if others else (),
    )


def _points(
    asked: Sequence[Mapping[str, float | str]], limits: Sequence[Budget], recorder: Recorder
) -> tuple[Point, ...]:
    """What was found for each of several budgets, the loosest first."""
    found = []
    for given, limit in zip(asked[:-1], limits, strict=False):
        along, way = recorder.ways[label_of(given)]
        found.append(Point(given, limit.unit, limit.keep, along, tuple(way.steps[along:])))
    return (*found, Point(asked[-1], limits[-1].unit, limits[-1].keep, len(recorder.steps)))


def _problem(
    traced: TracedModel, batches: Iterable[Any], asked: SearchSettings, budget: Budget, objective: Objective
) -> Problem:
    """What is asked, checked. asked: with all that it leaves to the model decided."""
    computing = Computing(bytes_of(asked.cache), bool(asked.early_stop), asked.amp, bool(asked.channels_last))
    ignored = ignored_groups(traced.groups, as_patterns(traced, asked.ignore))
    ties = ties_of(traced, asked.uniform_layers)
    if asked.uniform_layers and description(traced) is None:
        log.info(
            "uniform layers: no configuration builds %s; repeated layers share their widths",
            type(traced.model).__name__,
        )
    whole = "; ".join(f"{name} ({why})" for name, why in list(ties.held.items())[:3])
    whole += f"; and {len(ties.held) - 3} more" if len(ties.held) > 3 else ""
    if asked.uniform_layers and ties.held:
        log.info("uniform layers: these groups stay whole: %s", whole)
    rules, members = tied_rules(traced, ties, ignored, asked.align, asked.min_width)
    if asked.uniform_layers and ties.held and not rules and not traced.groups.keys() <= ignored:
        raise BudgetError(f"no width can shrink with uniform_layers: {whole}; search without it")
    problem = Problem(
        traced=traced,
        batches=tuple(map(computing.prepared, validation_batches(batches, traced.model))),
        objective=objective,
        budget=budget,
        rules=rules,
        members=members,
        guided=asked.knowledge != "none",
        ensemble=asked.knowledge == "ensemble",
        rescale=bool(asked.rescale),
        computing=computing,
        seed=asked.seed,
        blocks=_blocks(traced, asked) if asked.depth else {},
    )
    problem.check_reachable()
    for batch in problem.batches:
        check_inputs(traced, *batch.inputs)
    if not problem.batches and asked.needs_data:
        raise DataError(
            f"strategy {name_of(asked.strategy)!r} with importance {name_of(asked.importance)!r} needs validation "
            "batches; pass some"
        )
    return problem


def _blocks(traced: TracedModel, asked: SearchSettings) -> dict[str, Block]:
    """The residual blocks that may be dropped, by unit: those that `ignore` does not name, by themselves or by a module
    or parameter of theirs."""
    if asked.strategy != "ekg" or asked.uniform_layers:
        other = "uniform_layers" if asked.uniform_layers else f"strategy {name_of(asked.strategy)!r}"
        raise RecipeError(f"depth goes with the strategy 'ekg' and without uniform_layers, not with {other}")
    patterns = as_patterns(traced, asked.ignore)
    found = {}
    for name, (block, *_) in traced.blocks.items():
        names = {name, *enclosing(block.weights)} if block is not None else set()
        if block is not None and not any(fnmatchcase(each, pattern) for each in names for pattern in patterns):
            found[DROP + name] = block
    try:
        if found:
            check_droppable(traced, [block.name for block in found.values()])
    except PruneError as error:
        raise PruneError(f"{error}; search without depth, or name the block in ignore") from error
    return found


def _measure_unpruned(problem: Problem) -> tuple[Problem, Measure]:
    """The problem with T₀, the logits of Θ₀, and with labels where it had none; and Θ₀ measured."""
    network, objective = problem.network(problem.full()), problem.objective
    if problem.batches and problem.batches[0].target is None:
        if objective.loss is not cross_entropy:
            raise DataError("a loss of your own needs targets, and the validation batches have none")
        problem = replace(problem, batches=label_free(network, problem.batches, objective))
    if not problem.batches:
        return problem, problem.measure(problem.full(), None)
    evaluation, logits = assess(network, problem.batches, replace(objective, reward=None), None, check=True)
    if problem.guided or objective.reward is not None:
        evaluation, _ = assess(network, problem.batches, objective, logits if problem.guided else None)
    return replace(problem, unpruned=logits), problem.measure(problem.full(), evaluation)


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


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """The same random numbers and the same convolution algorithms every time; the user's are put back afterwards."""
    backend = torch.backends.cudnn
    with torch.random.fork_rng(), backend.flags(enabled=backend.enabled, benchmark=False, deterministic=True):
        torch.manual_seed(seed)
        yield
