"""`ekgfx landscape`: the numbers are the library's, on the model, data and loss that were named."""

import json

import pytest
import torch

from ekgfx import data
from ekgfx.landscape import spectrum, surface

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.25,)}
    return net

def squares(output, labels):
    return output.square().sum(1).mean()
"""


@pytest.fixture(autouse=True)
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)


def batches(count: int) -> list:
    digits = data.load("digits", mean=(0.5,), std=(0.25,))
    order = torch.randperm(digits.size("train"), generator=torch.Generator().manual_seed(0))[:count]
    return [batch[:2] for batch in digits.loader("train", 16, subset=order)]


def model() -> torch.nn.Module:
    names: dict = {}
    exec(NET, names)
    return names["net"]().eval()


def test_numbers_and_picture(ekgfx, tmp_path):
    options = ("--images", 40, "--batch-size", 16, "--products", 12, "--count", 2, "--points", 3, "--span", 0.5)
    done = ekgfx("landscape", "net.py:net", "--data", "digits", *options, "-o", "here.svg", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == json.loads((tmp_path / "here.json").read_text())
    expected = spectrum(model(), batches(40), count=2, steps=12)
    assert found["largest"] == pytest.approx(list(expected.largest), rel=1e-4)
    assert found["condition"] == pytest.approx(expected.condition, abs=1e-6)
    drawn = surface(model(), batches(40), points=3, span=0.5)
    assert found["surface"]["losses"][1] == pytest.approx(list(drawn.losses[1]), rel=1e-5)
    assert "<svg" in (tmp_path / "here.svg").read_text()


def test_a_loss_of_ones_own_has_the_curvature_it_must(ekgfx, tmp_path):
    """‖Wx + b‖², mean over images: H = 2·mean([x 1]ᵀ[x 1]) for each of the ten outputs alike."""
    options = ("--images", 30, "--loss", "net.py:squares", "--products", 40, "--tolerance", 1e-6, "--no-surface")
    done = ekgfx("landscape", "net.py:net", "--data", "digits", *options)
    assert done.code == 0, done.err
    assert not (tmp_path / "landscape.png").exists()
    found = json.loads((tmp_path / "landscape.json").read_text())
    images = torch.cat([images for images, _ in batches(30)]).flatten(1).double()
    inputs = torch.cat([images, torch.ones(30, 1)], 1)
    largest = torch.linalg.eigvalsh(2 * inputs.T @ inputs / 30)[-1].item()
    assert found["largest"][0] == pytest.approx(largest, rel=1e-4)
    assert found["condition"] < 1e-4
    assert f"largest eigenvalues   {largest:.4g}" in done.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["net.py:net"], "nothing to judge net.py:net on: give --data"),
        (["net.py:net", "--data", "photos"], "photos"),
        (["net.py:net", "--data", "digits", "-o", "picture.gif"], "a picture's name ends in .png"),
        (["net.py:net", "--data", "digits", "--loss", "net.py:nothing"], "no function 'nothing'"),
        (["net.py:net", "--data", "digits", "--loss", "nothing"], "names no function"),
        (["net.py:net", "--data", "digits", "--images", "0"], "0 is not in the range"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(refused, arguments, says):
    assert says in refused("landscape", *arguments)
