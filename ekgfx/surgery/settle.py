"""Make a cut module what was predicted, changing as little of it as possible.

Standard layers follow from their weights. Beyond them nothing is changed at first: the cut module is run and traced
again, and the operators that differ from the prediction say which modules' Python does not give it. Only the integers
of those modules are changed, and put back where that makes no difference. A module that no choice of integers makes
right gets a forward that is written for it.
"""

import difflib
import itertools
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ekgfx.axes import Axis, count
from ekgfx.errors import EkgfxError, PruneError
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.axis_graph import AxisGraph, Example, Operation
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.graph.plan import Plan
from ekgfx.graph.untouched import State, deep_copy
from ekgfx.graph.ways import Way, seeded, undisturbed
from ekgfx.rewriting.calls import Call, Calls, Values, calls_of, hollow, whole
from ekgfx.rewriting.forward import Recorded, rewrite
from ekgfx.rewriting.patched import forward_of, put_forward
from ekgfx.surgery.check import Difference, compare_outputs, differences, operator_name, trains
from ekgfx.surgery.integers import STANDARD, Attributes, Choice, choices_of, own_configurations
from ekgfx.tracing.trace import TracedModel, retrace

MOST_TRIALS = 16
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


@dataclass(frozen=True)
class Problem:
    """What is wrong with a cut module: the module whose Python does it (None if that is not known), and what."""

    module: str | None
    text: str


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
        self.recorded: Recorded | None = None
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

    def _error(self, problem: Problem) -> PruneError:
        return PruneError(f"the pruned {type(self.pruned).__name__} is not what was predicted: {problem.text}")

    # -- what is wrong ----------------------------------------------------------------------------------------------

    def problems(self) -> list[Problem]:
        """Run the cut module, trace it again and compare it with the prediction; empty if all agrees."""
        trained = [replace(self.source.way, training=True)] if self.trains else []
        examples = dict.fromkeys(trained, self.source.example) | {g.way: g.example for g in self.source.graphs}
        for way, example in examples.items():
            failed = _failing(self.pruned, way, example)
            if failed is not None:
                return [failed]
        try:
            again = retrace(self.pruned, self.source, self.predicted.state)
        except EkgfxError as error:
            return [Problem(None, str(error))]
        found = differences(self.source, self.predicted.counts, again)
        if found:
            return [Problem(_blamed(self.pruned, d.module), str(d)) for d in _first_of_each(found)]
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
        for trial in itertools.islice(_assignments(self.pruned, choices, apart), MOST_TRIALS):
            _take(self.pruned, trial)
            left = self.problems()
            if not any(p.module is None or p.module in blamed for p in left):
                self.changed += [choice for choice in choices if choice not in self.changed]
                return left
        _take(self.pruned, before)
        return None

    def _put_back(self) -> None:
        """Every integer gets back its old value where the model computes the same with it."""
        if not self.changed:
            return
        wanted = self._behaviour()
        kinds: dict[tuple, list[Choice]] = {}
        for choice in self.changed:
            kinds.setdefault(_kind(self.pruned, choice), []).append(choice)
        for members in kinds.values():
            now = {choice: choice.now(self.pruned) for choice in members}
            _take(self.pruned, {choice: choice.old for choice in members})
            if not _same(self._behaviour(), wanted):
                _take(self.pruned, now)

    def _behaviour(self) -> list[Any]:
        """What the cut model computes on the example, on other sizes, and in training mode; an error where it fails."""
        args, kwargs = self.source.example
        found = []
        with evaluation_mode(self.pruned):
            for inputs in _others((args, kwargs)):
                found.append(_outcome(self.pruned, *inputs))
        with Way(training=True).entered(self.pruned):
            found.append(_outcome(self.pruned, args, kwargs))
        return found

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
                raise self._error(problem)
            path = path.rpartition(".")[0]

    def _put(self, path: str, reason: str) -> None:
        if self.recorded is None:
            self.recorded = record(self.predicted)
            self.widths = _Widths(self.source, self.predicted.counts, self.recorded)
        forward = rewrite(path, self.recorded, self.widths, self.inline, reason)
        put_forward(self.pruned.get_submodule(path), forward)
        self.put.add(path)
        module = self.pruned.get_submodule(path)
        if isinstance(module, nn.MultiheadAttention):
            module._qkv_same_embed_dim = False  # or a TransformerEncoderLayer computes in its place what it would


