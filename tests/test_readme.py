"""The Python that README and CONTRIBUTING show is run as it stands there."""

import os
import re
from pathlib import Path

import torch

import ekgfx
from ekgfx.models import digits_cnn

ROOT = Path(__file__).resolve().parent.parent


def python_block(name: str) -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    return block


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    batch = (images, labels, torch.arange(16))
    names = {
        "model": digits_cnn().eval(),
        "example_input": images[:2],
        "batches": [batch],
        "train_batches": [batch],
        "data": [(torch.stack([images, images]), *batch[1:])],
        "build": digits_cnn,
    }
    exec(python_block("README.md"), names)
    assert names["traced"].cost(names["result"].plan).macs <= 0.55 * names["traced"].cost().macs
    assert torch.equal(names["again"](images), names["pruned"].eval()(images))
    assert not [name for name in os.listdir("out") if name.endswith((".pt", ".pkl"))]


def test_contributing_teaches_a_rule_that_frees_the_channels():
    names: dict = {}
    exec(python_block("CONTRIBUTING.md"), names)

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 6, 3)
            self.weight = torch.nn.Parameter(torch.randn(6))
            self.out = torch.nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.out(torch.ops.mylib.scale(self.conv(x), self.weight))

    traced = ekgfx.trace(Scaled(), torch.randn(2, 3, 8, 8))
    (group,) = traced.groups.values()
    assert {(place.parameter, place.dim) for place in group.places} == {
        ("conv.weight", 0),
        ("conv.bias", 0),
        ("weight", 0),
        ("out.weight", 1),
    }
