"""Bad input gets one line that says what was wrong, the value and what to do; exit code 2; never a traceback."""

import errno
import os
import shutil
import tempfile
import textwrap

import pytest
import torch
from PIL import Image

NETS = """
import torch
from torch import nn

def fixed():
    "A classifier between the input and the output: nothing is free."
    return nn.Linear(4, 3), (torch.randn(2, 4),)

def five():
    from ekgfx.models import digits_cnn
    return digits_cnn(num_classes=5)

def not_a_number():
    from ekgfx.models import digits_cnn
    net = digits_cnn()
    net.classifier.weight.data[0] = float("nan")
    return net

def raises():
    raise ValueError("no such luck")

def wants_two():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(10))
        def forward(self, x):
            if len(x) > 2:
                raise KeyError("wide")
            return x.mean((1, 2, 3))[:, None] * self.scale
    return Net(), (torch.randn(2, 1, 8, 8),)

def data_dependent():
    class Net(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x
    return Net(), (torch.randn(2, 4),)
"""


@pytest.fixture(autouse=True)
def nets(tmp_path):
    (tmp_path / "nets.py").write_text(textwrap.dedent(NETS))


DIGITS = ("ekgfx.models:digits_cnn", "--data", "digits")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["groups", "timm:resnet1800"], "timm has no model 'resnet1800': did you mean timm:resnet18"),
        (["groups", "resnet18"], "unknown model 'resnet18': did you mean 'timm:resnet18'?"),
        (["groups", "nets.py:nothing"], "no factory 'nothing' in"),
        (["groups", "nets.py:raises"], "failed: ValueError: no such luck"),
        (["groups", "nets.py:data_dependent"], "Net could not be traced"),
        (["groups", "nets.py"], "names no factory"),
        (["groups"], "Missing argument 'MODEL'"),
        (["prune"], "nothing to prune: name a MODEL"),
        (["prune", *DIGITS], "no budget: give --flops, --params or --latency"),
        (["prune", *DIGITS, "--flops", "55"], "flops is the fraction to keep, between 0 and 1"),
        (
            ["prune", *DIGITS, "--flops", "half"],
            "'half' is no fraction and no amount; write what is kept as 0.55",
        ),
        (
            ["prune", *DIGITS, "--flops", "9G"],
            "a budget of 9G asks for nothing: the model has 471 k of MACs; give less",
        ),
        (["prune", *DIGITS, "--params", "5x"], "'5x' is no fraction and no amount"),
        (["prune", *DIGITS, "--latency", "0.5"], "a latency budget needs the place that it holds for: give --target"),
        (["prune", *DIGITS, "--latency", "0.5", "--target", "npu"], "unknown target 'npu'"),
        (
            ["prune", *DIGITS, "--latency", "0.5", "--latency-table", "gone.json"],
            "cannot read the latency table",
        ),
        (["prune", *DIGITS, "--flops", "0.5", "--align", "wide"], "search.align in the command line must be"),
        (["prune", *DIGITS, "--flops", "0.0001"], "cannot keep only 0.0% of the MACs: with every group at its least"),
        (["prune", *DIGITS, "--flops", "0.5", "--ignore", "steam*"], "'steam*' matches no prunable group"),
        (["prune", *DIGITS, "--flops", "0.5", "--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["prune", *DIGITS, "--flops", "0.5", "--weights", "gone.safetensors"], "gone.safetensors': no such file"),
        (["prune", "ekgfx.models:digits_cnn", "--flops", "0.5", "--data", "digit"], "did you mean 'digits'?"),
        (
            ["prune", "nets.py:fixed", "--flops", "0.5", "--search", "uniform", "--importance", "magnitude"],
            "nothing can",
        ),
        (
            ["prune", "nets.py:five", "--flops", "0.5", "--data", "digits"],
            "has 10 classes, but the model has 5 outputs",
        ),
        (
            ["prune", "nets.py:not_a_number", "--flops", "0.5", "--data", "digits"],
            "the loss on digits is nan: check the weights",
        ),
        (["prune", "--recipe", "quickstrat"], "no recipe 'quickstrat'; did you mean quickstart?"),
        (["prune", "--resume", "nowhere"], "no run at nowhere"),
        (["finetune", "nowhere", "--epochs", "1"], "no run at nowhere"),
        (["eval", "ekgfx.models:digits_cnn"], "nothing to judge ekgfx.models:digits_cnn on: give --data"),
        (["eval", "ekgfx.models:digits_cnn", "--data", "folder:nowhere"], "no such folder: 'nowhere'"),
        (["export"], "no run under runs/"),
        (["export", "nowhere", "--batch", "1,x"], "'1,x': use whole numbers with commas"),
        (["recipes", "nothing"], "no recipe 'nothing'"),
        (
            ["eval", *DIGITS[:1], "--data", "digits:x"],
            "digits comes with scikit-learn, and from no folder; write digits",
        ),
        (
            ["landscape", *DIGITS, "--loss", "nets.py:raises"],
            "--loss raises takes (), and is called with (output, labels",
        ),
        (["landscape", *DIGITS, "--span", "0"], "Invalid value for '--span': 0.0 is not in the range x>0"),
        (["landscape", *DIGITS, "--tolerance", "-1"], "Invalid value for '--tolerance': -1.0 is not in the range x>0"),
        (["groups", *DIGITS[:1], "--svg", ""], "cannot write '.': it names no file"),
        (["grops"], "no command 'grops': did you mean groups? (see ekgfx --help)"),
        (["quantize"], "no command 'quantize': use compare, eval, export, "),
        (["report", "--browser"], "No such option '--browser' (see ekgfx report --help)"),
        (["eval", *DIGITS, "--input", "1x3x8x8"], "DigitsCNN does not run on the example inputs: "),
        (["landscape", *DIGITS, "--input", "1x3x8x8"], "DigitsCNN does not run on the example inputs: "),
        (["groups", *DIGITS, "--input", "1x3x8x8", "--sensitivity"], "DigitsCNN does not run on the example inputs: "),
        (["eval", *DIGITS, "--input", "4x8x8"], "the model takes 4x8x8, not images (N×C×H×W)"),
        (["eval", *DIGITS, "--weights", "https://x.org/net.pth"], "are not fetched: download the file, and name it"),
    ],
)
def test_one_line_and_nothing_left_behind(refused, tmp_path, arguments, says):
    assert says in refused(*arguments)
    assert not list(tmp_path.glob("runs/*"))


