"""`ekgfx groups --sensitivity`: the table, the JSON, the picture, and what goes with it."""

import json
import xml.etree.ElementTree as ET

import pytest

NET = """
import torch
from torch import nn

def made():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10))
    return network, torch.zeros(2, 1, 8, 8)
"""


@pytest.fixture(autouse=True)
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)


def test_json_table_and_picture_say_the_same(ekgfx, tmp_path):
    asked = ("groups", "net.py:made", "--sensitivity", "--data", "digits", "--images", 64)
    done = ekgfx(*asked, "--json", "--svg", "costs.svg")
    told = json.loads(done.out)
    assert done.code == 0, done.err
    assert (told["model"], told["data"], told["measure"], told["judged"]) == ("net.py:made", "digits", "accuracy", 64)
    (group,) = told["groups"]
    assert (group["name"], group["groups"], group["size"]) == ("0", ["0"], 4)
    assert [(cut["share"], cut["kept"]) for cut in group["cuts"]] == [(0.75, 3), (0.5, 2), (0.25, 1)]
    assert [cut["macs"] for cut in group["cuts"]] == [9 * (9 + 10) * kept for kept in (3, 2, 1)]
    assert {*group["cuts"][0]["worth"]} == {"accuracy", "loss", "agreement", "error"}
    drawn = ET.parse(tmp_path / "costs.svg").getroot()
    hints = [node.text for node in drawn.iter() if node.tag.endswith("title")]
    written = [f"{100 * cut['worth']['accuracy']:.2f}%" for cut in group["cuts"]]
    for cut, text in zip(group["cuts"], written, strict=True):
        assert f"0, {cut['kept']} of 4 channels: {text}" in hints
    table = ekgfx(*asked).out
    assert all(text in table.splitlines()[2] for text in written)
    assert "75% kept" in table
    assert "accuracy on 64 images" in table


def test_without_data_the_unpruned_network_is_asked_on_photographs(ekgfx):
    done = ekgfx("groups", "net.py:made", "--sensitivity", "--repair", "--images", 20, "--importance", "magnitude")
    assert done.code == 0, done.err
    assert "agreement with the unpruned network on 20 images" in done.out
    assert "the network repaired" in done.out
    assert "cut one group after the other and repair" in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "digits"], "--data goes with --sensitivity"),
        (["--no-repair"], "--repair goes with --sensitivity"),
        (["--images", 8], "--images goes with --sensitivity"),
        (["--importance", "magnitude"], "--importance goes with --sensitivity"),
        (["--sensitivity", "--why"], "ask one"),
        (["--sensitivity", "--data", "folder:nowhere"], "nowhere"),
        (["--sensitivity", "--images", 1], "1 is not in the range"),
    ],
)
def test_what_does_not_go_together_is_refused(refused, arguments, says):
    assert says in refused("groups", "net.py:made", *arguments)
