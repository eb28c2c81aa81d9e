"""Recipes: complete, runnable settings, as YAML files or as the sum of command-line flags.

The dataclasses here are the one list of settings: their fields are the keys a recipe may hold, their annotations the
types that are accepted, their defaults what happens when nothing is said. A run keeps its settings in run.json in the
same form, so that `--resume` needs nothing else.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from ekgfx.base.ranges import at_least, refuse
from ekgfx.base.schema import did_you_mean, read
from ekgfx.base.units import bytes_of, fraction_of
from ekgfx.errors import RecipeError
from ekgfx.settings.budgets import BUDGETS, Amounts, Point, points_of, several, which
from ekgfx.settings.preprocessing import Preprocessing


@dataclass(frozen=True)
class Training:
    """How a network is trained; `ekgfx.training.optimization.Training` says what the fields mean.

    Raises RecipeError for a number out of its range.
    """

    epochs: int = 0
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: str = "sgd"
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    warmup: int = 0
    augment: bool = True
    views: int | None = None
    amp: Literal["bf16", "fp16"] | None = None
    channels_last: bool | None = None
    workers: int = 0
    val_fraction: float = 0.1
    patience: int | None = None
    ema: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, 0, "epochs", "weight_decay", "warmup", "workers", "mixup", "cutmix")
        at_least(self, 1, "batch_size", "views", "patience")
        refuse(self, "lr", 0 < self.lr < math.inf, "a learning rate above 0")
        refuse(self, "momentum", 0 <= self.momentum < 1, "between 0 and below 1")
        refuse(self, "val_fraction", 0 <= self.val_fraction <= 0.5, "between 0 (train on everything) and 0.5")
        refuse(self, "ema", self.ema is None or 0 < self.ema < 1, "a decay between 0 and 1, such as 0.999")


@dataclass(frozen=True)
class Finetune(Training):
    """Training of the pruned network. `teachers`: size of the memory bank; `knowledge`: who they are ("none": no bank);
    `top_k`: logits that the bank keeps of each image (all by default); `temperature`: T of the guidance. `budgets`: of
    a search to several, those whose networks are trained (None: the tightest's)."""

    knowledge: Literal["ensemble", "single", "none"] = "ensemble"
    teachers: int = 5
    top_k: int | None = None
    temperature: float | None = None
    budgets: Amounts = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "teachers")
        at_least(self, 1, "top_k")
        warm = self.temperature is None or 0 < self.temperature < math.inf
        refuse(self, "temperature", warm, "a temperature above 0")


@dataclass(frozen=True)
class Repair:
    """The refit of the cut network on the data's images, whose labels it does not look at; `ekgfx.repair` says what the
    numbers mean. `enabled`: wherever there are images and trained weights."""

    enabled: bool = True
    images: int = 256
    positions: int = 40_000

    def __post_init__(self) -> None:
        at_least(self, 1, "images", "positions")


@dataclass(frozen=True)
class SearchSettings:
    """How a plan is searched for; `ekgfx.search.SearchSettings` says what the fields mean."""

    flops: Amounts = None
    params: Amounts = None
    latency: Amounts = None
    knowledge: Literal["ensemble", "single", "none"] = "ensemble"
    step: float = 0.2
    min_width: float = 0.0
    uniform_layers: bool = False
    depth: bool = False
    rescale: bool | None = None
    early_stop: bool | None = None
    amp: Literal["bf16", "fp16"] | None = None
    channels_last: bool | None = None

    def __post_init__(self) -> None:
        refuse(self, "step", 0 < self.step <= 1, "a part of the widths, above 0 and up to 1")
        refuse(self, "min_width", 0 <= self.min_width < 1, "a part of the widths, from 0 and below 1")

    @property
    def points(self) -> tuple[Point, ...]:
        """The budgets that are asked for, by their keys: one for each network, the loosest first (`points_of`)."""
        return points_of({key: asked for key in BUDGETS if (asked := getattr(self, key)) is not None})


