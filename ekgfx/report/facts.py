"""What a run directory knows about itself, read for showing: nothing is computed but how far the teachers agree.

A run that is under way, was interrupted, or never exported has less to tell; what is missing is None or empty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ekgfx.bank import Bank
from ekgfx.bank.store import read_manifest as read_bank_manifest
from ekgfx.base.files import read_json, read_lines
from ekgfx.base.schema import read
from ekgfx.errors import RunError
from ekgfx.export import Breakdown, LatencyTable
from ekgfx.export.precisions import Precisions
from ekgfx.pipeline import delivery, planning, stages
from ekgfx.pipeline.frontier import Frontier
from ekgfx.pipeline.job import Score
from ekgfx.repair import Repair
from ekgfx.runs import checkpoint
from ekgfx.runs.directory import STAGES, read_manifest, verify
from ekgfx.search import SearchResult, Step
from ekgfx.settings.recipe import Recipe
from ekgfx.training.keeping import Epoch

SAMPLES = 20_000
"""Most samples that the teachers' agreement is counted on."""


@dataclass(frozen=True)
class BankFacts:
    """The memory bank. teachers: step, loss and infidelity of each, the best first; agreement: K × K shares of the
    training samples for which two teachers name the same class; samples: how many were counted."""

    teachers: Sequence[Mapping[str, Any]]
    agreement: Sequence[Sequence[float]]
    samples: int


@dataclass(frozen=True)
class Layer:
    """MACs per sample of the operators of one module, before and after."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Facts:
    """A run. results: stage (`STAGES`) → score; search: None until it is finished, `steps` are there before; layers:
    in the order of the network, empty where they were not recorded."""

    path: Path
    manifest: Mapping[str, Any]
    settings: Recipe
    results: Mapping[str, Score]
    steps: Sequence[Step]
    search: SearchResult | None
    layers: Sequence[Layer]
    epochs: Sequence[Epoch]
    knowledge: BankFacts | None
    latency: LatencyTable | None
    breakdown: Breakdown | None = None
    precisions: Precisions | None = None
    repair: Repair | None = None
    frontier: Frontier | None = None

    @classmethod
    def of(cls, path: Path) -> "Facts":
        """Reads the run at `path`. RunError or PlanError when a file is damaged, changed, or of a newer format."""
        manifest = read_manifest(path)
        told = manifest.get("results", {})
        results = {
            stage: read(Score, told[stage], f"{path}/run.json", RunError, f"results.{stage}")
            for stage in STAGES
            if stage in told
        }
        settings = Recipe.from_json(manifest.get("settings", {}), f"{path}/run.json")
        lines = read_lines(path / planning.HISTORY)
        search, layers = None, ()
        lines = planning.own_steps(lines)
        steps = tuple(map(Step.from_json, lines))
        if checkpoint.PLAN in manifest["files"]:
            plan = read_json(verify(path, checkpoint.PLAN))
            if not isinstance(plan, dict):
                raise RunError(f"{path / checkpoint.PLAN} is damaged: it holds no object; restore it")
            if plan.get("search") is not None:
                search = SearchResult.from_json({**_mapping(plan["search"], path), "steps": lines})
            layers = read(tuple[Layer, ...], plan.get("layers", []), str(path / checkpoint.PLAN), RunError, "layers")
        epochs = tuple(
            read(Epoch, line, str(path / stages.EPOCHS), RunError) for line in read_lines(path / stages.EPOCHS)
        )
        return cls(
            path,
            manifest,
            settings,
            results,
            steps,
            search,
            layers,
            epochs,
            _knowledge(path),
            *_exported(path, manifest),
            repair=_repair(path, manifest),
            frontier=Frontier.of(path),
        )

    @property
    def widths(self) -> list[tuple[str, int, int]]:
        """(group, channels before, channels after), in the order of the network."""
        if self.search is None:
            return []
        kept = self.search.plan.kept
        return [(name, size, len(kept.get(name, range(size)))) for name, size in self.search.sizes.items()]

    @property
    def dropped(self) -> tuple[str, ...]:
        """The residual blocks that became identities."""
        return () if self.search is None else self.search.plan.dropped

    @property
    def random(self) -> bool:
        """Whether the model was never trained."""
        return str(self.manifest.get("weights", "")).startswith("random") and not self.settings.pretrain.epochs


def _mapping(value: object, path: Path) -> Mapping[str, Any]:
    told: Mapping[str, Any] = read(Mapping[str, Any], value, str(path / checkpoint.PLAN), RunError, "search")
    return told


def _repair(path: Path, manifest: Mapping[str, Any]) -> Repair | None:
    """What the run's repair did; None where there was none."""
    if stages.REPAIR not in manifest["files"]:
        return None
    told: Repair = read(Repair, read_json(verify(path, stages.REPAIR)), str(path / stages.REPAIR), RunError)
    return told


def _knowledge(path: Path) -> BankFacts | None:
    """The run's bank; None where there is none, or one that is being built."""
    folder = path / stages.BANK
    if not (folder / "bank.json").is_file():
        return None
    if any(teacher.file is None for teacher in read_bank_manifest(folder).teachers):
        return None
    bank = Bank.open(folder, verify=False)
    return BankFacts(bank.teachers, *_agreement(bank))


def _agreement(bank: Bank) -> tuple[list[list[float]], int]:
    """How often each two teachers agree, and on how many samples that was counted."""
    index = bank.spread(SAMPLES)
    if not len(index):
        return [], 0
    said = torch.cat([bank.logits(part).argmax(2).movedim(1, 0).flatten(1) for part in index.split(512)], 1)
    return [[float((one == other).float().mean()) for other in said] for one in said], len(index)


def _exported(
    path: Path, manifest: Mapping[str, Any]
) -> tuple[LatencyTable | None, Breakdown | None, Precisions | None]:
    """What the export measured: whole networks, their layers, and the networks in several precisions."""
    if delivery.RESULT not in manifest["files"]:
        return None, None, None
    told = read_json(verify(path, delivery.RESULT))
    if not isinstance(told, dict) or "latency" not in told:
        raise RunError(f"{path / delivery.RESULT} is damaged: it says nothing of latency; export the run again")
    table: LatencyTable | None = read(
        LatencyTable | None, told["latency"], str(path / delivery.RESULT), RunError, "latency"
    )
    layers: Breakdown | None = read(
        Breakdown | None, told.get("layers"), str(path / delivery.RESULT), RunError, "layers"
    )
    precisions: Precisions | None = read(
        Precisions | None, told.get("precisions"), str(path / delivery.RESULT), RunError, "precisions"
    )
    return table, layers, precisions
