"""The searches that are measured for speed: networks, images, and states along a search, kept in files."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from parts.search_ways import in_the_way
from torch import Tensor

import ekgfx
from ekgfx import data as datasets
from ekgfx.base.files import replacing
from ekgfx.graph.plan import Plan
from ekgfx.models import source
from ekgfx.models.weights import load_weights
from ekgfx.pipeline import job
from ekgfx.search import ekg
from ekgfx.search.problem import Budget, Problem, width_rules
from ekgfx.search.reward import Objective, assess, label_free, validation_batches
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.step_zero import prepare

KEEP = 0.45
NETWORKS = {
    "resnet56": "ekgfx.models:resnet56_cifar",
    "resnet50": "timm:resnet50",
    "vit_tiny": "timm:vit_tiny_patch16_224",
    "resnet50_keras": f"{Path(__file__).resolve().parents[2] / 'examples' / 'resnet50_keras.py'}:resnet50",
}
"""The networks by the names that they go by here."""
UNTRAINED = ("resnet50", "vit_tiny")
"""Those with random weights, on photographs without labels."""
PHOTOS = 16
"""Images of 224×224 in a batch."""
Batches = Sequence[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Case:
    """A network with its validation images, in a file of `folder`.

    val_batch_size, hardest_first: of resnet56's images; the defaults are those of `ekgfx prune`, the paper's.
    """

    name: str
    folder: Path
    device: torch.device
    val_batch_size: int = 256
    hardest_first: bool = False

    @classmethod
    def of(cls, asked: Namespace) -> Self:
        """What a command line asks for; its folder is there afterwards."""
        folder = Path(asked.output)
        folder.mkdir(parents=True, exist_ok=True)
        return cls(asked.network, folder, torch.device(asked.device), asked.val_batch_size, asked.hardest_first)

    @property
    def file(self) -> Path:
        """Weights and batches."""
        return self.folder / f"{self.name}-{self.device.type}.pt"

    def make(self, data: str, weights: str, images: int) -> None:
        """Writes the file, where there is none: the network with its weights, ResNet-56's after step 0, and images."""
        if self.file.exists():
            return
        torch.manual_seed(0)
        built = source.parse(NETWORKS[self.name], "none").build()
        if self.name not in UNTRAINED:
            load_weights(built.model, Path(weights))
        opened = datasets.load("photos", image_size=224) if self.name in UNTRAINED else job.open_data(data, built, 0)
        if self.name == "resnet56":
            asked: Any = {"val_batch_size": self.val_batch_size, "hardest_first": self.hardest_first}
            batches: Batches = prepare(built.model, opened, **asked).batches
        else:
            mixed = torch.randperm(opened.size("train"), generator=torch.Generator().manual_seed(0))
            chosen = range(images) if self.name in UNTRAINED else mixed[:images]
            pictures = opened.loader("train", PHOTOS, subset=chosen)
            batches = [(batch.images, None if self.name in UNTRAINED else batch.labels) for batch in pictures]
        with replacing(self.file) as partial:
            torch.save({"weights": built.model.state_dict(), "batches": list(batches)}, partial)

    def opened(self) -> tuple[TracedModel, Batches]:
        """The model with its weights, traced, and the batches, on the device."""
        model, held = source.parse(NETWORKS[self.name], "none").build().model, torch.load(self.file)
        model.load_state_dict(held["weights"])
        batches = [
            (x.to(self.device, memory_format=torch.contiguous_format), None if y is None else y.to(self.device))
            for x, y in held["batches"]
        ]
        return ekgfx.trace(model.eval().to(self.device), batches[0][0][:2]), batches

    def states(self, count: int) -> list[str]:
        """Makes and names the states to measure at: the network evenly cut to 100, 75 and 50% of its MACs."""
        names = ["1.00", "0.75", "0.50"][:count]
        if not all(self.state_file(name).exists() for name in names):
            problem = in_the_way("all", problem_of(*self.opened()))
            state = unpruned(problem)
            for name in names:
                plan = evenly_cut(problem, float(name))
                widths = {group: len(problem.kept(plan, group)) / rule.size for group, rule in problem.rules.items()}
                self.keep(name, replace(state, plan=plan, widths=widths))
        return names

    def state_file(self, name: str) -> Path:
        return self.folder / f"{self.name}-{self.device.type}-state-{name}.pt"

    def keep(self, name: str, state: ekg.State) -> None:
        """Writes a state."""
        held = {**vars(state), "plan": state.plan.to_json(), "widths": dict(state.widths)}
        with replacing(self.state_file(name)) as partial:
            torch.save(held, partial)

    def state(self, name: str) -> ekg.State:
        """A state that was written."""
        held = torch.load(self.state_file(name), map_location=self.device)
        return ekg.State(**{**held, "plan": Plan.from_json(held["plan"])})


def unpruned(problem: Problem) -> ekg.State:
    """Where a search starts."""
    _, logits = assess(problem.network(problem.full()), problem.batches, problem.objective, None)
    return ekg.State(problem.full(), dict.fromkeys(problem.rules, 1.0), logits)


def evenly_cut(problem: Problem, keep: float) -> Plan:
    """One width for all groups, at a fraction of the MACs."""
    if keep == 1:
        return problem.full()
    plan = ekgfx.search(problem.traced, flops=keep, strategy="uniform", importance="magnitude").plan
    return replace(plan, rescale=problem.rescale)


def problem_of(traced: TracedModel, batches: Any, keep: float = KEEP) -> Problem:
    """The problem that `ekgfx.search` poses with its defaults."""
    norms = any(operation.target is torch.ops.aten.batch_norm.default for operation in traced.operations)
    problem = Problem(
        traced=traced,
        batches=validation_batches(batches),
        objective=Objective(),
        budget=Budget.of(lambda plan: traced.cost(plan).macs, keep, "MACs"),
        rules=width_rules(traced, frozenset(), 1, 0.0),
        guided=True,
        ensemble=True,
        rescale=norms,
    )
    if problem.batches[0].target is None:
        soft = label_free(problem.network(problem.full()), problem.batches, problem.objective)
        problem = replace(problem, batches=soft)
    return problem
