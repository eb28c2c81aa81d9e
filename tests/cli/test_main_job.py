"""The main job as a user runs it: every stage on real data, interrupted anywhere, and what can be done with a run."""

import json
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ekgfx as library
from ekgfx import data as datasets
from ekgfx.base.files import read_lines
from ekgfx.cli import main
from ekgfx.runs.directory import read_manifest
from tests.cli.conftest import TINY, command, environment
from tests.support import processes


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An undisturbed run of the tiny recipe."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    subprocess.run(command("prune", "--recipe", "tiny.yaml", "-o", "run"), cwd=folder, env=environment(), check=True)
    return folder / "run"


def steps(run: Path) -> list[dict]:
    """The history without what differs between two runs of the same search: time."""
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "eta")} for line in read_lines(run / "history.jsonl")
    ]


def test_a_run_holds_what_it_says(finished):
    manifest = read_manifest(finished)
    assert manifest["status"] == "done"
    assert set(manifest["results"]) == {"before", "searched", "repaired", "finetuned"}
    before, after = manifest["results"]["before"], manifest["results"]["finetuned"]
    assert after["macs"] <= 0.7 * before["macs"]
    assert manifest["weights"].startswith("as ekgfx.models:digits_cnn")
    assert json.loads((finished / "plan.json").read_text())["reached"] == after["macs"] / before["macs"]
    assert len(read_lines(finished / "finetune.jsonl")) == 1
    assert {path.name for path in finished.iterdir() if path.suffix} == {
        "run.json",
        "plan.json",
        "validation.json",
        "history.jsonl",
        "dense.safetensors",
        "model.safetensors",
        "repair.json",
        "finetune.jsonl",
        "finetune.csv",
    }
    validation = json.loads((finished / "validation.json").read_text())["samples"]
    assert sorted(validation) == sorted(datasets.load("digits").search_subset(4, 4, 0)[1].tolist())
    loaded = library.load(finished)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == after["params"]


# Moments in the life of a run, told by what is on disk: none of the stages may be the one that cannot be interrupted.
MOMENTS = {
    "training": lambda run: (run / "pretrain.safetensors").exists(),
    "searching": lambda run: len(read_lines(run / "history.jsonl")) >= 2,
    "searched": lambda run: (run / "plan.json").exists(),
    "cut": lambda run: "searched" in read_manifest(run)["results"],
    "bank": lambda run: (run / "bank").exists(),
    "finetuning": lambda run: (run / "finetune.safetensors").exists(),
}


def pruning(*arguments: str) -> None:
    """`ekgfx prune` in this process."""
    torch.set_num_threads(1)
    main(["prune", *arguments])


