"""The hour of somebody who comes with a classifier, a checkpoint and a folder of images of their own: from looking at
what can be pruned to a smaller network, step by step, each with what it promises."""

import csv
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

import ekgfx as library
from ekgfx.errors import EkgfxError
from ekgfx.models.weights import load_weights
from ekgfx.runs.directory import read_manifest
from tests.models.test_weight_files import KINDS, STATE, equal
from tests.models.test_weight_files import Net as Odd
from tests.support import ROOT
from tests.support.commands import Done, typed_in

NETWORK = '''
from torch import nn


class Classifier(nn.Module):
    """A stem, two stages with a residual, a head."""

    def __init__(self, width=24):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(width, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(32, width, 3, padding=1), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.two(self.one(x))).relu()
        return self.head(x.mean((2, 3)))


def make():
    return Classifier()
'''


class Stranger:
    """Somebody in a folder with net.py, net.pth.tar, and images/ with labels.csv beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "net.py").write_text(NETWORK)
        digits = load_digits()
        (folder / "set" / "images").mkdir(parents=True)
        with (folder / "set" / "labels.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file", "label"])
            for number in range(600):
                pixels = (digits.images[number] * 15.9).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "set" / "images" / f"{number:04}.png")
                table.writerow([f"{number:04}.png", digits.target[number]])
        names: dict[str, Any] = {}
        exec(NETWORK, names)
        torch.manual_seed(0)
        self.network = names["make"]()
        data = library.data.load(self.data, classes=10, channels=1, image_size=8, mean=[0.0], std=[1.0])
        library.finetune(self.network, data, epochs=8, batch_size=32, lr=0.1, schedule="cosine", augment=False)
        self.accuracy = library_accuracy(self.network, data)
        state = {f"module.{name}": value for name, value in self.network.state_dict().items()}
        torch.save({"epoch": 8, "state_dict": state, "best_acc1": torch.tensor(0.9)}, folder / "net.pth.tar")

    @property
    def data(self) -> str:
        return f"folder:{self.folder / 'set'}"

    @property
    def model(self) -> list[str]:
        preprocessing = ["--mean", "0", "--std", "1"]
        return [f"{self.folder / 'net.py'}:make", "--weights", "net.pth.tar", "--input", "1x1x8x8", *preprocessing]


def library_accuracy(network: torch.nn.Module, data: Any) -> float:
    from ekgfx.training.evaluation import evaluate

    return evaluate(network, data.loader("test", 64)).accuracy or 0.0


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    return Stranger(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def typed(stranger: Stranger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Done]:
    """A command typed in the stranger's folder."""
    command = typed_in(stranger.folder, monkeypatch, capsys)

    def run(*arguments: object) -> Done:
        done = command(*arguments)
        assert "Traceback" not in done.err
        return done

    return run


@pytest.fixture
def pruned(stranger: Stranger, typed: Callable[..., Done]) -> Path:
    """The stranger's first run, made once."""
    path = stranger.folder / "runs" / "mine"
    if not path.exists():
        # the search of the paper in short, so that the bank has something to teach
        options = ["--data", stranger.data, "--flops", "60%", "--epochs", 2, "--batch-size", 32, "-o", "runs/mine"]
        done = typed("prune", *stranger.model, *options, "--accept", 4)
        assert done.code == 0, done.said
        (stranger.folder / "said.txt").write_text(done.said)
    return path


# 1. the quick start is a gain, and says what to do next


def test_the_quick_start_is_a_whole_job_with_a_gain_that_is_told(typed) -> None:
    told = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    assert told["export"]["onnx"] and told["search"]["align"] > 1 and told["model_kwargs"]["width"] >= 32
    done = typed("prune", "--recipe", "quickstart", "--dry-run")
    assert done.code == 0 and "budget: 45.0% of the MACs" in done.said
    assert "docs/quickstart.svg" in (ROOT / "README.md").read_text()


