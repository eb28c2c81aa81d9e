"""What the stages of a job share: the run, its settings, the model, the data, and somebody to report to."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ekgfx import bank, data
from ekgfx.base.units import human, percent, several
from ekgfx.distributed.team import local_device, team
from ekgfx.errors import DataError, RecipeError, TrainingError
from ekgfx.graph.plan import Plan
from ekgfx.graph.untouched import untouched
from ekgfx.models import source, trust
from ekgfx.models.source import Built
from ekgfx.repair.walk import LayerRepair
from ekgfx.runs import checkpoint
from ekgfx.runs.directory import Run, verify
from ekgfx.runs.scores import Score
from ekgfx.search import NEEDS_DATA, Step
from ekgfx.search.effort import fitting_batch
from ekgfx.settings.recipe import Recipe
from ekgfx.tracing.trace import silently_traced
from ekgfx.tracing.trace_errors import explained
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.evaluation import evaluate
from ekgfx.training.keeping import Epoch
from ekgfx.training.outputs import finder, logits_of
from ekgfx.training.trainer import Progress

DENSE = "dense.safetensors"
"""The unpruned model's weights as the search works on them."""
LABEL_FREE = "photos"
WORTH_A_THREAD = 10_000_000
"""MACs per sample below which threads cost more than they bring: on busy cores they wait for each other."""


class Report(Protocol):
    """What a job tells whoever is watching."""

    def stage(self, title: str) -> None:
        """Another stage begins."""

    def note(self, text: str) -> None:
        """Something to know, in one line."""

    def step(self, step: Step, keep: float) -> None:
        """The search took a step; `keep` is its budget."""

    def bank(self, progress: bank.Progress, samples: int) -> None:
        """The memory bank grew; `samples` is what each teacher is asked."""

    def layer(self, layer: LayerRepair, number: int, layers: int) -> None:
        """An operator was refitted, the `number`-th of `layers`."""

    def batch(self, progress: Progress) -> None:
        """A batch of an epoch of training is done."""

    def epoch(self, epoch: Epoch, epochs: int) -> None:
        """An epoch of training is done."""


class Silent:
    """Tells nobody."""

    def stage(self, title: str) -> None: ...

    def note(self, text: str) -> None: ...

    def step(self, step: Step, keep: float) -> None: ...

    def bank(self, progress: bank.Progress, samples: int) -> None: ...

    def layer(self, layer: LayerRepair, number: int, layers: int) -> None: ...

    def batch(self, progress: Progress) -> None: ...

    def epoch(self, epoch: Epoch, epochs: int) -> None: ...


class Labelled:
    """Tells another report of stages with a label in front."""

    def __init__(self, report: Report, label: str) -> None:
        self._report, self._label = report, label

    def stage(self, title: str) -> None:
        """Another stage begins."""
        self._report.stage(f"{self._label}: {title}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._report, name)


@dataclass(eq=False)
class Job:
    """A run, and what its stages share: the recipe, the device, the unpruned model, the data (opened at first use)."""

    run: Run
    recipe: Recipe
    report: Report
    device: torch.device

    @classmethod
    def of(cls, run: Run, report: Report) -> "Job":
        """The job that a run's settings describe."""
        recipe = Recipe.from_json(run.manifest.get("settings"), f"{run.path}/run.json")
        if recipe.model is not None and not Path(recipe.model).is_dir():
            trust.check(recipe.model, run.manifest, run.path)
        return cls(run, recipe, report, pick_device(recipe.device))

    def at(self, run: Run, recipe: Recipe, label: str | None = None) -> "Job":
        """The job of another budget, on the same model and data. label: what its stages are told under."""
        report = self.report if label is None else cast(Report, Labelled(self.report, label))
        other = Job(run, recipe, report, self.device)
        other.__dict__ |= {name: getattr(self, name) for name in ("built", "traced", "batch_size", "data")}
        return other

    @property
    def dense(self) -> Path | None:
        """The file of the unpruned model's weights as the search works on them, once there is one: the run's, or that
        of the run of several budgets that this one is part of."""
        if self.run.has(DENSE):
            return self.run.path / DENSE
        whole = self.run.path.parent.parent
        if self.run.manifest.get("part_of_several") and (whole / DENSE).exists():
            return verify(whole, DENSE)
        return None

    @cached_property
    def built(self) -> Built:
        """The unpruned model on the device, with the weights that the search works on once they are known."""
        self.report.stage("build the model")
        asked = source.of_recipe(self.recipe)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)  # for random weights: the same when the run goes on
            if self.dense is not None:
                built = checkpoint.build(asked.without_weights())
                checkpoint.load_tensors(built.model, self.dense)
            else:
                built = checkpoint.build(asked)
                origin = checkpoint.origin(asked, built.example_inputs)
                self.run.update(**origin, weights=built.weights_origin, device=str(self.device))
        inputs = tuple(value.to(self.device) for value in built.example_inputs)
        return replace(built, model=built.model.to(self.device), example_inputs=inputs)

    @cached_property
    def traced(self) -> TracedModel:
        """The unpruned model's graph; it reads the model's weights whenever a sub-network is made."""
        model = self.built.model
        self.report.stage("trace")
        leaf, outputs = (*self.built.leaf, *self.recipe.leaf), (*self.built.outputs, *self.recipe.outputs) or None
        unused = self.recipe.unused
        traced = silently_traced(model, self.built.example_inputs, leaf=leaf, unused=unused, outputs=outputs)
        for note in traced.notes:
            self.report.note(note)
        self.run.update(notes=list(traced.notes))
        if traced.cost().macs < WORTH_A_THREAD:
            torch.set_num_threads(1)
        return traced

    @cached_property
    def batch_size(self) -> int:
        """Samples per batch wherever nothing is trained but step 0: the recipe's, or as many as fit into memory."""
        return self.recipe.search.batch_size or fitting_batch(self.traced)

    @cached_property
    def data(self) -> data.Data | None:
        """The data set; None where the model's input is no image and the search needs none."""
        if self.recipe.data is None and not self.needs_data:
            return None
        opened = open_data(self.recipe.data or LABEL_FREE, self.built, self.recipe.seed, self.logits).to(self.device)
        self.report.note(preprocessing_of(opened, self.built))
        recognize(opened, self.run, self.report)
        return opened

    @property
    def needs_data(self) -> bool:
        """Whether the settings ask for anything that looks at data."""
        asked = self.recipe.search
        return asked.strategy == "ekg" or asked.importance in NEEDS_DATA or self.recipe.finetune.epochs > 0

    @property
    def logits(self) -> Callable[[Any], Tensor]:
        """What finds the logits in the model's output."""
        return logits_of if self.recipe.logits is None else finder(self.recipe.logits)

    @property
    def labelled(self) -> bool:
        return self.data is not None and self.data.classes is not None

    @property
    def random(self) -> bool:
        """Whether the model is untrained: what it says means nothing then."""
        return str(self.run.manifest.get("weights", "")).startswith("random") and not self.recipe.pretrain.epochs

    def score(self, model: nn.Module, plan: Plan | None) -> Score:
        """A model on the test split; `plan` is what it was pruned by (None: not at all)."""
        cost = self.traced.cost(plan)
        if self.data is None:
            return Score(None, None, None, cost.macs, cost.params)
        batches = self.data.loader("test", self.batch_size).mixed()
        if self.labelled:
            metrics = evaluate(model, batches, logits=self.logits)
            if not math.isfinite(metrics.loss):
                raise TrainingError(
                    f"the loss on {self.data.spec} is {metrics.loss}: check the weights ({self.built.weights_origin}), "
                    "and that the images are normalized as the model expects"
                )
            return Score(metrics.accuracy, metrics.loss, None, cost.macs, cost.params)
        if self.random:
            return Score(None, None, None, cost.macs, cost.params)
        agreement = (
            1.0
            if plan is None
            else evaluate(model, predicted(self.built.model, batches, self.logits), logits=self.logits).accuracy
        )
        return Score(None, None, agreement, cost.macs, cost.params)

    def keep_score(self, name: str, model: nn.Module, plan: Plan | None) -> None:
        """Evaluates and records under run.json's `results`, where that was not done before."""
        results = self.run.manifest.get("results", {})
        if name not in results:
            self.report.stage(f"evaluate ({name})")
            score = self.score(model, plan)
            self.run.update(results={**results, name: asdict(score)})
            said = {"accuracy": score.accuracy, "agreement": score.agreement}
            facts = [f"{what} {percent(value)}" for what, value in said.items() if value is not None]
            self.report.note(", ".join([*facts, f"{human(score.macs)} MACs", f"{human(score.params)} parameters"]))