def test_a_run_killed_at_every_stage_ends_as_if_it_had_not_been(finished, tiny, tmp_path):
    """kill -9 again and again; each --resume goes on, and plan, history and weights are the undisturbed run's. The
    processes come with the package imported: to import it takes longer than the job."""
    run = tmp_path / "run"
    for _ in processes.killed_and_resumed(pruning, run, ("--recipe", tiny, "-o", run), MOMENTS.values()):
        assert read_manifest(run)["status"] == "running"
    assert read_manifest(run)["status"] == "done"
    assert steps(run) == steps(finished)
    assert (run / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()
    ours, theirs = library.load(run).state_dict(), library.load(finished).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def no_file_larger_than() -> Iterator[Callable[[int], None]]:
    """The operating system refuses to let a file grow beyond so many bytes (-1: lets it)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_loses_nothing(ekgfx, refused, tiny, tmp_path, no_file_larger_than):
    """First at the start, where nothing is left behind; then when the pruned weights are there, but no checkpoint of
    their training fits. With space again, --resume ends as an undisturbed run does."""
    tiny.write_text(re.sub("^pretrain.*", "", TINY, flags=re.MULTILINE))
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert ekgfx("prune", "--recipe", tiny, "-o", whole).code == 0
    weights = (whole / "dense.safetensors").stat().st_size

    no_file_larger_than(weights // 2)
    assert re.search(r"cannot write .*dense\.safetensors: ", refused("prune", "--recipe", tiny, "-o", run))
    assert not run.exists()
    no_file_larger_than(weights)
    assert re.search(r"cannot write .*finetune\.safetensors: ", refused("prune", "--recipe", tiny, "-o", run))
    assert read_manifest(run)["status"] == "failed"
    no_file_larger_than(-1)
    assert ekgfx("prune", "--resume", run).code == 0
    assert read_manifest(run)["status"] == "done"
    assert steps(run) == steps(whole)
    ours, theirs = library.load(run).state_dict(), library.load(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        command("prune", *arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def test_interrupt_says_how_to_go_on(tiny, tmp_path):
    run = tmp_path / "run"
    process = start("--recipe", tiny, "-o", run)
    while not (run / "history.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode().splitlines()[-1] == f"ekgfx: stopped; go on with: ekgfx prune --resume {run}"
    assert said.decode().count("stopped") == 1
    assert "Traceback" not in said.decode()
    assert read_manifest(run)["status"] == "interrupted"


def test_what_a_run_is_good_for(finished, ekgfx, tmp_path):
    """eval, finetune further, export with parity and latency, prune further: each from the run alone."""
    evaluated = ekgfx("eval", finished, "--json")
    assert evaluated.code == 0, evaluated.err
    found = json.loads(evaluated.out)
    recorded = read_manifest(finished)["results"]["finetuned"]
    assert found["accuracy"] == pytest.approx(recorded["accuracy"])
    assert (found["macs"], found["params"]) == (recorded["macs"], recorded["params"])

    looked = ekgfx("landscape", finished, "--images", 8, "--products", 2, "--points", 2)
    assert looked.code == 0, looked.err
    assert (finished / "landscape.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished / "landscape.json").read_text())["data"] == "digits"

    tuned = ekgfx("finetune", finished, "--epochs", 2, "--batch-size", 64)
    assert tuned.code == 0, tuned.err
    assert len(read_lines(finished / "finetune.jsonl")) == 2
    assert read_manifest(finished)["results"]["finetuned"]["accuracy"] > recorded["accuracy"]

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "only").symlink_to(finished)  # the newest run is the default
    exported = ekgfx(
        "export", "--onnx", tmp_path / "net.onnx", "--batch", 2, "--provider", "cpu", "--provider", "torch"
    )
    assert exported.code == 0, exported.err
    assert "parity with PyTorch" in exported.out
    assert (tmp_path / "net.onnx").read_bytes() == (finished / "model.onnx").read_bytes()
    written = json.loads((finished / "export.json").read_text())
    layers = written["layers"]["layers"]
    assert sum(layer["macs_after"] for layer in layers) < sum(layer["macs_before"] for layer in layers)
    assert all(layer["ms_before"] >= 0 and layer["bound"] in ("compute", "memory", "launch") for layer in layers)
    timings = written["latency"]["timings"]
    assert [(timing["provider"], timing["network"]) for timing in timings] == [
        (provider, network) for provider in ("cpu", "torch") for network in ("dense", "pruned")
    ]

    shown = ekgfx("report", finished)
    assert shown.code == 0, shown.err
    page = (finished / "report.html").read_text(encoding="utf-8")
    sections = [
        "Result",
        "Search",
        "Widths",
        "Where the MACs went",
        "Repair",
        "Fine-tuning",
        "Knowledge",
        "Latency",
        "Where the time went",
        "Get the same",
    ]
    assert re.findall("<h2>(.*?)</h2>", page) == sections

    again = ekgfx("finetune", finished, "--epochs", 1, "--batch-size", 64)
    assert again.code == 0, again.err
    assert not (finished / "model.onnx").exists()  # it held the weights before

    further = ekgfx("prune", finished, "--data", "digits", "--flops", "0.6", "-o", "further")
    assert further.code == 0, further.err
    smaller = read_manifest(tmp_path / "further")["results"]["searched"]
    assert smaller["macs"] <= 0.6 * recorded["macs"]
    assert "% kept, " in further.out


def test_dry_run_does_nothing(ekgfx, tiny, tmp_path):
    done = ekgfx("prune", "--recipe", tiny, "--dry-run", "--ignore", "stem*")
    assert done.code == 0, done.err
    assert "ignored" in done.out
    assert "budget: 70.0% of the MACs" in done.out
    assert not (tmp_path / "runs").exists()


def test_search_without_data_takes_any_input(ekgfx, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.out = nn.Linear(4, 16), nn.Linear(6, 16), nn.Linear(16, 3)\n"
        "    def forward(self, x, y):\n"
        "        return self.out((self.a(x) + self.b(y)).relu())\n"
        "def make():\n"
        "    return Two(), (torch.randn(2, 4), torch.randn(2, 6))\n"
    )
    arguments = ("--params", "0.5", "--search", "uniform", "--importance", "magnitude", "-o", "run")
    done = ekgfx("prune", "net.py:make", *arguments)
    assert done.code == 0, done.err
    assert library.load(tmp_path / "run").a.out_features == 7  # 16 → 27·w + 3 of 243 parameters, at most half


HEADS = """
import torch
from torch import nn

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3)
        self.main, self.aux = nn.Linear(12, 10), nn.Linear(16, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return {"main": self.main(self.body(x).relu().mean((2, 3))), "aux": self.aux(x.mean((2, 3)))}

def make():
    return Heads(), torch.randn(1, 1, 8, 8)
"""


def test_a_model_that_returns_a_dict_in_two_rounds(ekgfx, tmp_path):
    """The logits are asked for where they are not clear; two runs are rounds of one original."""
    (tmp_path / "heads.py").write_text(HEADS)
    options = ("--data", "digits", "--search", "uniform", "--importance", "random")
    refused = ekgfx("prune", "heads.py:make", "--flops", "60%", *options)
    assert refused.code == 2 and "a dict of main 1×10, aux 1×10; pass logits='main'" in refused.err
    first = ("--logits", "main", "--epochs", "1", "--batch-size", "512", "-o", "first")
    assert ekgfx("prune", "heads.py:make", "--flops", "60%", *options, *first).code == 0
    assert ekgfx("prune", "first", "--flops", "0.8", *options, "--logits", "main", "-o", "second").code == 0
    assert ekgfx("eval", "second", "--json").code == 0
    namespace: dict = {}
    exec(HEADS, namespace)
    original = namespace["Heads"]()
    again = library.load(tmp_path / "second", original, torch.randn(2, 1, 8, 8))
    recorded = library.load(tmp_path / "second")
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again(x)["main"], recorded(x)["main"])
    assert len(library.Plan.of(again).kept["stem"]) == again.stem.out_channels < 16
