"""Checkpoints as people have them: each kind gives the network's own weights and says which, or is refused in one line
that says what to type; what a file names is never imported, never called."""

import argparse
import collections
import datetime
import functools
import logging
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ekgfx.cli import cli
from ekgfx.errors import ModelError
from ekgfx.models import digits_cnn
from ekgfx.models.weights import load_weights


class Net(nn.Module):
    """With everything that a state dict can hold, and a buffer that it leaves out."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.act = nn.functional.relu
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.head = nn.Linear(4, classes)
        self.register_buffer("mask", torch.randn(4, 1, 1))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.act(self.stem(x)) * self.scale + self.mask).mean((2, 3)))


def made(seed: int, classes: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net(classes).eval()


OWN, AVERAGE = made(1), made(2)
STATE, OTHER = OWN.state_dict(), AVERAGE.state_dict()


TOP = "took the file's top, names after 'module.'"


def under(prefix: str, state: dict[str, Any] = STATE) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in state.items()}


KINDS: dict[str, tuple[Any, str]] = {
    "the state dict itself": (STATE, ""),
    "of torch.compile": (under("_orig_mod."), ""),
    "of DataParallel": (under("module."), TOP),
    "of torch.compile in DataParallel": (under("module._orig_mod."), TOP),
    "of checkpointed blocks": (
        {n.replace("stem.0", "stem.0._checkpoint_wrapped_module"): t for n, t in STATE.items()},
        "",
    ),
    "a training script's": ({"epoch": 3, "best": torch.tensor(61.0), "state_dict": STATE}, "took 'state_dict'"),
    "a tutorial's": ({"model_state_dict": STATE, "loss": 0.4, "optimizer_state_dict": {}}, "took 'model_state_dict'"),
    "net": ({"net": STATE, "acc": np.float64(61.0)}, "took 'net'; objects of numpy"),
    "Lightning's": (
        {
            "state_dict": under("model.") | {"criterion.weight": torch.ones(3)},
            "hyper_parameters": {"folder": Path("/data"), "since": datetime.date(2026, 1, 1)},
            "callbacks": {"best": {"score": torch.tensor(0.5)}},
            "optimizer_states": [torch.optim.SGD(OWN.parameters(), 0.1, momentum=0.9).state_dict()],
        },
        "took 'state_dict', names after 'model.'; left 1 other out: criterion.weight; objects of datetime.date, ",
    ),
    "another name in Lightning": (
        {"state_dict": under("classifier._orig_mod.")},
        "took 'state_dict', names after 'classifier.'",
    ),
    "timm's": (
        {"state_dict": STATE, "state_dict_ema": OTHER, "args": argparse.Namespace(lr=0.1)},
        "took 'state_dict'; 'state_dict_ema' fits too (--ema); objects of argparse.Namespace were not read",
    ),
    "two under one key": (
        {"state_dict": under("ema_model.module.", OTHER) | under("net.")},
        "took 'state_dict', names after 'net.'; 'state_dict', names after 'ema_model.module.' fits too (--ema)",
    ),
    "student and teacher": (
        {"state_dict": under("student.") | under("teacher.", OTHER)},
        "took 'state_dict', names after 'student.'; 'state_dict', names after 'teacher.' fits too; left ",
    ),
    "an average alone": ({"ema": STATE}, "took 'ema'"),
    "swa_utils": (AveragedModel(OWN).state_dict(), f"{TOP}; left 1 other out: n_averaged"),
    "parameters and buffers": ({"model": dict(OWN.named_parameters()) | dict(OWN.named_buffers())}, "took 'model'"),
    "profiled by thop": (STATE | {"total_ops": torch.zeros(1), "stem.0.total_params": torch.zeros(1)}, ""),
    "deep inside": ({"a": {"b": {"weights": under("module.")}}}, "took 'a.b.weights', names after 'module.'"),
    "odd company": (
        {
            "model": STATE,
            "lists": collections.defaultdict(list, {"a": [1]}),
            "call": functools.partial(int, base=2),
            "set": {Path("/a"), Path("/b")},
            "deque": collections.deque([1, 2]),
            "array": np.arange(3),
        },
        "took 'model'; objects of functools.partial, numpy",
    ),
    "a whole model": (OWN, f"objects of {Net.__module__}.Net were not read"),
    "a whole model in DataParallel": (nn.DataParallel(OWN), f"{TOP}; objects of "),
    "whole models": ({"model": OWN, "ema": AVERAGE}, "took 'model'; 'ema' fits too (--ema)"),
}
NAMES = ["net.pth", "net.pt", "net.pth.tar", "net.ckpt", "net.bin", "net"]


def equal(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_its_networks_weights_and_says_which(kind, tmp_path, caplog, monkeypatch) -> None:
    """Under any name, and with none of the file's classes at hand."""
    content, said = KINDS[kind]
    file = tmp_path / random.Random(kind).choice(NAMES)
    torch.save(content, file)
    other = made(7)
    monkeypatch.delattr(sys.modules[__name__], "Net")  # nobody needs it
    with caplog.at_level(logging.INFO, "ekgfx"):
        told = load_weights(other, file)
    assert equal(other, STATE)
    assert told.startswith(said) and bool(told) == bool(said)
    assert [record.getMessage() for record in caplog.records] == ([f"weights {file.name}: {told}"] if told else [])


