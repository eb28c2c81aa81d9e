"""The plan of a job: what the search is asked for, what it judges candidates on, and what it found."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ekgfx.data import Loader
from ekgfx.distributed.team import team
from ekgfx.errors import RunError
from ekgfx.graph.plan import Plan
from ekgfx.pipeline import timing
from ekgfx.pipeline.job import Job
from ekgfx.runs import checkpoint
from ekgfx.runs.directory import Run
from ekgfx.search import SearchResult, SearchSettings, Step, find_budget, search
from ekgfx.search.effort import quick_accept
from ekgfx.search.ignore import ignored_groups
from ekgfx.search.latency import LayerTable
from ekgfx.search.problem import Budget, Problem, tied_rules
from ekgfx.search.reward import Objective
from ekgfx.settings.recipe import Search
from ekgfx.surgery.tied import ties_of
from ekgfx.tracing.traced import TracedModel
from ekgfx.training import step_zero

HISTORY = "history.jsonl"
VALIDATION = "validation.json"


def smallest(traced: TracedModel, asked: Search, align: int, table: LayerTable | None = None) -> Plan:
    """The smallest sub-network that the settings allow (its widths; which channels is left open).

    align: in channels (`timing.alignment`); table: the layers' timings, for a latency budget.

    Raises:
        PlanError: an ignore pattern matches nothing.
        BudgetError: nothing can be pruned, or even this sub-network is beyond the budget.
    """
    ties, ignored = ties_of(traced, asked.uniform_layers), ignored_groups(traced.groups, asked.ignore)
    rules, members = tied_rules(traced, ties, ignored, align, asked.min_width)
    budget = budget_of(traced, asked, table)
    problem = Problem(traced, (), Objective(), budget, rules, False, False, False, members=members)
    problem.check_reachable()
    steps = {group: step * rules[unit].minimum for unit in rules for group, step in problem.of(unit).items()}
    return Plan({group: tuple(range(count)) for group, count in steps.items()}, traced.groups.digest, **traced.options)


def budget_of(traced: TracedModel, asked: Search, table: LayerTable | None) -> Budget:
    """The budget of a job, or all of several that must hold; of a list the tightest.

    Raises BudgetError for an amount that the unpruned model is within.
    """
    return find_budget(traced, **asked.budgets, table=table, cost=None, budget=None)


def find_plan(job: Job) -> SearchResult:
    """The search, or its result where it was finished before."""
    asked = job.recipe.search
    if job.run.has(checkpoint.PLAN):
        return read_result(job.run)
    traced, history = job.traced, job.run.lines(HISTORY)
    team().broadcast_model(job.built.model)  # each process trained it; GPUs may differ in the last bit
    batches = validation_batches(job)
    job.report.stage("search")
    table = timing.layer_table(job)
    keep = budget_of(traced, asked, table).keep

    def on_step(step: Step) -> None:
        job.run.append(HISTORY, step.to_json())
        job.report.step(step, keep)

    result = search(
        traced,
        batches,
        settings_of(job, pace(job, batches, keep), align_of(job, table)),
        table=table,
        logits=job.logits,
        on_step=on_step,
        resume_from=history,
    )
    if result.points:
        job.run.update(points=[dict(point.asked) for point in result.points])
    write_result(job, result)
    return result


def write_result(job: Job, result: SearchResult) -> None:
    """Writes plan.json: the plan, and all that is known of the search but its steps."""
    facts = {key: value for key, value in result.to_json().items() if key != "steps"}
    before, after = job.traced.layer_macs(), job.traced.layer_macs(result.plan)
    layers = [{"name": name, "before": macs, "after": after[name]} for name, macs in before.items()]
    checkpoint.write_plan(job.run, result.plan, reached=result.kept_fraction, search=facts, layers=layers)


def settings_of(job: Job, accept: int, align: int) -> SearchSettings:
    """What the search is asked: the recipe's settings, with those decided that it leaves to the job."""
    asked = job.recipe.search
    shared = {field.name for field in fields(SearchSettings)} & {field.name for field in fields(Search)}
    decided = {"accept": accept, "align": align, "seed": job.recipe.seed}
    return SearchSettings(**{**{name: getattr(asked, name) for name in shared}, **decided})


def align_of(job: Job, table: LayerTable | None) -> int:
    """The alignment of a job's widths, in channels."""
    return timing.alignment(job.recipe.search, table, job.device.type, job.recipe.export.fp16)


def pace(job: Job, batches: list[Any], keep: float) -> int:
    """How many candidates a step of the search takes together."""
    asked = job.recipe.search
    if asked.accept is not None or job.labelled or asked.strategy != "ekg":
        return asked.accept or 1
    samples = sum(len(batch.images) for batch in batches)
    together = quick_accept(job.traced, samples, keep, step=asked.step)
    if together > 1:
        job.report.note(
            f"a step takes its {together} best candidates together, for time's sake (--accept 1: one, as the paper)"
        )
    return together


def read_result(run: Run) -> SearchResult:
    """A finished search, from plan.json and history.jsonl."""
    plan = checkpoint.read_plan(run.path)
    facts = run.read(checkpoint.PLAN).get("search")
    if facts is None:
        raise RunError(f"the run at {run.path} has a plan but no search; make a new run with `ekgfx prune`")
    result = SearchResult.from_json({**facts, "steps": own_steps(run.lines(HISTORY))})
    if result.plan.digest != plan.digest:
        raise RunError(f"{run.path / HISTORY} does not lead to the plan beside it; it was changed since the search")
    return result


def own_steps(lines: Sequence[Any]) -> list[Any]:
    """The lines of history.jsonl that lead to the run's own plan: not to the other ones of several budgets, which
    plan.json has."""
    return [line for line in lines if not (isinstance(line, Mapping) and line.get("towards"))]


def validation_batches(job: Job) -> list[Any]:
    """What candidates are judged on: a part of the training split that step 0 did not train on."""
    if job.data is None:
        return []
    asked = job.recipe.search
    per_class = (asked.train_per_class, asked.val_per_class) if job.labelled else (0, asked.images)
    _, chosen = job.data.search_subset(*per_class, seed=job.recipe.seed)
    size = asked.val_batch_size or job.batch_size
    if asked.hardest_first and asked.strategy == "ekg" and job.labelled:
        chosen = hardest_first(job, job.data.loader("train", size, subset=chosen), chosen)
    return list(job.data.loader("train", size, subset=chosen))


def hardest_first(job: Job, batches: Loader, chosen: Tensor) -> Tensor:
    """The samples `chosen`, which are those of `batches`, in the order that the search takes them. It is kept: rounding
    differs between machines, and a search that goes on must see the same batches."""
    if not job.run.has(VALIDATION):
        order = team().broadcast_object(step_zero.hardness_order(job.built.model, batches, job.logits))
        job.run.write_json(VALIDATION, {"samples": chosen[order].tolist()})
    return torch.tensor(job.run.read(VALIDATION)["samples"])
