"""The settings of a search: one value, which `search` takes whole or as keywords."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal, TypedDict, get_args

from ekgfx.base.ranges import at_least
from ekgfx.errors import RecipeError
from ekgfx.search import ekg, global_, uniform
from ekgfx.search.criteria import IMPORTANCE, NEEDS_DATA
from ekgfx.search.details import PAPER, Details
from ekgfx.search.ignore import Ignored
from ekgfx.search.importance import Criterion
from ekgfx.search.own import check_takes, checked_criterion, name_of
from ekgfx.search.problem import Problem
from ekgfx.search.recorder import Recorder
from ekgfx.search.reward import KnowledgeMode
from ekgfx.settings import recipe
from ekgfx.settings.budgets import Amounts

Strategy = Callable[[Problem, Criterion, Recorder], None]
"""Leads a search. It is given the problem, the criterion that scores channels, and the recorder, at whose `plan` it
starts and which it tells every step, until `problem.budget.met(recorder.plan)`."""

STRATEGIES = ("ekg", "global", "uniform")
"""The strategies that have a name."""


class SearchOptions(TypedDict, total=False):
    """The keywords of `search` that set a field of `SearchSettings`, for editors and type checkers."""

    flops: Amounts
    params: Amounts
    latency: Amounts
    strategy: str | Strategy
    importance: str | Criterion
    knowledge: KnowledgeMode
    step: float
    accept: int
    align: int
    min_width: float
    ignore: Ignored | Sequence[Ignored]
    uniform_layers: bool
    depth: bool
    rescale: bool | None
    details: Details
    seed: int
    cache: int | str
    early_stop: bool | None
    amp: Literal["bf16", "fp16"] | None
    channels_last: bool | None


@dataclass(frozen=True)
class SearchSettings(recipe.SearchSettings):
    """How a plan is searched for: what a recipe can say of it, and what only Python can.

    Attributes:
        flops, params, latency: the budget: fraction of the MACs, the parameters or the milliseconds that is kept (0.55
            or "55%"), or an amount ("2.0G" MACs per sample, "5M" parameters, "8ms"). Of several, all must hold. One of
            them may be a list: the result is of its tightest, and `SearchResult.at` gives what was found for the
            others on the way, for little more than the time of that one.
        strategy: "ekg"; "uniform" (one width for all groups), "global" (one threshold for all channels); or a function
            of your own (`Strategy`).
        importance: which channels go first: "taylor" (the paper's), "taylor-per-sample" (what samples lose does
            not cancel), "least-squares" (what the others cannot stand in for), or torch-pruning's "magnitude" (L1),
            "fpgm", "bn-scale", "hessian", "lamp"; or "random", the baseline: any channels, as `seed` draws them; or a
            function of your own (`ekgfx.search.importance.Criterion`, `ekgfx.search.of_weights`).
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
        depth: whether whole residual blocks may be dropped (`TracedModel.blocks`), as further candidates of each step.
            Steps then minimise the reward lost for the cost saved, as under a budget of milliseconds: a block saves
            far more than one reduction of a width. With the strategy "ekg".
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

    Raises:
        RecipeError: an option has an unknown value.

    Example:
        >>> from ekgfx.search import SearchSettings
        >>> settings = SearchSettings(flops=0.55, importance="magnitude", align=8)
        >>> result = ekgfx.search(traced, batches, settings)
    """

    strategy: str | Strategy = "ekg"
    importance: str | Criterion = "taylor"
    accept: int = 1
    align: int = 1
    ignore: Ignored | Sequence[Ignored] = ()
    details: Details = PAPER
    seed: int = 0
    cache: int | str = "2GiB"

    def __post_init__(self) -> None:
        for name, known in (
            ("strategy", STRATEGIES),
            ("importance", IMPORTANCE),
            ("knowledge", get_args(KnowledgeMode)),
            ("amp", (None, "bf16", "fp16")),
        ):
            _check(name, getattr(self, name), known)
        super().__post_init__()
        at_least(self, 1, "align", "accept")

    @property
    def criterion(self) -> Criterion:
        """What scores the channels; RecipeError for a function that cannot."""
        return IMPORTANCE[self.importance] if isinstance(self.importance, str) else checked_criterion(self.importance)

    @property
    def lead(self) -> Strategy:
        """What leads the search."""
        if not isinstance(self.strategy, str):
            check_takes(self.strategy, "strategy", "problem", "criterion", "recorder")
            return self.strategy
        pace = ekg.Pace(self.step, self.accept)
        named: dict[str, Strategy] = {
            "ekg": partial(ekg.run, pace=pace, details=self.details),
            "global": global_.run,
            "uniform": uniform.run,
        }
        return named[self.strategy]

    @property
    def needs_data(self) -> bool:
        """Whether the search cannot do without validation batches, as far as that is known."""
        return self.strategy == "ekg" or self.importance in NEEDS_DATA

    def to_json(self) -> dict[str, Any]:
        """Plain values for the record; functions by their names, `ignore` as its patterns."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        named = {key: name_of(told[key]) for key in ("strategy", "importance")}
        return {**told, **named, "details": asdict(self.details), "ignore": list(told["ignore"])}


def check_known(options: Iterable[str]) -> None:
    """RecipeError for a keyword of `search` that does not exist."""
    known = [field.name for field in fields(SearchSettings)]
    for name in options:
        if name not in known:
            raise RecipeError(f"the search has no setting {name!r}{_hint(name, known)}")


def _check(name: str, value: Any, known: Iterable[Any]) -> None:
    if not callable(value) and value not in known:
        raise RecipeError(f"unknown {name} {value!r}{_hint(str(value), [each for each in known if each])}")


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; use one of {', '.join(known)}"
