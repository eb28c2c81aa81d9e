"""Make a cut module what was predicted, changing as little of it as possible.

Standard layers follow from their weights. Beyond them nothing is changed at first: the cut module is run and traced
again, and the operators that differ from the prediction say which modules' Python does not give it. Only the integers
of those modules are changed, and put back where that makes no difference. A module that no choice of integers makes
right gets a forward that is written for it.
"""

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.axes import Axis, counted
from ekgfx.errors import EkgfxError, PruneError
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.plan import Plan
from ekgfx.graph.untouched import State, deep_copy
from ekgfx.graph.ways import Way
from ekgfx.rewriting.calls import hollow
from ekgfx.rewriting.forward import Version, rewrite
from ekgfx.rewriting.patched import forward_of, put_forward
from ekgfx.surgery.assignments import assignments, kind_of, take
from ekgfx.surgery.behaviour import as_good, behaviour, shapes_taken
from ekgfx.surgery.check import Mismatch, compare_outputs, differences
from ekgfx.surgery.dropped import recorded
from ekgfx.surgery.faults import Problem, blamed, failing, training_error
from ekgfx.surgery.integers import STANDARD, Attributes, Choice, choices_of, own_configurations
from ekgfx.surgery.outline import Step, otherwise, outline_of, outlined, transcript
from ekgfx.tracing.trace import retrace
from ekgfx.tracing.traced import TracedModel