def test_a_real_process_prints_no_traceback(ekgfx_process):
    done = ekgfx_process("prune", "timm:resnet1800", "--flops", "0.55")
    assert done.code == 2
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert done.err.startswith("ekgfx: timm has no model")


def test_what_nobody_foresaw_is_one_line_and_a_file(ekgfx, tmp_path, monkeypatch):
    """Of a user's forward that fails on larger batches: where, what, and the traceback for whoever mends it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = ekgfx("eval", "nets.py:wants_two", "--data", "digits")
    line = done.err.splitlines()[-1]
    assert done.code == 1 and "Traceback" not in done.said
    place = next(number for number, text in enumerate(NETS.splitlines(), 1) if "wide" in text)
    assert line.startswith(f"ekgfx: KeyError: 'wide' (at {tmp_path}/nets.py:{place}), which ekgfx did not expect")
    (file,) = tmp_path.glob("ekgfx-*.txt")
    assert str(file) in line and "Traceback" in file.read_text() and 'raise KeyError("wide")' in file.read_text()
    done = ekgfx("prune", "nets.py:wants_two", "--data", "digits", "--flops", 0.5, "-o", "run")
    assert done.code in (1, 2) and "Traceback" not in done.said


def test_an_unreadable_image_is_named(refused, tmp_path):
    torch.manual_seed(0)
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), number * 20).save(tmp_path / "images" / label / f"{number}.png")
    good = (tmp_path / "images" / "a" / "2.png").read_bytes()
    for broken in (tmp_path / "images").glob("*/*.png"):
        broken.write_bytes(good[: len(good) // 2])
    line = refused("eval", "timm:resnet18", "--weights", "none", "--classes", 2, "--data", "folder:images")
    assert "cannot read the image" in line
    assert ".png" in line


def test_no_space_left(refused, tiny, tmp_path, monkeypatch):
    """The disk fills up when the search's first step is written; what was written before stays whole."""
    fsync = os.fsync

    def full_after_history_begins(descriptor: int) -> None:
        if "history.jsonl" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_history_begins)
    line = refused("prune", "--recipe", tiny, "-o", "run")
    assert "history.jsonl: No space left on device; free some space, then start again or go on with --resume" in line


def test_unreachable_hub_is_one_line(ekgfx, tmp_path):
    """Random weights instead, loudly: in the terminal and in the run's record."""
    arguments = ("--search", "uniform", "--importance", "magnitude", "--flops", "0.7", "-o", "run")
    done = ekgfx("prune", "timm:test_resnet", *arguments)
    assert done.code == 0, done.err
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "going on with RANDOM weights" in warnings[0]
    assert '"weights": "random (hub unreachable' in (tmp_path / "run" / "run.json").read_text()


def test_two_processes_cannot_share_a_run(refused, tmp_path):
    from ekgfx.runs.directory import Run

    with Run.create(tmp_path / "run"):
        assert "another process is using the run" in refused("prune", "--resume", "run")
    shutil.rmtree(tmp_path / "run")