# 2. any checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_any_checkpoint_is_taken_and_it_is_said_which(kind: str, tmp_path: Path, caplog) -> None:
    torch.save(KINDS[kind][0], tmp_path / "net.pth.tar")
    model = Odd().eval()
    with caplog.at_level(logging.INFO, "ekgfx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_weights(model, tmp_path / "net.pth.tar")
    assert equal(model, STATE)
    assert KINDS[kind][1].split(";")[0] in caplog.text


# 3. and 4. preprocessing is said, folders are taken as they are, before is told as soon as it is known


def test_a_dry_run_looks_at_weights_and_data_and_says_how_images_come_in(stranger: Stranger, typed) -> None:
    done = typed("prune", *stranger.model, "--data", stranger.data, "--flops", "0.6", "--dry-run")
    assert done.code == 0, done.said
    assert "weights: file net.pth.tar" in done.said
    assert "images: 8×8" in done.said and "1 channel; mean 0" in done.said
    assert "data: 480 images to train on, 120 to test on; 10 classes" in done.said
    assert not (stranger.folder / "runs" / "dry").exists()


def test_a_dry_run_refuses_what_the_run_would(stranger: Stranger, typed) -> None:
    torch.save({"epoch": 3}, stranger.folder / "nothing.pth")
    model = [*stranger.model[:1], "--weights", "nothing.pth", "--input", "1x1x8x8"]
    done = typed("prune", *model, "--flops", "0.6", "--dry-run")
    assert done.code == 2 and "nothing.pth' hold no state dict" in done.said.splitlines()[-1]


def test_what_the_stranger_measures_is_what_is_told_before(stranger: Stranger, pruned: Path) -> None:
    before = read_manifest(pruned)["results"]["before"]["accuracy"]
    assert before == pytest.approx(stranger.accuracy)
    said = (stranger.folder / "said.txt").read_text()
    assert said.index("evaluate (before)") < said.index("\nsearch")
    assert "took 'state_dict', names after 'module.'" in said


def test_a_whole_disk_is_no_folder_of_images(stranger: Stranger, typed) -> None:
    done = typed("prune", *stranger.model, "--data", "folder:/", "--flops", "0.6", "--dry-run")
    assert done.code == 2 and done.said.splitlines()[-1].endswith("name the folder of images")


# 5. fine-tuning that can be trusted


def test_the_best_epoch_on_held_out_training_images_is_kept_and_all_are_in_a_table(
    stranger: Stranger, pruned: Path
) -> None:
    rows = list(csv.DictReader((pruned / "finetune.csv").open()))
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    said = (stranger.folder / "said.txt").read_text()
    (kept,) = re.findall(r"kept (?:epoch (\d) of 2 epochs|the network as it was before training)", said)
    accuracies = [float(row["val_accuracy"]) for row in rows]
    best = max((0, 1, 2), key=lambda number: (accuracies[number], -float(rows[number]["val_loss"])))
    assert int(kept or 0) == best
    assert "ETA" in said and "validation" in said


def test_a_typo_changes_nothing_of_a_run(pruned: Path, typed) -> None:
    before = (pruned / "run.json").read_bytes()
    assert typed("finetune", "runs/mine", "--data", "folder:nowhere", "--epochs", 1).code == 2
    assert typed("finetune", "runs/mine", "--val-fraction", "2", "--epochs", 1).code == 2
    assert (pruned / "run.json").read_bytes() == before


# 6. commands do what they look like


def test_runs_are_listed_evaluated_and_reported(stranger: Stranger, pruned: Path, typed) -> None:
    assert "mine" in typed("list").said
    done = typed("eval", "runs/mine")
    assert done.code == 0 and "accuracy" in done.said
    assert typed("report", "runs/mine").code == 0 and (pruned / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prune", "net.py:make"], "no budget"),
        (["prune", "net.py:made", "--flops", "0.5"], "made"),
        (["prune", "net.py:make", "--flops", "55"], "fraction to keep"),
        (["prune", "net.py:make", "--flops", "0.5", "--weights", "no.pth"], "no.pth"),
        (["prune", "net.py:make", "--flops", "0.5", "--tensorbord"], "--tensorboard"),
        (["groups", "timm:resnet5O"], "resnet5"),
    ],
)
def test_a_wrong_command_is_one_line_that_says_what_to_do(arguments: list[str], line: str, typed) -> None:
    done = typed(*arguments)
    assert done.code == 2 and line in done.said.splitlines()[-1]


# 7. Python that reads like the field's


def test_python_shows_what_it_has_and_takes_plain_loaders(stranger: Stranger) -> None:
    traced = library.trace(stranger.network, torch.zeros(2, 1, 8, 8))
    assert repr(traced).startswith("TracedModel(Classifier: 2 groups") and "<table>" in traced._repr_html_()
    plan = library.plan(traced, {"one": 0.5})
    assert traced.groups.widths(plan) == {"stem.0": 24, "one.0": 16}
    images = torch.from_numpy(load_digits().images[:128]).float()[:, None] / 16
    dataset = torch.utils.data.TensorDataset(images, torch.from_numpy(load_digits().target[:128]))
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)
    result = library.search(
        traced, loader, flops=0.6, ignore=torch.nn.Linear, strategy="uniform", importance="magnitude"
    )
    assert result.widths["one.0"][0] == 32 and "MACs kept" in repr(result)
    smaller = library.prune(stranger.network, result.plan, traced, calibrate=loader)
    bank = library.build_bank(traced, result, loader)
    history = library.finetune(smaller, loader, bank=bank, val=loader, epochs=1, lr=0.01)
    assert str(history).startswith("kept ")


def test_wrong_uses_are_one_line(stranger: Stranger) -> None:
    for wrong in (
        lambda: library.search(stranger.network, flops=0.5),
        lambda: library.trace(torch.zeros(1), torch.zeros(1)),
        lambda: library.plan(library.trace(stranger.network, torch.zeros(2, 1, 8, 8)), {"ome": 0.5}),
    ):
        with pytest.raises(EkgfxError) as caught:
            wrong()
        assert "\n" not in str(caught.value)


# 8. documents, and 10. continuous integration for whoever takes the project over


@pytest.mark.parametrize(
    "page",
    ["cli", "troubleshooting", "yolo", "detectors", "segmentation", "transformers", "lightning", "training-loop"],
)
def test_there_is_a_page_for_it(page: str) -> None:
    assert (ROOT / "docs" / f"{page}.md").is_file()
    assert page in (ROOT / "docs" / "index.md").read_text().split()


def test_a_workflow_runs_what_continuous_integration_runs() -> None:
    assert any(".ci/run" in file.read_text() for file in (ROOT / ".github" / "workflows").glob("*.yml"))
