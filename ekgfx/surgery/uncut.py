"""What the uncut model reads, and how its run goes: what tells, sooner than a trace, whether integers are right."""

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ekgfx.axes import Axis
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.rewriting.calls import hollow
from ekgfx.surgery.assignments import kind_of, take
from ekgfx.surgery.comparison import Prediction
from ekgfx.surgery.faults import blamed, failing
from ekgfx.surgery.integers import Choice, own_configurations
from ekgfx.surgery.outline import Recorder, Step, otherwise, outline_of, outlined, transcript


class Uncut:
    """The model before the cut. choices: the integers that are asked about."""

    def __init__(self, pruned: nn.Module, predicted: Prediction, choices: Collection[Choice]) -> None:
        self.pruned, self.predicted, self.source = pruned, predicted, predicted.source
        self.choices = choices
        self.read: dict[tuple, bool] = {}

    def reads(self, choice: Choice) -> bool:
        """Whether the uncut model runs otherwise where an integer has another value, in all modules of that kind."""
        kind = (*kind_of(self.pruned, choice), choice.old)
        if kind not in self.read:
            alike = [c for c in self.choices if (*kind_of(self.pruned, c), c.old) == kind]
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
        for choice in self.choices:
            choice.take(twin, choice.old)
        return twin

    @cached_property
    def _transcripts(self) -> list[Any]:
        return [transcript(self._twin, graph.way, graph.example) for graph in self.source.graphs]

    @cached_property
    def wanted(self) -> list[Step] | None:
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

    def wrong_after(self, modules: Collection[str]) -> Collection[str] | None:
        """Where a run shows, sooner than a trace, that something is left to blame on those modules: the modules whose
        forward had begun by then. None where it does not show."""
        if self.wanted is None:
            return None
        watched: list[Recorder] = []

        def watch(running: list[str]) -> Recorder:
            watched.append(Recorder(running))
            return watched[0]

        problem = failing(self.pruned, self.source.way, self.source.example, watch)
        if problem is not None:
            wrong = problem.module in modules or problem.hides(modules, None)
            return problem.begun if wrong else None
        steps = watched[0].steps
        for module, number in otherwise(steps, self.wanted).items():
            if blamed(self.pruned, module) in modules:
                return {outer for step in steps[: number + 1] for outer in _outward(step.module)}
        return None


def _outward(path: str) -> list[str]:
    """A module and all that it is in."""
    names = path.split(".")
    return ["", *(".".join(names[: i + 1]) for i in range(len(names)))]