MOST_TRIALS, MOST_RUNS = 16, 64
"""Choices of integers that are traced, at most, and those that are run before."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}


@dataclass(frozen=True)
class Prediction:
    """What a cut module must be: the sliced graph on `weights`, the cut tensors themselves.

    twin: the uncut model without its weights, where the original has been cut itself. before: the integers that its
    modules had. state: what modules have otherwise now than when they were traced, as it was then. ways: of training,
    those in which the outputs of the original and of its graph were equal.
    """

    source: TracedModel
    plan: Plan
    kept: Mapping[Axis, Tensor]
    weights: Mapping[str, Tensor]
    before: Attributes
    twin: nn.Module | None = None
    state: State = field(default_factory=dict)
    ways: Collection[Way] = ()

    @property
    def counts(self) -> dict[Axis, int]:
        return {axis: len(index) for axis, index in self.kept.items()}


def settle(pruned: nn.Module, predicted: Prediction, may_replace: bool = True) -> None:
    """Make the cut module, whose standard layers are right, what was predicted.

    may_replace: a module's forward may be replaced where nothing else helps.

    Raises:
        PruneError: that cannot be done; the message names the module and what to do.
    """
    _Settling(pruned, predicted, may_replace).run()


class _Settling:
    def __init__(self, pruned: nn.Module, predicted: Prediction, may_replace: bool) -> None:
        self.pruned, self.predicted, self.may_replace = pruned, predicted, may_replace
        self.source = predicted.source
        self.own = {name: forward_of(module) for name, module in pruned.named_modules()}
        self.put: set[str] = set()
        self.inline: set[str] = set()  # modules whose forward could not be written: their callers run what they run
        self.changed: list[Choice] = []
        self.open = choices_of(pruned, self.source, predicted.counts, predicted.before)
        self.tried: set[str] = set()
        self.cleared: set[str] = set()  # modules that integers of others were settled for
        self.recorded: list[Version] | None = None
        self.read: dict[tuple, bool] = {}
        uncut = self.source.model is not pruned
        self.trains = self.source.trains and not (uncut and training_error(self.source.model, self.source))

    def run(self) -> None:
        problems = self.problems()
        for _ in range(4 * len(list(self.pruned.modules())) + 4):
            if not problems:
                break
            for problem in problems:
                if problem.module is None:
                    raise self._error(problem)
            left = self._by_attributes(problems)
            if left is None:
                for problem in problems:
                    self._replace(problem)
                left = self.problems()
            problems = left
        if problems:
            raise self._error(problems[0])
        self._put_back()
        self._limit()

    def _error(self, problem: Problem) -> PruneError:
        return PruneError(f"the pruned {type(self.pruned).__name__} is not what was predicted: {problem.text}")

    # -- what is wrong ----------------------------------------------------------------------------------------------

    def problems(self) -> list[Problem]:
        """Run the cut module, trace it again and compare it with the prediction; empty if all agrees."""
        trained = [replace(self.source.way, training=True)] if self.trains else []
        examples = dict.fromkeys(trained, self.source.example) | {g.way: g.example for g in self.source.graphs}
        for way, example in examples.items():
            failed = failing(self.pruned, way, example)
            if failed is not None:
                return [failed]
        try:
            again = retrace(self.pruned, self.source, self.predicted.state)
        except EkgfxError as error:  # its Python may do otherwise there than when it runs
            module = getattr(error, "module", None)
            return [Problem(None if module is None else blamed(self.pruned, module), str(error))]
        found = differences(self.source, self.predicted.counts, again)
        if all(difference.another for difference in found):
            problems = self._in_numbers(again)
            if not problems or not found:
                return problems
        return [Problem(blamed(self.pruned, d.module), str(d)) for d in _first_of_each(found)]

    def _in_numbers(self, again: TracedModel) -> list[Problem]:
        """What is wrong with the cut module's cost and outputs. again: it, traced."""
        if again.cost() != self.source.cost(self.predicted.plan):
            cost = self.source.cost(self.predicted.plan)
            return [Problem(None, f"it costs {again.cost()}, predicted were {cost}")]
        for graph in self.source.graphs:
            if graph.way.training and graph.way not in self.predicted.ways:
                continue
            off = self._off(graph, self.pruned, self.predicted.weights, *graph.example)
            if off is not None:
                text = f"its output in {graph.way} differs from the sliced graph's by {off:.1e}"
                return [Problem(None, text)]
        fault = training_error(self.pruned, self.source) if self.trains else None
        return [] if fault is None else [Problem(None, f"it does not train: {fault}")]

    def _off(
        self, graph: AxisGraph, pruned: nn.Module, weights: Mapping[str, Tensor], args: tuple, kwargs: dict
    ) -> float | None:
        """How far the output is from the sliced graph's, None where that is rounding: in float64 there is next to
        none, so what differs by more than usual is computed again there."""
        dtype = next((p.dtype for p in pruned.parameters()), torch.float32)
        parameters = dict(pruned.named_parameters(remove_duplicate=False))
        held = {n: t if n in parameters else t.clone() for n, t in weights.items()}  # only buffers change in a run
        off = compare_outputs(pruned, SubNetwork(graph, self.predicted.kept, weights=held), args, kwargs)
        if off <= TOLERANCE.get(dtype, 0.05):
            return None
        if dtype == torch.float64:
            return off
        args, kwargs = pytree.tree_map_only(Tensor, _double, (args, kwargs))
        weights = {name: _double(tensor) for name, tensor in weights.items()}
        return self._off(graph, deep_copy(pruned).double(), weights, args, kwargs)

    # -- integers ---------------------------------------------------------------------------------------------------

    def _by_attributes(self, problems: list[Problem]) -> list[Problem] | None:
        """Settle the integers of the modules in question, all of a class alike; what is left to do then, None where no
        integer helps."""
        for problem in problems:
            kind = type(self.pruned.get_submodule(problem.module or ""))
            if problem.module in self.tried or problem.module in self.put:
                continue
            alike = {n for n, m in self.pruned.named_modules() if type(m) is kind}
            self.tried |= alike
            mine = [c for c in self.open if (c.governor in alike or c.module in alike) and c not in self.changed]
            left = self._helped(mine, alike)
            if left is not None:
                return left
        return self._by_others({problem.module or "" for problem in problems})

    def _by_others(self, blamed: set[str]) -> list[Problem] | None:
        """What shows in one module may come from others that run before it: padding that is too wide, say. So all
        likely integers are settled anew, modules of one class alike, or each for itself where they are few."""
        if blamed <= self.put | self.cleared:
            return None
        self.cleared |= blamed
        likely = [choice for choice in self.open if choice.likely]
        left = self._helped(likely, self.cleared)
        return self._helped(likely, self.cleared, apart=True) if left is None else left

    def _helped(self, choices: list[Choice], blamed: Collection[str], apart: bool = False) -> list[Problem] | None:
        """Settle these integers so that nothing is left to blame on those modules; what is left elsewhere, None where
        no way does that."""
        if not choices:
            return None
        if any(choice.configured for choice in choices):
            own_configurations(self.pruned)
        before = {choice: choice.now(self.pruned) for choice in choices}
        most, traces = MOST_TRIALS if self._wanted is None else MOST_RUNS, 0
        for trial in itertools.islice(self._ways(choices, apart), most):
            take(self.pruned, trial)
            if self._surely_wrong(blamed):
                continue
            if traces == MOST_TRIALS:
                break
            left, traces = self.problems(), traces + 1
            if not any(p.module is None or p.module in blamed for p in left):
                self.changed += [choice for choice in choices if choice not in self.changed]
                return left
        take(self.pruned, before)
        return None

    def _ways(self, choices: list[Choice], apart: bool) -> Iterator[dict[Choice, int]]:
        """The ways to settle integers: the likeliest, then those in which only integers change that the uncut model
        reads: what it does not read may have the size of a width by chance."""
        ways = assignments(self.pruned, choices, apart)
        yield next(ways)
        read = [choice for choice in choices if self._is_read(choice)]
        if len(read) == len(choices):
            yield from ways
        else:
            others = {choice: choice.old for choice in choices if choice not in read}
            yield from ({**others, **way} for way in assignments(self.pruned, read, apart))

    def _is_read(self, choice: Choice) -> bool:
        """Whether the uncut model runs otherwise where an integer has another value, in all modules of that kind."""
        kind = (*kind_of(self.pruned, choice), choice.old)
        if kind not in self.read:
            alike = [c for c in self.open if (*kind_of(self.pruned, c), c.old) == kind]
            known = {each: each.now(self._twin) for each in alike}
            other = next(value for value in choice.values if value != choice.old)
            take(self._twin, dict.fromkeys(alike, other))
            try:
                found = [transcript(self._twin, graph.way, graph.example) for graph in self.source.graphs]
            finally:
                take(self._twin, known)
            self.read[kind] = found != self._transcripts
        return self.read[kind]

    @cached_property
    def _twin(self) -> nn.Module:
        """The uncut model without its weights, with configurations of its own."""
        twin = hollow(self.predicted.twin or self.source.model)
        own_configurations(twin)
        for choice in self.open:
            choice.take(twin, choice.old)
        return twin

    @cached_property
    def _transcripts(self) -> list[Any]:
        return [transcript(self._twin, graph.way, graph.example) for graph in self.source.graphs]

    @cached_property
    def _wanted(self) -> list[Step] | None:
        """The outline of what was predicted; None where the original's is not that of its own graph, so that outlines
        say nothing."""
        graph, (args, kwargs) = self.source, self.source.example
        if graph.model is self.pruned:  # cut itself: there is no original to run
            return None

        buffers = {name for name, _ in graph.model.named_buffers(remove_duplicate=False)}  # which alone change in a run

        def outline(kept: Mapping[Axis, Tensor], weights: Mapping[str, Tensor]) -> list[Step] | None:
            held = {name: tensor.clone() if name in buffers else tensor for name, tensor in weights.items()}
            network = SubNetwork(graph, kept, weights=held)
            return outlined(lambda: network(*args, **kwargs))

        whole = {name: graph.tensor(name) for name in self.predicted.weights}
        if outline_of(graph.model, graph.way, graph.example) != outline({}, whole):
            return None
        return outline(self.predicted.kept, self.predicted.weights)

    def _surely_wrong(self, modules: Collection[str]) -> bool:
        """Whether a run shows, sooner than a trace, that something is left to blame on those modules."""
        if self._wanted is None:
            return False
        found = outline_of(self.pruned, self.source.way, self.source.example)
        if found is None:
            problem = failing(self.pruned, self.source.way, self.source.example)
            return problem is not None and problem.module in modules
        return any(blamed(self.pruned, module) in modules for module in otherwise(found, self._wanted))

    def _put_back(self) -> None:
        """Every integer gets back its old value where the model computes the same with it."""
        if not self.changed:
            return
        wanted = behaviour(self.pruned, self.source.example)
        kinds: dict[tuple, list[Choice]] = {}
        for choice in self.changed:
            kinds.setdefault(kind_of(self.pruned, choice), []).append(choice)
        for members in kinds.values():
            now = {choice: choice.now(self.pruned) for choice in members}
            take(self.pruned, {choice: choice.old for choice in members})
            if not as_good(behaviour(self.pruned, self.source.example), wanted):
                take(self.pruned, now)

    # -- forwards ---------------------------------------------------------------------------------------------------

    def _replace(self, problem: Problem) -> None:
        """Give a module a forward that does what is predicted, or, where that cannot be written, the one around it."""
        path = problem.module
        assert path is not None
        while True:
            module = self.pruned.get_submodule(path)
            if path not in self.put | self.inline and not isinstance(module, STANDARD):
                if not self.may_replace:
                    raise PruneError(_forbidden(path, module, problem.text))
                try:
                    self._put(path, problem.text)
                    return
                except PruneError as error:
                    problem = Problem(problem.module, f"{problem.text}; {error}")
            self.inline.add(path)
            put_forward(module, self.own.get(path))
            if not path:
                return self._replace_earlier(problem)
            path = path.rpartition(".")[0]

    def _replace_earlier(self, problem: Problem) -> None:
        """What shows in one module may come from another that runs before it, and makes what it makes by a number: as
        many zeros as before the cut, say."""
        for operation in self.source.operations:
            sizes, path = operation.effect.sizes.values(), operation.module
            follows = any(counted(size, {}) != counted(size, self.predicted.counts) for size in sizes)
            if follows and path not in self.put | self.inline:
                if not isinstance(self.pruned.get_submodule(path), STANDARD):
                    with contextlib.suppress(PruneError):
                        return self._put(path, problem.text)
                self.inline.add(path)
        raise self._error(problem)

    def _put(self, path: str, reason: str) -> None:
        if self.recorded is None:
            self.recorded = recorded(self.source, self.predicted.counts, self.predicted.twin)
        forward = rewrite(path, self.recorded, self.inline, reason)
        put_forward(self.pruned.get_submodule(path), forward)
        self.put.add(path)
        module = self.pruned.get_submodule(path)
        if isinstance(module, nn.MultiheadAttention):
            module._qkv_same_embed_dim = False  # or a TransformerEncoderLayer computes in its place what it would

    def _limit(self) -> None:
        """Forwards say what sizes they take. What a list with an entry for each sample has made of one, only a run on
        other sizes shows."""
        model, example = self.source.model, self.source.example
        if not self.put or model is self.pruned:
            return
        pairs = list(zip(shapes_taken(model, example), shapes_taken(self.pruned, example), strict=True))
        wrong = [i for i, (wanted, found) in enumerate(pairs) if wanted is not None and wanted != found]
        for path in self.put if wrong else ():
            module = self.pruned.get_submodule(path)
            forward = forward_of(module)
            if forward is not None and forward.sizes != "example":
                put_forward(module, replace(forward, sizes="example" if 0 in wrong else "batch"))


def repeatable(source: TracedModel) -> set[Way]:
    """The training ways whose outputs are those of their graphs: their random numbers are drawn in the same order."""
    graphs = [graph for graph in source.others if graph.way.training]
    dtype = next((p.dtype for p in source.model.parameters()), torch.float32)
    off = {graph.way: compare_outputs(source.model, SubNetwork(graph, {}), *graph.example) for graph in graphs}
    return {way for way, error in off.items() if error <= TOLERANCE.get(dtype, 0.05)}


def _first_of_each(found: list[Mismatch]) -> list[Mismatch]:
    first: dict[str, Mismatch] = {}
    for difference in found:
        first.setdefault(difference.module, difference)
    return list(first.values())


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _forbidden(path: str, module: nn.Module, text: str) -> str:
    return (
        f"{path or 'the model'} ({type(module).__name__}) cannot express the cut, and graphs='forbid' lets nothing "
        f"stand in place of its forward: {text}; keep its widths (ignore=), name it as leaf=, or let it read the width "
        "from an attribute or with -1 instead of computing it from another tensor"
    )
