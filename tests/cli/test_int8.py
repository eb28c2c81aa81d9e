"""`ekgfx export RUN --int8`: from a run's images alone."""

import json
import shutil
from pathlib import Path

import onnx
import pytest

from ekgfx.pipeline.job import Silent
from ekgfx.pipeline.jobs import prune_job
from ekgfx.runs.directory import Run
from ekgfx.settings.recipe import Recipe

SETTINGS = {
    "model": "ekgfx.models:digits_cnn",
    "search": {"flops": 0.6, "strategy": "uniform", "importance": "magnitude"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs by their data."""
    folder = tmp_path_factory.mktemp("made")

    def run(data: str | None) -> Path:
        path = folder / str(data)
        if not path.exists():
            asked = Recipe.from_json(SETTINGS if data is None else {**SETTINGS, "data": data, "repair": {"images": 32}})
            with Run.create(path, settings=asked.to_json()) as opened:
                prune_job(opened, Silent())
        return path

    return run


def test_both_networks_in_every_precision(made, ekgfx, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made("digits"), run)
    done = ekgfx("export", run, "--int8", "--batch", 1, "--onnx", tmp_path / "net.onnx")
    assert done.code == 0, done.err
    assert (tmp_path / "net.onnx").read_bytes() == (run / "model-int8.onnx").read_bytes()
    onnx.checker.check_model(tmp_path / "net.onnx", full_check=True)
    assert "1 thread " in " ".join(done.out.split()) and "accuracy" in done.out and "INT8: " in done.err
    told = json.loads((run / "export.json").read_text())
    found = {variant["name"]: variant for variant in told["precisions"]["variants"]}
    assert {"dense", "dense int8", "pruned", "pruned int8"} <= set(found)
    assert told["precisions"]["images"] == 359 and all(0 <= v["score"] <= 1 for v in found.values())
    assert {t["network"] for t in told["latency"]["timings"]} == set(found)
    files = json.loads((run / "run.json").read_text())["files"]
    assert {variant["file"] for variant in found.values()} <= set(files)
    assert ekgfx("report", run).code == 0
    page = " ".join((run / "report.html").read_text(encoding="utf-8").split())
    section = page[page.index("<h2>Precisions</h2>") :]
    assert section.count("<td>int8</td>") == 2 and "judged on 359 images" in section
    for variant in found.values():
        assert f"{variant['score']:.2%}" in section
    # Another export drops what is not of it.
    assert ekgfx("export", run, "--no-latency").code == 0
    assert {file.name for file in run.glob("*.onnx")} == {"model.onnx"}


def test_without_images_there_is_nothing_to_calibrate_on(made, refused) -> None:
    said = refused("export", made(None), "--int8")
    assert "has no images to calibrate INT8 on; prune with --data SPEC" in said


@pytest.mark.parametrize("flags", [["--fp16"], ["--provider", "torch"]])
def test_goes_with_nothing_else(made, refused, flags) -> None:
    assert "--int8 is timed on the CPU, and in fp16 as well" in refused("export", made(None), "--int8", *flags)
