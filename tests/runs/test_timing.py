"""A job's budget of milliseconds: what is measured, what is kept, what is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch

from ekgfx.errors import RecipeError
from ekgfx.pipeline import timing
from ekgfx.runs.directory import Run, read_manifest
from ekgfx.search.latency import LayerTable
from ekgfx.settings.recipe import Recipe, Search
from tests.search.test_latency import table_of

TARGET = "cpu:fp32:batch=4:threads=1"


class Quiet:
    """A report that keeps the notes."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, *_: object) -> None:
        pass


def settings(**search: object) -> dict[str, object]:
    asked = {"strategy": "uniform", "importance": "magnitude", "latency": 0.8, **search}
    return Recipe.from_json({"model": "ekgfx.models:digits_cnn", "search": asked}).to_json()


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes a job of the digits network; the layers are "measured" by a law, and counted."""
    from ekgfx.pipeline.job import Job

    monkeypatch.setenv("EKGFX_CACHE", str(tmp_path / "cache"))
    measured = []

    def measure(traced, target, rules, *, count, begun, on_network):
        table = table_of(traced, count)
        measured.append(0 if begun is None else len(begun.samples))
        on_network(table)
        return table

    monkeypatch.setattr(timing, "measure_layers", measure)

    def make(name: str, **search: object) -> Job:
        return Job.of(Run.create(tmp_path / name, settings=settings(**search)), Quiet())

    make.measured = measured
    return make


def test_layers_are_measured_once_for_a_device(job):
    first = timing.layer_table(job("first", target=TARGET))
    assert timing.layer_table(job("second", target=TARGET, latency=0.5)) == first
    assert job.measured == [0]
    timing.layer_table(job("third", target=TARGET, align=4))  # other widths, other measurements
    timing.layer_table(job("fourth", target="cpu:fp32:batch=8:threads=1"))
    assert job.measured == [0, 0, 0]


def test_timings_need_no_home(job, tmp_path, monkeypatch):
    """A cache that cannot be written to costs the next run its timings, not this one its search."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("EKGFX_CACHE", str(tmp_path / "file" / "cache"))
    ours = job("run", target=TARGET)
    assert timing.layer_table(ours).target == TARGET
    (said,) = [note for note in ours.report.notes if "are not kept" in note]
    assert "Not a directory" in said and "EKGFX_CACHE names another folder" in said


def test_an_interrupted_measurement_goes_on(job, tmp_path):
    (done,) = [timing.layer_table(job("first", target=TARGET))]
    (file,) = (tmp_path / "cache" / "latency").iterdir()
    value = done.to_json()
    file.write_text(json.dumps({**value, "samples": list(value["samples"])[:5]}))
    timing.layer_table(job("second", target=TARGET))
    assert job.measured == [0, 5]


def test_a_run_keeps_the_table_it_began_with(job, tmp_path):
    begun = job("run", target=TARGET)
    first = timing.layer_table(begun)
    begun.run.close()
    for file in (tmp_path / "cache" / "latency").iterdir():
        file.unlink()
    from ekgfx.pipeline.job import Job

    again = Job.of(Run.reopen(tmp_path / "run"), Quiet())
    assert timing.layer_table(again) == first
    assert job.measured == [0]
    error = read_manifest(tmp_path / "run")["latency"]["prediction_error"]
    assert 0 <= error["median"] <= error["worst"]


def test_a_table_from_another_machine(job, tmp_path):
    traced = job("first", target=TARGET).traced
    file = tmp_path / "gpu.json"
    table = table_of(traced, 6)
    file.write_text(json.dumps({**table.to_json(), "target": "cuda:fp16:batch=64", "environment": {"gpu": "Voodoo"}}))
    other = job("second", latency_table=str(file))
    assert timing.layer_table(other).target == "cuda:fp16:batch=64"
    assert job.measured == []
    assert not timing.here(timing.layer_table(other))
    with pytest.raises(RecipeError, match="is of cuda:fp16:batch=64, not of cpu:fp32"):
        timing.layer_table(job("third", latency_table=str(file), target=TARGET))


def test_another_budget_needs_no_table(job):
    assert timing.layer_table(job("run", latency=None, flops=0.5)) is None


def test_alignment_is_that_of_the_hardware(job, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    align = timing.alignment
    assert align(Search(flops=0.5)) == 1
    assert align(Search(flops=0.5, align=24)) == 24
    assert align(Search(flops=0.5, align="auto")) == 16
    assert align(Search(flops=0.5, align="auto"), device="cuda", half=True) == 8
    assert align(Search(flops=0.5, align="auto"), device="cuda") == 4
    assert align(Search(flops=0.5, align="auto", target="cuda:fp16")) == 8
    assert align(Search(latency=0.5, target="cuda:tf32")) == 4
    assert align(Search(latency=0.5, align=2, target="cuda:tf32")) == 2
    foreign = table_of(job("run").traced, 2, tile=32)
    assert align(Search(latency=0.5, latency_table="x"), foreign) == 32


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Search(latency=0.5), "needs the place that it holds for: give --target"),
        (Search(latency=0.5, target="npu"), "unknown target 'npu'"),
        (Search(flops=0.5, target="cpu:int4"), "cannot read 'int4'"),
    ],
)
def test_settings_that_cannot_be_met(asked, says):
    with pytest.raises(RecipeError, match=says):
        timing.check_settings(asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_target_names_the_way_out(tmp_path):
    table = tmp_path / "table.json"
    table.write_text("{}")
    with pytest.raises(RecipeError, match=r"'cuda' cannot be used: .*; a table measured elsewhere .* --latency-table"):
        timing.check_settings(Search(latency=0.5, target="cuda:fp16:batch=64"))
    timing.check_settings(Search(latency=0.5, target="cuda:fp16:batch=64", latency_table=str(table)))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system says it in another way")
def test_cache_folder(monkeypatch):
    monkeypatch.delenv("EKGFX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert timing.cache_folder() == Path("/somewhere/ekgfx")
    monkeypatch.setenv("EKGFX_CACHE", "/elsewhere")
    assert timing.cache_folder() == Path("/elsewhere")


@pytest.mark.sweep  # real timings of so small a network: on a busy machine its least width may seem no faster
def test_a_whole_job_and_its_promise(tmp_path, monkeypatch):
    """Real timings of three networks; the search's plan, the prediction, and the clock's word on it."""
    from ekgfx.pipeline.jobs import prune_job

    monkeypatch.setenv("EKGFX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "NETWORKS", 3)
    quiet = Quiet()
    with Run.create(tmp_path / "run", settings=settings(target=TARGET, latency=0.9, align=4)) as run:
        prune_job(run, quiet)
    facts = read_manifest(tmp_path / "run")["latency"]
    assert facts["target"] == TARGET
    assert 0 < facts["predicted"] <= 0.9
    assert 0 < facts["measured"] < 2
    assert any("networks timed on" in note for note in quiet.notes)
    assert any(note.startswith("latency kept: ") for note in quiet.notes)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert len(LayerTable.load(tmp_path / "run" / timing.FILE).samples) == 3
    sizes = plan["search"]["sizes"]
    assert all(len(kept) % 4 == 0 or len(kept) == sizes[name] for name, kept in plan["kept"].items())