def record(predicted: Prediction) -> Recorded:
    """The calls of the uncut model, in evaluation and (with floats of another type, so that one sees which types follow
    the model's) in training."""
    source = predicted.source
    model = predicted.twin or hollow(source.model)
    floats = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with evaluation_mode(model):
        evaluation = calls_of(model, source.example, source.leaves)
    other = torch.float32 if floats in (torch.bfloat16, torch.float16) else torch.bfloat16
    training = None
    for dtype in (other, floats):
        twin = hollow(model, dtype)
        twin.train()
        example = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype == floats else t, source.example)  # noqa: B023
        try:
            training = calls_of(twin, example, source.leaves)
            break
        except (EkgfxError, RuntimeError):
            continue
    return Recorded(model, evaluation, training, floats, dtype)


class _Widths:
    """What the cut makes of the sizes in recorded calls: their operators are found in the trace, which knows."""

    def __init__(self, source: TracedModel, counts: Mapping[Axis, int], recorded: Recorded) -> None:
        self.counts = counts
        self.operations: dict[fx.Node, Operation] = {}
        self.dims: dict[fx.Node, Any] = {}
        training = (graph for graph in source.graphs if graph.way == replace(source.way, training=True))
        pairs = ((recorded.evaluation, source), (recorded.training, next(training, source)))
        for calls, graph in pairs:
            if calls is not None:
                self.operations |= _aligned(graph, calls)
                self._follow(calls.root, graph)

    def _follow(self, call: Call, source: AxisGraph) -> None:
        """Every value in a call, and what it is passed on as, with its dimensions."""
        self._pass(call.passed, call.given)
        for step in call.steps:
            if isinstance(step, Call):
                self._follow(step, source)
            elif step in self.operations:
                self.dims[step] = source.dims.get(self.operations[step].name)
            elif whole(step):
                self.dims[step] = self.dims.get(cast(fx.Node, step.args[0]))
            elif step.target is operator.getitem and isinstance(self.dims.get(cast(fx.Node, step.args[0])), list):
                self.dims[step] = self.dims[cast(fx.Node, step.args[0])][step.args[1]]
        self._pass(call.returned, call.results)

    def _pass(self, before: Values | None, after: Values | None) -> None:
        if before is not None and after is not None:
            for old, new in zip(before.flat, after.flat, strict=True):
                if isinstance(new, fx.Node) and isinstance(old, fx.Node) and old in self.dims:
                    self.dims[new] = self.dims[old]

    def knows(self, call: Call) -> bool:
        return any(node in self.operations for _, node in call.operators())

    def argument(self, node: fx.Node, name: str, position: int | None, old: int) -> int:
        operation = self.operations.get(node)
        sizes = operation.effect.sizes if operation is not None else {}
        expr = sizes.get(name, sizes.get({"shape": "size", "size": "shape"}.get(name, name)))  # of reshape, and of view
        if isinstance(expr, Sequence):
            expr = expr[position] if position is not None and position < len(expr) else None
        return old if expr is None or count(expr, {}) != old else count(expr, self.counts)

    def length(self, node: fx.Node, dim: int, old: int) -> int:
        dims = self.dims.get(node)
        return count(dims[dim], self.counts) if isinstance(dims, tuple) and dims[dim].size == old else old


def _aligned(source: AxisGraph, calls: Calls) -> dict[fx.Node, Operation]:
    """Recorded operator → the operation of the trace that it is."""

    def sign(module: str, target: Any) -> tuple[str, str]:
        return module, operator_name(target)

    nodes = [(path, node) for path, node in calls.root.operators() if isinstance(node.target, torch._ops.OpOverload)]
    mine = [sign(operation.module, operation.target) for operation in source.operations]
    theirs = [sign(path, node.target) for path, node in nodes]
    blocks: list[Any] = [(0, 0, len(mine))]
    if mine != theirs:
        blocks = difflib.SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks()
    return {nodes[j + k][1]: source.operations[i + k] for i, j, size in blocks for k in range(size)}


def training_error(model: nn.Module, source: TracedModel) -> str | None:
    """What a step of training raises, if it does."""
    try:
        trains(model, source.way, *source.example)
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # noqa: BLE001  whatever the user's forward raises
        return f"{type(error).__name__}: {error}"
    return None


