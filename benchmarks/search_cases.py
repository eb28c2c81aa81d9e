"""The searches that `search_speed.py` measures: networks, images, and states along a search, kept in files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from search_ways import clock, in_the_way
from torch import Tensor, nn

import ekgfx
from ekgfx import data as datasets
from ekgfx.files import append_line, read_lines, replacing
from ekgfx.models import resnet56_cifar
from ekgfx.plan import Plan
from ekgfx.prepare import prepare
from ekgfx.search import Step, ekg
from ekgfx.search.problem import Budget, Problem, width_rules
from ekgfx.search.result import as_steps
from ekgfx.search.reward import Objective, evaluate, label_free, validation_batches
from ekgfx.trace import TracedModel
from ekgfx.weights import load_weights

KEEP = 0.45
IMAGES = {"resnet50": "resnet50", "vit_tiny": "vit_tiny_patch16_224"}
"""timm's names of the networks that are measured on photographs, with random weights and without labels."""
PHOTOS = 16
"""Photographs in a batch."""
PLAIN = {"early_stop": False, "cache": 0, "channels_last": False}
"""Every candidate evaluated to its end, nothing kept, in PyTorch's own memory format."""
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

    @property
    def file(self) -> Path:
        """Weights and batches."""
        return self.folder / f"{self.name}-{self.device.type}.pt"

    def make(self, data: str, weights: str, images: int) -> None:
        """Writes the file, where there is none: CIFAR's ResNet-56 after step 0, or timm's network and photographs."""
        if self.file.exists():
            return
        torch.manual_seed(0)
        model = self.network()
        if self.name == "resnet56":
            load_weights(model, Path(weights))
            normal = model.pretrained_cfg
            images_of = datasets.load(data, mean=normal["mean"], std=normal["std"])
            asked: Any = {"val_batch_size": self.val_batch_size, "hardest_first": self.hardest_first}
            batches: Batches = prepare(model, images_of, **asked).batches
        else:
            pictures = datasets.load("photos", image_size=224).loader("train", PHOTOS, subset=range(images))
            batches = [(batch.images, None) for batch in pictures]
        with replacing(self.file) as partial:
            torch.save({"weights": model.state_dict(), "batches": list(batches)}, partial)

    def network(self) -> nn.Module:
        """The model, with whatever weights."""
        if self.name == "resnet56":
            return resnet56_cifar()
        import timm

        return timm.create_model(IMAGES[self.name])

    def opened(self) -> tuple[TracedModel, Batches]:
        """The model with its weights, traced, and the batches, on the device."""
        model, held = self.network(), torch.load(self.file)
        model.load_state_dict(held["weights"])
        batches = [
            (x.to(self.device, memory_format=torch.contiguous_format), None if y is None else y.to(self.device))
            for x, y in held["batches"]
        ]
        return ekgfx.trace(model.eval().to(self.device), batches[0][0][:2]), batches

    # -- states along the search -----------------------------------------------------------------------------------

    def history(self, plain: bool = False) -> Path:
        """The steps of the whole search."""
        return self.folder / f"{self.name}-{self.device.type}-search{'-plain' if plain else ''}.jsonl"

    def search(self, plain: bool = False) -> None:
        """The whole search with its defaults, or evaluating plainly, resumed from its history; the seconds of each step
        are noted beside."""
        steps = as_steps(read_lines(self.history(plain)))
        if steps and steps[-1].kept_fraction <= KEEP:
            return
        traced, batches = self.opened()
        last = [clock(traced)]

        def note(step: Step) -> None:
            now = clock(traced)
            append_line(self.history(plain), {**step.to_json(), "seconds": now - last[0]})
            last[0] = now
            print(f"step {step.number}: {step.kept_fraction:.3f}", flush=True)

        options: Any = PLAIN if plain else {}
        ekgfx.search(traced, batches, flops=KEEP, on_step=note, resume_from=steps, **options)

    def states(self, count: int) -> list[str]:
        """Makes and names the states to measure at: those before `count` steps of the search, or, where it was not run,
        the network evenly cut to 100, 75 and 50% of its MACs."""
        steps = as_steps(read_lines(self.history()))
        if steps:
            places = np.linspace(0, len(steps) - 1, count).round().astype(int)
            names = [f"{place}" for place in places]
        else:
            names = ["1.00", "0.75", "0.50"][:count]
        if all(self.state_file(name).exists() for name in names):
            return names
        traced, batches = self.opened()
        problem = in_the_way("all", problem_of(traced, batches))
        _, unpruned = evaluate(problem.network(problem.full()), problem.batches, problem.objective, None)
        state = ekg.State(problem.full(), dict.fromkeys(problem.rules, 1.0), unpruned)
        if not steps:
            for name in names:
                plan = evenly_cut(problem, float(name))
                widths = {group: len(problem.kept(plan, group)) / rule.size for group, rule in problem.rules.items()}
                self.keep(name, replace(state, plan=plan, widths=widths))
            return names
        for number, step in enumerate(steps):
            if f"{number}" in names:
                self.keep(f"{number}", state)
            state = ekg.replay(problem, state, step)
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


def evenly_cut(problem: Problem, keep: float) -> Plan:
    """One width for all groups, at a fraction of the MACs."""
    if keep == 1:
        return problem.full()
    plan = ekgfx.search(problem.traced, flops=keep, strategy="uniform", importance="magnitude").plan
    return replace(plan, rescale=problem.rescale)


def problem_of(traced: TracedModel, batches: Any) -> Problem:
    """The problem that `ekgfx.search` poses with its defaults."""
    norms = any(operation.target is torch.ops.aten.batch_norm.default for operation in traced.operations)
    problem = Problem(
        traced=traced,
        batches=validation_batches(batches),
        objective=Objective(),
        budget=Budget.of(lambda plan: traced.cost(plan).macs, KEEP, "MACs"),
        rules=width_rules(traced, frozenset(), 1, 0.0),
        guided=True,
        ensemble=True,
        rescale=norms,
    )
    if problem.batches[0].target is None:
        soft = label_free(problem.network(problem.full()), problem.batches, problem.objective)
        problem = replace(problem, batches=soft)
    return problem