@dataclass(frozen=True)
class Search(SearchSettings):
    """The budgets (MACs, parameters, latency: kept fraction, or an amount such as "2.0G", "5M" or "8ms"), all of which
    must hold, and the way to them. One of them may be a list: one search finds a network for each. Latency is that of
    `target`, such as cuda:fp16:batch=64, or of where the file `latency_table` was measured. `align`: a number of
    channels, or "auto" for what the target's hardware computes at once (None: "auto" under a latency budget, else 1).

    Before a guided search the model is trained for an epoch on `train_per_class` images of each class (step 0 of the
    paper; 0 leaves it out). Candidates are judged on `val_per_class` images of each class, or on `images` images where
    the data has no labels, in batches of `val_batch_size` (None: `batch_size`), as drawn, as in the paper, or those
    first that the model finds hardest (`hardest_first`): with that and batches of 64 a search takes less time and
    chooses less well (`docs/performance.md`). `batch_size`: of step 0 and of everything that is only evaluated (None:
    256, or fewer where the activations of 256 would take over 8 GiB).
    `depth`: whole residual blocks may be dropped as well.
    `uniform_layers`: widths that the model's own configuration can say; without one, one width for repeated layers.
    `accept`: candidates that a step takes together; None takes one, as the paper does, but on data without
    labels as many as keep the search of a large network within minutes.
    """

    target: str | None = None
    latency_table: str | None = None
    strategy: Literal["ekg", "global", "uniform"] = "ekg"
    importance: Literal[
        "taylor", "taylor-per-sample", "least-squares", "magnitude", "fpgm", "bn-scale", "hessian", "lamp", "random"
    ] = "taylor"
    accept: int | None = None
    align: int | Literal["auto"] | None = None
    ignore: tuple[str, ...] = ()
    cache: str = "2GiB"
    train_per_class: int = 256
    val_per_class: int = 32
    images: int = 16
    batch_size: int | None = None
    val_batch_size: int | None = None
    hardest_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "accept", "align", "val_per_class", "images", "batch_size", "val_batch_size")
        at_least(self, 0, "train_per_class")
        assert self.points  # are such, or it raises
        bytes_of(self.cache)

    @property
    def budgets(self) -> Point:
        """The budgets that are given, by their keys; of several the tightest."""
        return self.points[-1]


@dataclass(frozen=True)
class Export:
    """ONNX file, parity check and latency table at the end of the job. `opset`: the exporter's own by default. `int8`:
    both networks in INT8 as well, calibrated on the run's images. `threads`: of the CPU, to time on; 0 takes all, with
    `int8` one."""

    onnx: bool = False
    fp16: bool = False
    batches: tuple[int, ...] = (1, 64)
    providers: tuple[str, ...] = ()
    opset: int | None = None
    latency: bool = True
    int8: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        at_least(self, 0, "threads")
        at_least(self, 1, "opset")
        refuse(self, "batches", min(self.batches, default=1) >= 1, "batch sizes of at least 1")


