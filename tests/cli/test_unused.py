"""Parts that no run shows, on the command line: named in one line, released by --unused, kept in the run."""

import json
from pathlib import Path

import ekgfx as library
from tests.support import unseen_head


def test_the_command_line_names_what_was_not_seen(ekgfx, refused) -> None:
    place = f"{unseen_head.__file__}:build"
    shown = ekgfx("groups", place, "--why")
    assert shown.code == 0
    assert "nothing that was traced uses project: since it may meet them" in " ".join(shown.out.split())
    whole, free = (json.loads(ekgfx("groups", place, "--json", *more).out) for more in ((), ("--unused", "proj*")))
    assert [group["name"] for group in whole["groups"]] == ["0"]
    assert [group["name"] for group in free["groups"]] == ["0", "2"]
    assert (len(whole["notes"]), free["notes"]) == (1, [])
    assert "unused 'projects' names no parameter" in refused("groups", place, "--unused", "projects")


def test_a_run_remembers_what_is_unused(ekgfx) -> None:
    place = f"{unseen_head.__file__}:build"
    settings = ("--data", "digits", "--flops", "0.8", "--epochs", "1", "-o")
    assert ekgfx("prune", place, *settings, "whole").code == 0
    assert ekgfx("prune", place, *settings, "free", "--unused", "project").code == 0
    assert ekgfx("report", "whole").code == 0
    assert "nothing that was traced uses project" in Path("whole/report.html").read_text()
    notes = {name: json.loads(Path(name, "run.json").read_text())["notes"] for name in ("whole", "free")}
    assert "uses project" in notes["whole"][0] and notes["free"] == []
    for run in ("whole", "free"):
        assert library.load(Path(run)).project.in_features == 12
