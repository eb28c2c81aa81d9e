"""The picture of a model: who is drawn, which groups, above whom; and that names stay text."""

import itertools
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn

import ekgfx
from ekgfx.models import digits_cnn
from ekgfx.report import drawing


class Block(nn.Module):
    """stem → a → b, added to the stem's output, → head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.b(self.a(x).relu())).relu())


def test_a_residual_block_by_hand():
    made = drawing.boxes(ekgfx.trace(Block(), torch.zeros(2, 3, 4, 4)))
    assert [(box.label, box.groups, box.layer, [read.label for read in box.reads]) for box in made] == [
        ("input", (), 0, []),
        ("stem", ("stem",), 1, ["input"]),
        ("a", ("a",), 2, ["stem"]),
        ("b", ("stem",), 3, ["a"]),
        ("add", ("stem",), 4, ["stem", "b"]),
        ("head", (), 5, ["add"]),
        ("output", (), 6, ["head"]),
    ]


@pytest.mark.parametrize("build", [Block, digits_cnn])
def test_boxes_stand_below_what_they_read_and_not_on_each_other(build):
    shape = (2, 1, 8, 8) if build is digits_cnn else (2, 3, 4, 4)
    made = drawing.boxes(ekgfx.trace(build(), torch.zeros(shape)))
    assert all(box.y > read.y for box in made for read in box.reads)
    for one, other in itertools.combinations(made, 2):
        assert one.layer != other.layer or abs(one.x - other.x) >= drawing.BOX
    assert min(box.x for box in made) == 0


def test_names_stay_text(tmp_path):
    hostile = "<script>alert(1)</script>\x00"
    model = nn.Sequential()
    model.add_module("a<b>&\"'", nn.Linear(4, 8))
    model.add_module("out", nn.Linear(8, 2))
    drawing.write(ekgfx.trace(model, torch.zeros(2, 4)), hostile, tmp_path / "net.svg")
    picture = ET.parse(tmp_path / "net.svg").getroot()
    tags = {node.tag.rpartition("}")[2] for node in picture.iter()}
    assert tags == {"svg", "title", "style", "rect", "text", "path"}
    assert any("a<b>&\"'" in (node.text or "") for node in picture.iter())


def test_the_command_draws(ekgfx_cli, tmp_path):
    assert ekgfx_cli("groups", "ekgfx.models:digits_cnn", "--svg", tmp_path / "net.svg") == 0
    assert ET.parse(tmp_path / "net.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.fixture
def ekgfx_cli():
    from ekgfx.cli import cli

    return lambda *arguments: cli.main([str(argument) for argument in arguments], standalone_mode=False) or 0