@dataclass(frozen=True)
class Recipe:
    """Everything `ekgfx prune` needs to know. `ekgfx prune --help` says what the settings mean.

    `model_kwargs`: further arguments of the model's factory, or of timm's. `preprocessing`: of images, before what the
    model says. `ema`: of a weights file with several state dicts, the moving average. `leaf`: modules that run as they
    are, by name or glob. `unused`: parameters or modules that nothing uses, likewise. `outputs`: which of the model's
    outputs matter (all by default); `logits`: where the logits are in them, by key, field or index. `graphs`: whether a
    module whose Python cannot express the cut gets another forward ("warn" names it; "forbid" keeps all channels of the
    groups that would need one). `data`: None takes `photos`, label-free. `pretrain`: training of the model before it is
    pruned. `measured`: what this recipe gave, and where.
    """

    model: str | None = None
    description: str = ""
    measured: str = ""
    weights: str = "auto"
    ema: bool = False
    input: str | None = None
    classes: int | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    leaf: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    logits: str | None = None
    graphs: Literal["warn", "allow", "forbid"] = "warn"
    data: str | None = None
    seed: int = 0
    device: str = "auto"
    pretrain: Training = field(default_factory=Training)
    search: Search = field(default_factory=Search)
    repair: Repair = field(default_factory=Repair)
    finetune: Finetune = field(default_factory=Finetune)
    export: Export = field(default_factory=Export)

    @property
    def each(self) -> tuple["Recipe", ...]:
        """The recipe of the network of each budget, the loosest first. BudgetError for one to train at that is none."""
        points, wanted = self.search.points, self.finetune.budgets
        key = several({key: asked for key in BUDGETS if (asked := getattr(self.search, key)) is not None})
        trained = {len(points) - 1}
        if wanted is not None and key is None:
            raise RecipeError("finetune.budgets chooses among the networks of several budgets, and there is one alone")
        if wanted is not None and key is not None:
            trained = {which(points, {key: one}) for one in (wanted if isinstance(wanted, tuple | list) else (wanted,))}
        return tuple(
            replace(
                self,
                search=replace(self.search, **{key: point.get(key) for key in BUDGETS}),  # type: ignore[arg-type]
                finetune=replace(self.finetune, budgets=None, epochs=self.finetune.epochs if number in trained else 0),
            )
            for number, point in enumerate(points)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back to an equal recipe."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, settings: object, where: str = "the recipe") -> "Recipe":
        """A recipe from nested plain values, strictly: RecipeError names an unknown key or a value of another type."""
        recipe: Recipe = read(cls, _with_fractions(settings), where, RecipeError)
        return recipe


def check_place(asked: Search) -> None:
    """RecipeError for a latency budget that holds nowhere, or a table of timings that is not there."""
    if asked.latency is not None and asked.target is None and asked.latency_table is None:
        raise RecipeError(
            "a latency budget needs the place that it holds for: give --target, such as cuda:fp16:batch=64 or "
            "cpu:fp32:batch=1, or --latency-table FILE from another machine"
        )
    if asked.latency_table is not None and not Path(asked.latency_table).expanduser().exists():
        raise RecipeError(
            f"cannot read the latency table {asked.latency_table}: no such file; measure one with --latency"
        )


def _with_fractions(settings: object) -> object:
    """The settings with budgets written as 55% as numbers."""
    if not isinstance(settings, Mapping) or not isinstance(asked := settings.get("search"), Mapping):
        return settings
    return {**settings, "search": {**asked, **{key: _fraction(asked[key]) for key in BUDGETS if key in asked}}}


def _fraction(asked: object) -> object:
    if isinstance(asked, list | tuple):
        return [_fraction(each) for each in asked]
    return fraction_of(asked) if isinstance(asked, str) and asked.endswith("%") else asked


def names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("ekgfx.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load(name: str) -> Recipe:
    """A recipe by its name, or from a YAML file by its path."""
    if name.endswith((".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = (isinstance(error, OSError) and error.strerror) or error
            raise RecipeError(f"cannot read the recipe {name}: {why}; `ekgfx recipes` lists the known ones") from error
    elif name in names():
        text = resources.files("ekgfx.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        meant = did_you_mean(name, names())
        raise RecipeError(f"no recipe {name!r}{meant}; `ekgfx recipes` lists them, a file ends in .yaml")
    try:
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"recipe {name} is not YAML: {' '.join(str(error).split())[:300]}") from error
    return Recipe.from_json({} if settings is None else settings, f"recipe {name}")


def override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with some settings replaced, named by dotted keys (`"search.flops"`), as the CLI's flags do."""
    settings = recipe.to_json()
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = settings
        for section in sections:
            place = place[section]
        place[last] = value
    return Recipe.from_json(settings, "the command line")


def declared(key: str) -> tuple[Any, Any]:
    """The annotated type and the default of a setting named by its dotted key."""
    owner: Any = Recipe
    *sections, last = key.split(".")
    for section in sections:
        owner = typing.get_type_hints(owner)[section]
    return typing.get_type_hints(owner)[last], getattr(owner(), last)