def repeatable(source: TracedModel) -> set[Way]:
    """The training ways whose outputs are those of their graphs: their random numbers are drawn in the same order."""
    graphs = [graph for graph in source.others if graph.way.training]
    dtype = next((p.dtype for p in source.model.parameters()), torch.float32)
    off = {graph.way: compare_outputs(source.model, SubNetwork(graph, {}), *graph.example) for graph in graphs}
    return {way for way, error in off.items() if error <= TOLERANCE.get(dtype, 0.05)}


def _failing(model: nn.Module, way: Way, example: Example) -> Problem | None:
    """The innermost module whose own forward raises when the model is run in a way, None if none does."""
    args, kwargs = example
    running: list[str] = []

    def ends(*_: Any) -> None:
        running.pop()

    with torch.no_grad(), way.entered(model), undisturbed(model):  # which also puts back what hooks collect
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda _, __, n=name: running.append(n))
            module.register_forward_hook(ends)
        try:
            model(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever the user's forward raises; its place is what is wanted
            text = " ".join(str(error).split())
            place = running[-1] if running else ""
            return Problem(_blamed(model, place), f"{place or 'its forward'} raises {type(error).__name__}: {text}")
    return None


def _blamed(model: nn.Module, path: str) -> str:
    """A standard layer does what its weights say: where it fails, the module that calls it gave it the wrong thing."""
    while path and isinstance(model.get_submodule(path), STANDARD):
        path = path.rpartition(".")[0]
    while path and type(model.get_submodule(path)).forward in (nn.Sequential.forward, nn.Module.forward):
        path = path.rpartition(".")[0]
    return path


def _first_of_each(found: list[Difference]) -> list[Difference]:
    first: dict[str, Difference] = {}
    for difference in found:
        first.setdefault(difference.module, difference)
    return list(first.values())


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _take(pruned: nn.Module, trial: Mapping[Choice, Any]) -> None:
    for choice, value in trial.items():
        choice.take(pruned, value)


def _kind(pruned: nn.Module, choice: Choice) -> tuple:
    return type(pruned.get_submodule(choice.module)), choice.place


def _assignments(pruned: nn.Module, choices: list[Choice], apart: bool = False) -> Iterator[dict[Choice, int]]:
    """Every way to settle the choices, those closest to 'all likely ones changed' first; modules of one class share
    theirs."""
    kinds: dict[tuple, list[Choice]] = {}
    for choice in choices:
        kinds.setdefault((choice.module, choice.place) if apart else _kind(pruned, choice), []).append(choice)
    ranks = [range(max(len(c.options) for c in members)) for members in kinds.values()]
    for ways in sorted(itertools.product(*ranks), key=sum) if len(ranks) < 8 else [(0,) * len(ranks)]:
        yield {
            c: c.options[min(way, len(c.options) - 1)]
            for way, members in zip(ways, kinds.values(), strict=True)
            for c in members
        }


def _others(example: tuple[tuple, dict[str, Any]]) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """The example, and others whose batch is larger, and whose other sizes are."""
    yield example

    def stretched(dims: slice) -> Any:
        def stretch(tensor: Tensor) -> Tensor:
            for d in range(tensor.ndim)[dims]:
                tensor = torch.cat([tensor, tensor], d)
            return tensor

        return pytree.tree_map_only(Tensor, stretch, example)

    yield stretched(slice(0, 1))
    yield stretched(slice(1, 2))
    yield stretched(slice(2, None))


def _outcome(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    with torch.no_grad(), seeded(model), undisturbed(model):
        try:
            return [t.clone() for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
        except Exception as error:  # noqa: BLE001  the model's own
            return type(error).__name__


def _same(found: list[Any], wanted: list[Any]) -> bool:
    """Whether a model behaves as well: where it failed before, it may do anything."""
    return all(
        isinstance(b, str) or (isinstance(a, list) and len(a) == len(b) and all(map(_equal, a, b)))
        for a, b in zip(found, wanted, strict=True)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _forbidden(path: str, module: nn.Module, text: str) -> str:
    return (
        f"{path or 'the model'} ({type(module).__name__}) cannot express the cut, and graphs='forbid' lets nothing "
        f"stand in place of its forward: {text}; keep its widths (ignore=), name it as leaf=, or let it read the width "
        "from an attribute or with -1 instead of computing it from another tensor"
    )
