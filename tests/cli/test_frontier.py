"""One run of several budgets: the network of each is that of a run of its own, whatever interrupts it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ekgfx as library
from ekgfx.base.files import read_lines
from ekgfx.cli.summary import show
from ekgfx.errors import BudgetError
from ekgfx.pipeline.frontier import Frontier, Network, bend, wilson
from ekgfx.runs.directory import read_manifest
from tests.cli.conftest import TINY
from tests.cli.test_main_job import pruning
from tests.support import processes

BOTH = TINY.replace("flops: 0.7", "flops: [0.7, 0.9]").replace("teachers: 2}", "teachers: 2, budgets: 0.9}")
LOOSE = "budgets/flops=0.9"


def made(folder: Path, name: str, recipe: str) -> Path:
    (folder / f"{name}.yaml").write_text(recipe)
    process = processes.start(pruning, "--recipe", str(folder / f"{name}.yaml"), "-o", str(folder / name))
    process.join()
    assert process.exitcode == 0
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("frontier")


@pytest.fixture(scope="module")
def both(folder) -> Path:
    """A run of two budgets, of which the looser one is fine-tuned."""
    return made(folder, "both", BOTH)


def same(one: Path, other: Path, **budget: float) -> None:
    ours, theirs = library.load(one, **budget).state_dict(), library.load(other).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_each_network_is_that_of_a_run_of_its_own(folder, both):
    """The looser one, which was trained, is the one that a run to its budget alone makes, to the bit; the tightest was
    not to be trained, and is the run's own."""
    alone = made(folder, "alone", TINY.replace("flops: 0.7", "flops: 0.9"))
    same(both, alone, flops=0.9)
    same(both / LOOSE, alone)
    same(both, both, flops=0.7)
    found, wanted = read_manifest(both / LOOSE), read_manifest(alone)
    assert (found["status"], found["results"]) == ("done", wanted["results"])
    plans = [json.loads((run / "plan.json").read_text())["kept"] for run in (both / LOOSE, alone)]
    assert plans[0] == plans[1]
    assert list(read_manifest(both)["results"]) == ["before", "searched", "repaired"]
    assert not (both / LOOSE / "dense.safetensors").exists()
    with pytest.raises(BudgetError, match="no budget flops=0.8 was asked for; there is flops=0.9; flops=0.7"):
        library.load(both, flops=0.8)
    with pytest.raises(BudgetError, match="the run has one network, that of its own budget: leave "):
        library.load(alone, flops=0.9)


def test_they_stand_side_by_side(both, capsys):
    found = Frontier.of(both)
    assert found is not None
    assert [network.label for network in found.networks] == ["unpruned", "flops=0.9", "flops=0.7"]
    assert [network.finetuned for network in found.networks] == [False, True, False]
    results = [read_manifest(both)["results"]["before"]]
    results += [read_manifest(both / LOOSE)["results"]["finetuned"], read_manifest(both)["results"]["repaired"]]
    for network, score in zip(found.networks, results, strict=True):
        assert (network.macs, network.params, network.quality) == (score["macs"], score["params"], score["accuracy"])
        assert network.interval == pytest.approx(wilson(score["accuracy"], found.samples))
        assert network.milliseconds is not None
        assert network.milliseconds > 0
    show(both)
    said = capsys.readouterr().out
    assert all(network.label in said for network in found.networks)
    assert f"ekgfx export {both} --flops 0.9" in said


MOMENTS: list[Callable[[Path], bool]] = [
    lambda run: (run / "plan.json").exists(),
    lambda run: (run / LOOSE / "finetune.safetensors").exists(),
    lambda run: (run / "model.safetensors").exists(),
]


def test_killed_anywhere_it_ends_the_same(both, tmp_path):
    (tmp_path / "both.yaml").write_text(BOTH)
    run = tmp_path / "run"
    for _ in processes.killed_and_resumed(pruning, run, ("--recipe", tmp_path / "both.yaml", "-o", run), MOMENTS):
        pass
    same(run, both)
    same(run / LOOSE, both / LOOSE)
    for one in ("plan.json", f"{LOOSE}/plan.json"):
        ours, theirs = (json.loads((each / one).read_text()) for each in (run, both))
        assert ours["kept"] == theirs["kept"]
    again, whole = Frontier.of(run), Frontier.of(both)
    assert again is not None
    assert whole is not None
    assert [network.quality for network in again.networks] == [network.quality for network in whole.networks]


def test_one_is_exported_and_trained_further(both, ekgfx, refused):
    assert ekgfx("export", both, "--flops", "90%", "--no-latency").code == 0
    assert (both / LOOSE / "model.onnx").exists()
    assert not (both / "model.onnx").exists()
    before = library.load(both).state_dict()
    assert ekgfx("finetune", both, "--flops", 0.9, "--epochs", 2).code == 0
    assert len(read_lines(both / LOOSE / "finetune.jsonl")) == 2
    found = Frontier.of(both)
    assert found is not None
    assert found.networks[1].quality == read_manifest(both / LOOSE)["results"]["finetuned"]["accuracy"]
    after = library.load(both).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "no budget flops=0.5 was asked for" in refused("export", both, "--flops", 0.5)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--flops", "0.9,0.7", "--finetune", "0.8"],
            "no budget flops=0.8 was asked for; there is flops=0.9; flops=0.7",
        ),
        (["--flops", "0.9", "--finetune", "0.9"], "finetune.budgets chooses among the networks of several budgets"),
        (["--flops", "0.9,0.7", "--params", "0.9,0.7"], "flops and params each name several budgets"),
        (["--flops", "0.9,5M"], "flops 0.9, 5M: give several fractions or several amounts"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(refused, flags, says):
    assert says in refused("prune", "ekgfx.models:digits_cnn", "--data", "digits", *flags)


def test_the_interval_of_a_share():
    """By hand for 8 of 10: (0.8 + 0.19207 ∓ 1.96·√(0.016 + 0.0096036)) / 1.38415 with 1.96² = 3.8416."""
    low, high = wilson(0.8, 10)
    assert (low, high) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert wilson(1.0, 50)[1] == 1.0
    assert wilson(0.0, 50)[0] == 0.0


def curve(*points: tuple[int, float], width: float = 0.01) -> list[Network]:
    return [Network("", x, 0, y, (y - width / 2, y + width / 2), None, False) for x, y in points]


def test_the_knee():
    """Above the line between the ends by 0.19, 0.45 and 0.3 of the whole height; none on a straight line."""
    assert bend(curve((100, 0.9), (80, 0.89), (60, 0.85), (40, 0.6), (20, 0.4))) == 2
    assert bend(curve((100, 0.9), (60, 0.7), (20, 0.5))) is None
    assert bend(curve((100, 0.9), (60, 0.6), (20, 0.5))) is None  # it sags
    assert bend(curve((100, 0.9), (60, 0.899), (20, 0.895))) is None  # it does not fall
    assert bend(curve((100, 0.9), (20, 0.5))) is None
    unknown = Network("", 50, 0, None, None, None, False)
    assert bend([unknown] * 4) is None
