"""A plan from ratios that the user gives, layer by layer, without a search."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ekgfx.base.units import fraction_of
from ekgfx.errors import PlanError, RecipeError
from ekgfx.graph.plan import Plan
from ekgfx.search import find_budget
from ekgfx.search.candidates import important_first
from ekgfx.search.criteria import IMPORTANCE, NEEDS_DATA
from ekgfx.search.ignore import Ignored, as_patterns, enclosing, ignored_groups
from ekgfx.search.importance import Criterion
from ekgfx.search.own import checked_criterion
from ekgfx.search.problem import Problem, width_rules
from ekgfx.search.reward import Objective
from ekgfx.tracing.traced import TracedModel, check_traced

OF_WEIGHTS = {name: criterion for name, criterion in IMPORTANCE.items() if name not in NEEDS_DATA}


def plan(
    traced: TracedModel,
    ratios: Mapping[str, float | int | str],
    *,
    importance: str | Criterion = "magnitude",
    ignore: Ignored | Sequence[Ignored] = (),
    align: int = 1,
    seed: int = 0,
) -> Plan:
    """A plan with the widths that you give; which channels stay, their importance decides.

    Args:
        traced: the traced model.
        ratios: what is kept of the channels that layers compute: glob patterns of the names of groups, modules or their
            weights (`*` also matches dots) with a fraction (0.5 or "50%") or, as a whole number, how many. Of several
            patterns that mean a group the last one counts; groups that none means keep all channels. Layers whose
            channels are coupled have one width.
        importance: which channels stay: "magnitude" (L1), "fpgm", "bn-scale", "lamp", "random", or a criterion of your
            own (`ekgfx.search.importance.Criterion`).
        ignore: what keeps all channels whatever `ratios` says, as in `search`.
        align: kept channels are a multiple of this where the group is at least that wide.
        seed: of "random".

    Raises:
        PlanError: a pattern matches nothing; the message has the nearest names.
        RecipeError: a ratio that is no fraction and no number of channels, or an unknown importance.

    Returns:
        The plan; `traced.cost(plan)` says what it leaves.

    Example:
        >>> plan = ekgfx.plan(traced, {"*": 0.75, "fuse.*": 32})
        >>> pruned = ekgfx.prune(model, plan, traced)
    """
    check_traced(traced, "plan")
    if not isinstance(ratios, Mapping):
        kind = type(ratios).__name__
        raise RecipeError(f'ratios are a mapping of names to what is kept, such as {{"*": 0.5}}, and no {kind}')
    if isinstance(importance, str):
        if importance not in OF_WEIGHTS:
            raise RecipeError(
                f"importance {importance!r}: a plan from ratios takes {', '.join(OF_WEIGHTS)}, or a function; `search` "
                "has those that look at data"
            )
        criterion = OF_WEIGHTS[importance]
    else:
        criterion = checked_criterion(importance)
    if align < 1:
        raise RecipeError(f"align {align}: use at least 1 channel")
    rules = width_rules(traced, ignored_groups(traced.groups, as_patterns(traced, ignore)), align, 0.0)
    asked = {group: ratio for pattern, ratio in ratios.items() for group in _meant(traced, pattern)}
    problem = Problem(
        traced=traced,
        batches=(),
        objective=Objective(),
        budget=find_budget(traced, flops=0.5),  # nobody asks
        rules={name: rule for name, rule in rules.items() if name in asked},
        guided=False,
        ensemble=False,
        rescale=False,
        seed=seed,
    )
    scores = criterion(problem, problem.full(), None)
    made = problem.full()
    for name, rule in problem.rules.items():
        count = rule.kept(_share(name, asked[name], rule.size))
        made = made.with_kept(name, important_first(range(rule.size), scores[name])[:count])
    return made


def _meant(traced: TracedModel, pattern: str) -> list[str]:
    """The groups that a pattern means: by name, or by a layer that computes their channels, not one that reads them."""
    known = {group.name: {group.name, *enclosing(group.producers)} for group in traced.groups.values()}
    found = [name for name, names in known.items() if any(fnmatchcase(each, pattern) for each in names)]
    if not found:
        close = get_close_matches(pattern, sorted(set().union(*known.values())), n=2)
        near = f"; did you mean {' or '.join(map(repr, close))}?" if close else "; `ekgfx groups MODEL` lists them"
        raise PlanError(f"ratios: {pattern!r} is no layer whose channels can be pruned{near}")
    return found


def _share(group: str, ratio: float | int | str, size: int) -> float:
    """What is kept of a group's channels, as a fraction."""
    kept = fraction_of(ratio)
    if isinstance(kept, int) and not isinstance(kept, bool) and 1 <= kept <= size:
        return kept / size
    if isinstance(kept, float) and 0 < kept <= 1:
        return kept
    raise RecipeError(
        f"ratio {ratio!r} of {group} ({size} channels): use the fraction to keep, such as 0.5, or the number of "
        f"channels, 1 to {size}"
    )