@pytest.mark.parametrize("kind", [kind for kind, (content, _) in KINDS.items() if "whole" not in kind])
def test_the_old_form_of_torch_save_gives_the_same(kind, tmp_path) -> None:
    torch.save(KINDS[kind][0], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    other = made(7)
    assert load_weights(other, tmp_path / "old.pth").startswith(KINDS[kind][1])
    assert equal(other, STATE)


@pytest.mark.parametrize("kind", ["timm's", "two under one key", "whole models"])
def test_ema_takes_the_average(kind, tmp_path) -> None:
    torch.save(KINDS[kind][0], tmp_path / "net.pth")
    other = made(7)
    load_weights(other, tmp_path / "net.pth", ema=True)
    assert equal(other, OTHER)
    torch.save({"model": STATE}, tmp_path / "net.pth")
    with pytest.raises(ModelError, match=r"hold no moving average \(EMA\), but 'model'; leave --ema out$"):
        load_weights(other, tmp_path / "net.pth", ema=True)


def test_a_wrapped_model_takes_plain_weights(tmp_path) -> None:
    """The user's factory compiles or wraps; the file's names come from before that, or from another wrapping."""
    for number, wrap in enumerate((nn.DataParallel, torch.compile, lambda net: torch.compile(nn.DataParallel(net)))):
        for content in (STATE, under("module."), {"state_dict": under("model.")}):
            torch.save(content, tmp_path / f"{number}.pth")
            inner = made(7)
            load_weights(wrap(inner), tmp_path / f"{number}.pth")
            assert equal(inner, STATE)


def test_safetensors_and_npz_have_prefixes_too(tmp_path) -> None:
    save_file(under("model."), tmp_path / "net.safetensors")
    np.savez(tmp_path / "net.npz", **{name: tensor.numpy() for name, tensor in under("module.").items()})
    for file in tmp_path.iterdir():
        other = made(7)
        load_weights(other, file)
        assert equal(other, STATE)


def part_of(*gone: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in STATE.items() if not name.startswith(gone)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"state_dict": under("module.", made(3, 7).state_dict())},
            r"2 of another shape: head.weight is \(7, 4\), the model's \(3, 4\), head.bias is \(7,\), the model's "
            r"\(3,\); 9 of the model's 11 tensors fit under 'state_dict', names after 'module.'; the file is of "
            r"7 outputs, the model of 3: --classes 7 makes it fit$",
        ),
        (
            part_of("head", "mask"),
            r"3 missing: mask, head.weight, head.bias; 8 of the model's 11 tensors fit; give the MODEL that it was "
            r"saved from, or, to go on with those that fit, load them in a factory of your own",
        ),
        (STATE | {"neck.weight": torch.zeros(1)}, "1 unknown: neck.weight; 11 of the model's 11 tensors fit"),
        (
            {"model": {"a.b": torch.zeros(1)}},
            r"10 missing: .*0 of the model's 11 tensors fit under 'model'; it is of another",
        ),
    ],
)
def test_a_partial_match_says_how_many_which_and_what_to_do(content, message, tmp_path) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(ModelError, match="are not those of this Net: " + message):
        load_weights(made(7), tmp_path / "net.pth")


