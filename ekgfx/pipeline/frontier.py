"""A run of several budgets: a run of its own for each but the tightest, inside of it, and all of them side by side."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ekgfx.base.files import read_json
from ekgfx.base.schema import read
from ekgfx.errors import EkgfxError, RunError
from ekgfx.export.exporter import to_onnx
from ekgfx.export.layers import fp16
from ekgfx.export.profile import whole_runs
from ekgfx.latency.target import Target
from ekgfx.pipeline import planning, timing
from ekgfx.pipeline.job import Job
from ekgfx.runs import checkpoint
from ekgfx.runs.directory import MANIFEST, POINTS, STAGES, Run, at_budget, read_manifest, verify
from ekgfx.search import Point, SearchResult
from ekgfx.settings.recipe import Recipe

FILE = "frontier.json"
TARGET = "cpu:fp32:batch=1:threads=1"
"""Where networks are timed when the settings name no target."""
CONFIDENCE = 1.96
"""Standard deviations of a normal distribution that 95% lie within."""
INHERITED = ("source", "ancestors", "inputs", "named_inputs", "weights", "device", "notes", "signature")


@dataclass(frozen=True)
class Network:
    """One point of the curve. label: its budget, or "unpruned"; quality: accuracy or agreement on the test images,
    with its 95% interval, None where nothing was measured; milliseconds: of a run on the frontier's target, None where
    the network could not be timed; finetuned: whether it was trained after the cut."""

    label: str
    macs: int
    params: int
    quality: float | None
    interval: tuple[float, ...] | None
    milliseconds: float | None
    finetuned: bool


@dataclass(frozen=True)
class Frontier:
    """Accuracy against cost. networks: the unpruned one first, then from the loosest budget to the tightest. measures:
    "accuracy" or "agreement"; samples: test images; target: where they were timed; knee: position of the network where
    the curve bends (`bend`)."""

    networks: tuple[Network, ...]
    measures: str
    samples: int
    target: str
    knee: int | None

    @classmethod
    def of(cls, path: Path) -> "Frontier | None":
        """What the run at `path` holds, with the networks as they are now: some may have been trained since they were
        put side by side. None where the run has one budget, or is not done."""
        manifest = read_manifest(path)
        if FILE not in manifest["files"]:
            return None
        told: Frontier = read(cls, read_json(verify(path, FILE)), str(path / FILE), RunError)
        first, *networks = told.networks
        points = manifest.get("points", ())
        if len(points) != len(networks):
            return told
        now = [first]
        for network, asked in zip(networks, points, strict=True):
            score, trained = _last(at_budget(path, asked))
            quality = score[told.measures]
            interval = None if quality is None else wilson(quality, told.samples)
            now.append(replace(network, quality=quality, interval=interval, finetuned=trained))
        return replace(told, networks=tuple(now), knee=bend(now))


@contextmanager
def run_of(job: Job, recipe: Recipe, result: SearchResult, point: Point) -> Iterator[Run]:
    """The run of a budget, with its plan; made where it is missing."""
    path = job.run.path / POINTS / point.label
    with Run.reopen(path) if (path / MANIFEST).exists() else _begun(job, recipe, path) as run:
        if not run.has(checkpoint.PLAN):
            (path / planning.HISTORY).unlink(missing_ok=True)
            for step in result.steps:
                run.append(planning.HISTORY, step.to_json())
            planning.write_result(job.at(run, recipe), result)
        yield run


def _begun(job: Job, recipe: Recipe, path: Path) -> Run:
    manifest = job.run.manifest
    facts = {key: manifest[key] for key in INHERITED if key in manifest}
    before = {name: score for name, score in manifest["results"].items() if name == "before"}
    if job.run.has(timing.FILE):
        facts["latency"] = {key: manifest["latency"][key] for key in ("target", "prediction_error")}
    run = Run.create(path, settings=recipe.to_json(), results=before, part_of_several=True, **facts)
    if job.run.has(timing.FILE):
        run.write_json(timing.FILE, job.run.read(timing.FILE))
    return run


def compare(job: Job, result: SearchResult) -> None:
    """Puts the networks of all budgets beside the unpruned one, timed in turns, in the run's frontier.json."""
    if job.run.has(FILE):
        return
    runs = [at_budget(job.run.path, point.asked) for point in result.points]
    first = job.run.manifest["results"]["before"]
    measures = "accuracy" if first["accuracy"] is not None else "agreement"
    samples = 0 if job.data is None else job.data.size("test")
    target = job.recipe.search.target or job.run.manifest.get("latency", {}).get("target") or TARGET
    rows = [("unpruned", first, False), *((p.label, *_last(path)) for p, path in zip(result.points, runs, strict=True))]
    networks = []
    for (label, score, trained), milliseconds in zip(rows, _times(job, runs, target), strict=True):
        quality = score[measures]
        counted = quality is not None and (measures == "accuracy" or label != "unpruned")  # it agrees with itself
        interval = wilson(quality, samples) if counted else None
        networks.append(Network(label, score["macs"], score["params"], quality, interval, milliseconds, trained))
    job.run.write_json(FILE, asdict(Frontier(tuple(networks), measures, samples, target, bend(networks))))


def _last(path: Path) -> tuple[Mapping[str, Any], bool]:
    """The score of a run's network, and whether it was fine-tuned."""
    results = read_manifest(path)["results"]
    last = [name for name in STAGES if name in results][-1]
    return results[last], last == "finetuned"


def _times(job: Job, runs: Sequence[Path], target: str) -> Sequence[float | None]:
    """Milliseconds of a run of the unpruned network and of each run's; None where they cannot be timed here."""
    asked = job.recipe.export
    if not asked.latency:
        return [None] * (len(runs) + 1)
    job.report.stage(f"time the networks on {target}")
    place = Target.parse(target)
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = {}
            for number, path in enumerate([None, *runs]):
                model = job.built.model if path is None else checkpoint.load_run(path).model.to(job.device)
                file = Path(folder) / f"{number}.onnx"
                files[str(number)] = to_onnx(model, job.built.example_inputs, file, fp16=fp16(place))
            times = whole_runs(files, job.built.example_inputs, place)
    except EkgfxError as error:
        job.report.note(f"not timed: {error}")
        return [None] * (len(runs) + 1)
    return [times[str(number)] for number in range(len(runs) + 1)]


def wilson(share: float, samples: int) -> tuple[float, float]:
    """The 95% interval of a probability that a share of so many samples was seen of (Wilson, 1927)."""
    square = CONFIDENCE**2 / samples
    middle = (share + square / 2) / (1 + square)
    reach = CONFIDENCE / (1 + square) * math.sqrt(share * (1 - share) / samples + square / samples / 4)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def bend(networks: Sequence[Network]) -> int | None:
    """The position of the knee, where the curve of quality over MACs lies highest above the line between its ends, both
    axes scaled to it (the Kneedle criterion of Satopää et al., 2011).

    None where no network lies above that line, or the curve falls by less than the first interval is wide.
    """
    known = [(number, each.macs, each.quality) for number, each in enumerate(networks) if each.quality is not None]
    if len(known) < 3:
        return None
    (_, most, best), *_, (_, least, worst) = known
    widths = [high - low for low, high in (each.interval for each in networks if each.interval)]
    if best - worst <= max(widths[:1], default=0.0) or most <= least:
        return None
    above = [((y - worst) / (best - worst) - (x - least) / (most - least), number) for number, x, y in known]
    height, number = max(above)
    return number if height > 1e-9 else None