def open_data(spec: str, built: Built, seed: int, find: Callable[[Any], Tensor] = logits_of) -> data.Data:
    """A data set in the form the model takes; DataError when the model takes no images or has other classes,
    TraceError when it does not run on its example input."""
    if built.example_inputs[0].ndim != 4 or len(built.example_inputs) != 1:
        shapes = ", ".join("x".join(map(str, value.shape)) for value in built.example_inputs)
        raise DataError(
            f"the model takes {shapes}, not images (N×C×H×W): no set of images can feed it. Prune it with "
            "--search uniform --importance magnitude, or in Python"
        )
    try:
        with untouched(built.model), torch.no_grad():
            output = built.model(built.example_inputs[0])
    except Exception as error:  # the user's forward may raise anything
        raise explained(built.model, error, built.example_inputs, {}) from error
    found = find(output)
    classes = found.shape[1] if found.ndim == 2 else None
    channels = built.example_inputs[0].shape[1]
    return data.load(spec, classes=classes, seed=seed, **{**built.data_options, "channels": channels})


def recognize(opened: data.Data, run: Run, report: Report) -> None:
    """Records which images a run works on, and says so where they are no longer those of before."""
    now = {split: f"{opened.size(split)}, {opened.digest(split)}" for split in data.SPLITS} | {"spec": opened.spec}
    then = run.manifest.get("data", {})
    if then == now or not team().first:
        return
    if then.get("spec") == opened.spec:
        before, after = (
            " and ".join(those.get(split, "?").partition(",")[0] for split in data.SPLITS) for those in (then, now)
        )
        report.note(
            f"the images of {opened.spec} have changed since this run began: then {before} to train and to test on, "
            f"now {after}; what was measured then is of those"
        )
    run.update(data=now)


def preprocessing_of(opened: data.Data, built: Built) -> str:
    """How images become the model's input, and who says so, in one line."""
    origins = built.origins

    def whose(key: str) -> str:
        return origins.get(key, "the data's own")

    channels, height, width = opened.input_shape
    mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (opened.mean, opened.std))
    crop = f" ({origins['crop_pct']})" if "crop_pct" in origins and "middle" in opened.resized else ""
    return (
        f"images: {height}×{width} ({whose('image_size')}), {opened.resized}{crop}; {several(channels, 'channel')}; "
        f"mean {mean} ({whose('mean')}), std {std} ({whose('std')})"
    )


def predicted(
    model: nn.Module, batches: Iterable[Any], find: Callable[[Any], Tensor] = logits_of
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches whose labels are the model's own top classes."""
    for batch in batches:
        with torch.no_grad():
            yield batch.images, find(model(batch.images)).argmax(1)


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; RecipeError for a device that this machine does not have."""
    if name == "auto":
        name = local_device() if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); use auto, cpu or cuda:N"
        ) from error