def scripted(file: Path) -> None:
    torch.jit.trace(OWN, torch.zeros(1, 1, 8, 8)).save(file)


def exported(file: Path) -> None:
    torch.export.save(torch.export.export(OWN, (torch.zeros(1, 1, 8, 8),)), file)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "TorchScript": (scripted, r'are TorchScript.*type: python -c ".*jit.load\(.*", then --weights .*net-weights.pth$'),
    "torch.export": (exported, r'archive of another kind.*type: python -c ".*export.load\(.*", then --weights '),
    "pickle": (
        lambda file: file.write_bytes(pickle.dumps(STATE, 2)),
        "by torch.save, but by pickle; where",
    ),
    "protocol": (
        lambda file: torch.save(STATE, file, pickle_protocol=4),
        "with protocol 4, torch reads 2; where",
    ),
    "old whole model": (
        lambda file: torch.save(OWN, file, _use_new_zipfile_serialization=False),
        r"hold more than tensors, which is refused: .*; where the file was made, do torch.save\(model.state_dict\(\)",
    ),
    "nothing": (
        lambda file: torch.save({"a": [1]}, file),
        r"hold no state dict \(a mapping of names to tensors\); where",
    ),
    "empty": (lambda file: file.touch(), "are no weights that are known by their content: use auto, none, or a file"),
    "Git LFS": (
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "only Git LFS's note of them: type git lfs pull",
    ),
    "page": (lambda file: file.write_text("\n<!DOCTYPE html>"), "are a web page: download the file itself"),
    "Keras": (lambda file: file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "are Keras's .HDF5., which is not read"),
    "folder": (
        lambda file: (file.mkdir(), (file / "model.safetensors").touch()),
        "name the file in it: .*model.safetensors",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_says_what_to_type(kind, tmp_path) -> None:
    write, message = REFUSED[kind]
    file = tmp_path / "net.pth"
    write(file)
    with pytest.raises(ModelError, match=message) as caught:
        load_weights(made(7), file)
    said = str(caught.value)
    assert "\n" not in said and "\x1b" not in said and "Weights only load failed" not in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["TorchScript", "torch.export"])
def test_the_advice_converts(kind, tmp_path, monkeypatch) -> None:
    REFUSED[kind][0](tmp_path / "net.pth")
    with pytest.raises(ModelError) as caught:
        load_weights(made(7), tmp_path / "net.pth")
    program = str(caught.value).split('python -c "')[1].split('"')[0]
    exec(program)  # what the user is told to type
    other = made(7)
    load_weights(other, tmp_path / "net-weights.pth")
    assert equal(other, STATE)


class Armed:
    """Calls what it was made with where it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


ran: list[object] = []


def run() -> None:
    ran.append(1)


@pytest.mark.parametrize("function", [eval, exec, __import__, ran.append, run], ids=lambda function: function.__name__)
def test_what_a_checkpoint_would_call_is_not_called(function, tmp_path) -> None:
    """Beside weights that fit: built-in functions are refused, others are passed over."""
    arguments = () if function is run else ("tests.models.test_weight_files.ran.append(1)",)
    torch.save({"state_dict": STATE, "args": Armed(function, *arguments)}, tmp_path / "net.pth")
    other = made(7)
    if function is run:
        assert f"objects of {__name__}.run were not read" in load_weights(other, tmp_path / "net.pth")
        assert equal(other, STATE)
    else:
        with pytest.raises(ModelError, match="hold more than tensors, which is refused"):
            load_weights(other, tmp_path / "net.pth")
    assert not ran


def test_the_command_line_takes_them_and_says_which(tmp_path) -> None:
    state = digits_cnn().state_dict()
    file = tmp_path / "net.ckpt"
    torch.save({"model": under("module.", state), "ema": {name: tensor + 1 for name, tensor in state.items()}}, file)
    command = ["eval", "ekgfx.models:digits_cnn", "--weights", str(file), "--data", "digits"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0
    assert "note: weights net.ckpt: took 'model', names after 'module.'; 'ema' fits too (--ema)\n" in done.stderr
    done = CliRunner().invoke(cli, [*command, "--ema"])
    assert done.exit_code == 0 and "note: weights net.ckpt: took 'ema'" in done.stderr
