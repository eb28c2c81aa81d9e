"""Commands do what they look like: the run that was named is the one that is taken, nothing of it changes before all is
known to be right, and a wrong command is answered at once."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ekgfx import data
from ekgfx.cli import cli
from ekgfx.models import digits_cnn
from ekgfx.pipeline.job import Silent
from ekgfx.pipeline.jobs import prune_job
from ekgfx.runs.directory import Run, read_manifest
from ekgfx.settings import recipe
from ekgfx.settings.recipe import Recipe
from tests.cli.conftest import environment

DIGITS = ("ekgfx.models:digits_cnn", "--weights", "none")
SETTINGS = {
    "model": "ekgfx.models:digits_cnn",
    "data": "digits",
    "search": {
        "strategy": "uniform",
        "importance": "magnitude",
        "params": 0.7,
        "train_per_class": 4,
        "val_per_class": 4,
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[float, str], Path]:
    """A run with its own budget, made once."""
    folder = tmp_path_factory.mktemp("made")

    def run(flops: float, name: str) -> Path:
        path = folder / name
        if not path.exists():
            asked = recipe.override(Recipe.from_json(SETTINGS), {"search.flops": flops})
            with Run.create(path, settings=asked.to_json()) as opened:
                prune_job(opened, Silent())
        return path

    return run


@pytest.fixture
def runs(made, tmp_path) -> tuple[Path, Path]:
    """Copies of two runs in `runs/`; the second is the newest."""
    for flops, name in ((0.6, "first"), (0.4, "second")):
        shutil.copytree(made(flops, name), tmp_path / "runs" / name)
    return tmp_path / "runs" / "first", tmp_path / "runs" / "second"


def content(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_export_takes_the_run_that_stands_behind_the_flag(runs, ekgfx, refused) -> None:
    first, second = runs
    before = content(second)
    done = ekgfx("export", "--onnx", "runs/first", "--no-latency")
    assert done.code == 0, done.err
    assert (first / "model.onnx").is_file() and content(second) == before
    assert "ends in .onnx, and a run has a run.json" in refused("export", "--onnx", "runs/frist", "--no-latency")
    assert "no such folder as nowhere" in refused("export", "--onnx", "nowhere/net.onnx", "--no-latency")
    assert content(second) == before
    done = ekgfx("export", "--no-latency")
    assert done.code == 0 and "run runs/second, the newest one\n" in done.err


def test_finetune_changes_nothing_before_all_is_right(runs, refused, tmp_path) -> None:
    """After every refusal the run is what it was, byte for byte."""
    run, _ = runs
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "train.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.arange(9) % 3)
    (tmp_path / "few").mkdir()
    shutil.copy(tmp_path / "train.npz", tmp_path / "few" / "a.npz")
    before = content(run)
    wrong = {
        ("--data", "digit"): "did you mean 'digits'?",
        ("--data", "folder:nowhere"): "no such folder: 'nowhere'",
        ("--data", "cifar10:empty"): "no cifar10 in",
        ("--data", "npz:few"): "has 3 classes, but the model has 10 outputs",
        ("--epochs", "0"): "no epochs to fine-tune for (0): give --epochs",
        ("--epochs", "-3"): "finetune.epochs -3: use at least 0",
        ("--lr", "-1"): "finetune.lr -1.0: use a learning rate above 0",
        ("--lr", "nan"): "finetune.lr in the command line must be a finite number",
        ("--batch-size", "0"): "finetune.batch_size 0: use at least 1",
        ("--teachers", "-1"): "finetune.teachers -1: use at least 0",
        ("--device", "cuda:77"): "device 'cuda:77' cannot be used",
    }
    for options, says in wrong.items():
        epochs = () if "--epochs" in options else ("--epochs", "1")
        assert says in refused("finetune", run, *epochs, *options)
        assert content(run) == before, options


def test_an_image_that_cannot_be_read_leaves_the_runs_own_data(runs, refused, ekgfx, tmp_path) -> None:
    """It is met long after the check, in the middle of the work."""
    run, _ = runs
    for number in range(60):
        place = tmp_path / "images" / f"{number % 10}_{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), number).save(place)
    file = Path(data.load(f"folder:{tmp_path}/images", classes=10, channels=1).split("test").source.files[-1])
    file.write_bytes(file.read_bytes()[:20])
    before = read_manifest(run)
    assert f"cannot read the image {file}" in refused("finetune", run, "--epochs", 1, "--data", "folder:images")
    assert all(read_manifest(run)[key] == before[key] for key in ("settings", "results", "status", "files"))
    assert ekgfx("eval", run).code == 0


def test_finetune_remembers_where_its_data_are(runs, ekgfx, tmp_path, monkeypatch) -> None:
    """Named from one folder, found from another."""
    run, _ = runs
    draw = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    np.savez(tmp_path / "mine" / "a.npz", images=draw.integers(0, 255, (80, 8, 8), np.uint8), labels=np.arange(80) % 10)
    done = ekgfx("finetune", "runs/first", "--data", "npz:mine", "--epochs", "1", "--knowledge", "none")
    assert done.code == 0, done.err
    assert read_manifest(run)["settings"]["data"] == f"npz:{tmp_path / 'mine'}"
    monkeypatch.chdir("/")
    assert ekgfx("eval", run).code == 0


def test_prune_a_run_keeps_its_data(runs, ekgfx, tmp_path) -> None:
    further = ("--flops", "0.8", "--search", "uniform", "--importance", "magnitude")
    done = ekgfx("prune", "runs/first", *further, "-o", "further")
    assert done.code == 0, done.err
    assert "note: data: digits, the run's; --data takes others" in done.err
    assert read_manifest(tmp_path / "further")["settings"]["data"] == "digits"
    assert "accuracy" in done.out
    done = ekgfx("prune", "runs/first", *further, "--dry-run")
    assert "search uniform on digits" in done.out


def test_a_run_says_itself_what_its_network_is(runs, refused) -> None:
    """What a run could not obey is refused, and not passed over."""
    budget = ("--flops", "0.8")
    for option in (("--classes", "4"), ("--input", "1x1x9x9"), ("--ema",), ("--model-kwargs", "width=3")):
        for command in (("eval", "runs/first"), ("groups", "runs/first"), ("prune", "runs/first", *budget)):
            said = refused(*command, *option)
            assert f"runs/first is a run, which says what its network is: leave {option[0]} out" in said
    assert "takes 1×1×8×8: leave --img-size and --in-chans out" in refused("eval", "runs/first", "--img-size", "16")
    assert "the run has one network, that of its own budget: leave flops=0.7 out" in refused(
        "export", "runs/first", "--flops", "0.7"
    )


def test_images_that_changed_under_a_run_are_told_of_and_taught_anew(ekgfx, tmp_path) -> None:
    """Rows of the memory bank belong to images by number: one file less, and they would be those of its neighbours."""
    draw = np.random.default_rng(0)
    for number in range(60):
        place = tmp_path / "images" / f"{number % 10}_{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (8, 8), np.uint8)).save(place)
    short = ("--search", "uniform", "--epochs", "1", "--batch-size", "16", "--no-augment")
    done = ekgfx("prune", *DIGITS, "--flops", "0.7", *short, "--data", "folder:images", "-o", "run")
    assert done.code == 0 and "have changed" not in done.err, done.err
    before = json.loads((tmp_path / "run" / "bank" / "bank.json").read_text())
    assert "have changed" not in ekgfx("finetune", "run", "--epochs", "2").err
    assert json.loads((tmp_path / "run" / "bank" / "bank.json").read_text()) == before
    (tmp_path / "images" / "3_3.png").unlink()
    done = ekgfx("finetune", "run", "--epochs", "1")
    assert done.code == 0
    sizes = [data.load(f"folder:{tmp_path}/images").size(split) for split in data.SPLITS]
    (counts,) = re.findall(r"have changed since this run began: (.*?);", " ".join(done.err.split()))
    assert counts == f"then 48 and 12 to train and to test on, now {sizes[0]} and {sizes[1]}" and sum(sizes) == 59
    assert json.loads((tmp_path / "run" / "bank" / "bank.json").read_text()) != before
    assert "have changed" not in ekgfx("finetune", "run", "--epochs", "1").err


def test_a_run_with_another_kind_of_content_is_one_line(runs, refused) -> None:
    for number, change in enumerate(({"settings": []}, {"results": {"before": {"accuracy": "x"}}}, {"results": [1]})):
        file = runs[0] / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        for command in ("eval", "report", "compare", "groups", "export", "finetune"):
            said = refused(command, runs[0], *(("--epochs", "1") if command == "finetune" else ()))
            assert "runs/first/run.json" in said, (number, command)
        shutil.rmtree(runs[0])
        shutil.copytree(runs[1], runs[0])


def test_groups_takes_weights_and_says_whether_they_fit(ekgfx, refused, tmp_path) -> None:
    torch.save(digits_cnn().state_dict(), tmp_path / "net.pth")
    torch.save(digits_cnn(num_classes=5).state_dict(), tmp_path / "five.pth")
    plain, given = (ekgfx("groups", "ekgfx.models:digits_cnn", *more) for more in ((), ("--weights", "net.pth")))
    assert given.code == 0 and given.out == plain.out
    assert "--classes 5 makes it fit" in refused("groups", "ekgfx.models:digits_cnn", "--weights", "five.pth")


def test_runs_beside_each_other(runs, ekgfx, refused, tmp_path) -> None:
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text("{")
    done = ekgfx("list")
    assert done.code == 0, done.err
    shown = " ".join(done.out.split())
    assert "runs/broken cannot be read: runs/broken/run.json is damaged" in shown
    assert shown.index("runs/first") < shown.index("runs/second")
    told = json.loads(ekgfx("list", "--json").out)
    assert told[1]["budget"] == "60% MACs, 70% parameters"
    assert [Path(run["run"]).name for run in told] == ["broken", "first", "second"]
    assert "no run in nowhere/" in refused("list", "nowhere")

    results = read_manifest(runs[1])["results"]
    done = ekgfx("compare", *runs, "-o", "both.png")
    assert done.code == 0, done.err
    assert f"{100 * results['searched']['accuracy']:.2f}%" in done.out
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert ekgfx("compare", *runs).code == 0 and "<svg" in (tmp_path / "compare.svg").read_text()
    assert "a chart's name ends in" in refused("compare", *runs, "-o", "both.txt")
    assert "run.json is damaged" in refused("compare", "runs/broken")


def test_a_run_that_nobody_works_on_any_more_is_interrupted(runs, ekgfx) -> None:
    """What a kill leaves says that it is running, which the lock knows better."""
    file = runs[0] / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "running"}))
    before = content(runs[0])
    assert [run["status"] for run in json.loads(ekgfx("list", "--json").out)] == ["interrupted", "done"]
    assert content(runs[0]) == before
    with Run.reopen(runs[0]):
        assert [run["status"] for run in json.loads(ekgfx("list", "--json").out)] == ["running", "done"]


def test_no_summary_is_cut(ekgfx) -> None:
    shown = " ".join(ekgfx("-h").out.split())
    for name, command in cli.commands.items():
        first = " ".join(command.help.split("\n\n")[0].split())
        assert f" {name} {first}" in shown


WRONG = [
    "grops",
    "prune",
    "prune resnet50 --flops 0.5",
    "prune timm:resnt50 --flops 0.5",
    "prune timm:resnet50",
    "prune timm:resnet50 --flops 55",
    "prune timm:resnet50 --flops 5X",
    "prune timm:resnet50 --flops 0.5 --data digit",
    "prune timm:resnet50 --flops 0.5 --data folder:nowhere",
    "prune timm:resnet50 --flops 0.5 --weights gone.pth",
    "prune nowhere/net.py:net --flops 0.5",
    "prune net.py:nte --flops 0.5",
    "prune no_such_package:net --flops 0.5",
    "prune timm:resnet50 --latency 0.6",
    "prune timm:resnet50 --latency 0.6 --latency-table gone.json",
    "prune timm:resnet50 --flops 0.5 --input 1x3x",
    "prune timm:resnet50 --flops 0.5 --data digits:x",
    "prune last.ckpt --flops 0.5",
    "eval timm:resnet50 --data digits --input 1,3,32,32",
    "repair nowhere",
    "prune --recipe quickstrat",
    "prune --resume nowhere",
    "prune --resume nowhere --flops 0.5",
    "finetune nowhere --epochs 1",
    "eval timm:resnt50 --data digits",
    "eval timm:resnet50 --data folder:nowhere",
    "landscape timm:resnet50 --weights gone.pth",
    "groups net.py:nte",
    "groups timm:resnt50",
    "export nowhere",
    "export --onnx nowhere",
    "report nowhere",
    "list nowhere",
    "compare nowhere",
]


def test_a_wrong_command_is_answered_before_torch_is_imported(tmp_path) -> None:
    """All of them together take less than torch alone."""
    (tmp_path / "net.py").write_text("import torch\n\ndef net():\n    return torch.nn.Linear(2, 2)\n")
    code = (
        "import sys\n"
        "from ekgfx.cli import main\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    try: main(line.split())\n"
        "    except SystemExit as end: assert end.code == 2, line\n"
        "    slow = {'torch', 'timm', 'onnx', 'matplotlib', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "    assert not slow, (line, slow)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(WRONG),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == len(WRONG) and all(line.startswith("ekgfx: ") for line in said)
    assert "did you mean net?" in said[WRONG.index("groups net.py:nte")]


OPTIONS = {
    "prune ekgfx.models:digits_cnn --data digits --dry-run": [
        "flops",
        "params",
        "latency",
        "target",
        "latency-table",
        "data",
        "weights",
        "input",
        "classes",
        "search",
        "accept",
        "align",
        "cache",
        "epochs",
        "device",
        "seed",
        "ignore",
        "leaf",
        "recipe",
    ],
    "eval ekgfx.models:digits_cnn --data digits": ["weights", "input", "classes", "device", "batch-size", "data"],
    "groups ekgfx.models:digits_cnn": ["weights", "input", "classes", "leaf"],
}
ODD = [
    "",
    " ",
    "-1",
    "0",
    "0.5",
    "1e400",
    "nan",
    "9" * 400,
    "5M",
    "2.0G",
    "8ms",
    "1x1x8x8",
    "1x3x8x8",
    "0x0",
    "cuda:999",
]
ODD += ["..", "/", "/dev/null", "auto", "none", "é", "%s", "a:b", "*", "[", "x" * 3000]
ODD += ["folder:", "npz:/dev", "timm:", "timm:@"]
BUDGETS = ("flops", "params", "latency")


def test_odd_values_of_options_are_taken_or_refused_in_one_line(ekgfx, tmp_path) -> None:
    """Drawn from a seed; a traceback would pass through."""
    draw = random.Random(5)
    for number in range(60):
        command = draw.choice(list(OPTIONS))
        name, value = draw.choice(OPTIONS[command]), draw.choice(ODD)
        budget = (
            ("--flops", "0.6") if command.startswith("prune") and name not in ("flops", "params", "latency") else ()
        )
        done = ekgfx(*command.split(), *budget, f"--{name}", value)
        last = done.err.splitlines()[-1] if done.err else ""
        assert done.code == 0 or (done.code == 2 and last.startswith("ekgfx: ")), (number, command, name, value, done)
        assert len(last) < 1500, (number, command, name)
        assert not list(tmp_path.glob("runs/*"))


def test_a_terminal_that_cannot_show_a_character_shows_another(runs, tmp_path) -> None:
    """Tables have arrows and lines, whatever the locale."""
    strange = environment() | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, "-m", "ekgfx", "list"]
    done = subprocess.run(command, cwd=tmp_path, env=strange, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "runs/first" in done.stdout and " ? " in done.stdout
