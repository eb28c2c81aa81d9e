"""A model without a graph on the command line: the refusal says how, and then every command takes it."""

import json
from pathlib import Path

import ekgfx as library
from tests.support import branching


def test_the_command_line_takes_leaves(ekgfx, refused) -> None:
    place = f"{branching.__file__}:build"
    assert "--leaf router" in refused("groups", place)
    shown = ekgfx("groups", place, "--leaf", "rou*", "--why")
    assert shown.code == 0 and "a leaf, run as it is" in shown.out
    settings = ("--data", "digits", "--flops", "0.8", "--epochs", "1", "--leaf", "router", "-o", "run")
    done = ekgfx("prune", place, *settings)
    assert done.code == 0, done.err
    manifest = json.loads(Path("run/run.json").read_text())
    assert manifest["status"] == "done" and manifest["settings"]["leaf"] == ["router"]
    assert ekgfx("eval", "run").code == 0
    assert ekgfx("groups", "run").code == 0  # the run says which leaves it has
    loaded = library.load(Path("run"))
    assert sum(p.numel() for p in loaded.parameters()) == manifest["results"]["finetuned"]["params"]
