"""The run directory: nothing half-written, one writer at a time, damage and newer formats refused."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ekgfx.base.files import append_line, read_json, read_lines
from ekgfx.errors import RunError
from ekgfx.runs import directory as runs
from ekgfx.runs.directory import Run, read_manifest


def test_create_then_read(tmp_path):
    with Run.create(tmp_path / "a" / "run", seed=7, status="running") as run:
        run.write_json("plan.json", {"x": [1, 2]})
        run.append("history.jsonl", {"step": 1})
        run.append("history.jsonl", {"step": 2})
        run.update(status="done")
    manifest = runs.read_manifest(tmp_path / "a" / "run")
    assert (manifest["seed"], manifest["status"], manifest["format"]) == (7, "done", runs.FORMAT)
    assert manifest["versions"]["torch"]
    assert read_json(runs.verify(tmp_path / "a" / "run", "plan.json")) == {"x": [1, 2]}
    assert read_lines(tmp_path / "a" / "run" / "history.jsonl") == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("damage", ["change", "truncate", "remove"])
def test_a_changed_file_is_refused(tmp_path, damage):
    with Run.create(tmp_path / "run") as run:
        run.write_json("plan.json", {"x": [1, 2]})
    file = tmp_path / "run" / "plan.json"
    if damage == "change":
        file.write_text(file.read_text().replace("1", "3"))
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(RunError, match=r"plan\.json (was changed or cut short|is missing)"):
        runs.verify(tmp_path / "run", "plan.json")


def test_newer_format_is_refused(tmp_path):
    Run.create(tmp_path / "run").close()
    manifest = tmp_path / "run" / "run.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": runs.FORMAT + 1}))
    with pytest.raises(RunError, match=f"format {runs.FORMAT + 1}, this ekgfx reads up to {runs.FORMAT}: upgrade"):
        Run.reopen(tmp_path / "run")


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"format": "1"}', "\x00\xff", "[" * 100_000])
def test_damaged_manifest_is_one_clear_error(tmp_path, content):
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        runs.read_manifest(tmp_path)


def test_missing_run(tmp_path):
    with pytest.raises(RunError, match=r"no run at .*nowhere"):
        runs.read_manifest(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"run\.json is missing"):
        runs.read_manifest(tmp_path)


def test_other_files_are_never_overwritten(tmp_path):
    Run.create(tmp_path / "run").close()
    with pytest.raises(RunError, match="already holds a run; go on with --resume"):
        Run.create(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"holds other files \(thesis\.tex"):
        Run.create(tmp_path / "other")


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "x" * 10_000, "é"], ids=["short", "long", "not ASCII"])
def test_torn_line_gives_way_to_the_next(tmp_path, torn):
    lines = tmp_path / "run" / "history.jsonl"
    with Run.create(tmp_path / "run") as run:
        run.append("history.jsonl", {"step": 1})
    with lines.open("ab") as file:
        file.write(torn.encode()[:-1])
    assert read_lines(lines) == [{"step": 1}]
    with Run.reopen(tmp_path / "run") as run:
        run.append("history.jsonl", {"step": 2})
        run.append("history.jsonl", {"step": 3})
    assert lines.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_torn_first_line_gives_way(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"y" * 5000)
    append_line(tmp_path / "a.jsonl", {"step": 1})
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"step": 1}\n'


def test_newest(tmp_path):
    for name in ("b", "c", "a"):
        Run.create(tmp_path / name).close()
    assert runs.newest(tmp_path) == tmp_path / "a"
    with pytest.raises(RunError, match="no run under"):
        runs.newest(tmp_path / "a")


def test_fresh_paths_differ_and_are_plain():
    first, second = runs.fresh_path("some/file.py:make net"), runs.fresh_path("../..")
    assert first.parent == Path("runs")
    assert first.name.startswith("make-net-")
    assert second.name.startswith("run-")


WRITER = """
import sys, time
from pathlib import Path
from ekgfx.runs.directory import Run
run = Run.reopen(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    number += 1
    run.write_json("plan.json", {"number": number, "filling": ["x" * 1000] * 200})
    run.append("history.jsonl", {"step": number})
"""


def start_writer(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_second_writer_is_refused_until_the_first_is_dead(tmp_path):
    Run.create(tmp_path / "run").close()
    process = start_writer(tmp_path / "run")
    try:
        with pytest.raises(RunError, match="another process is using the run"):
            Run.reopen(tmp_path / "run")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    Run.reopen(tmp_path / "run").close()


def test_killed_at_any_moment_leaves_whole_files(tmp_path):
    with Run.create(tmp_path / "run") as run:
        run.write_json("plan.json", {"number": 0, "filling": ["x" * 1000] * 200})
    for delay in (0.05, 0.02, 0.013, 0.031, 0.044):
        process = start_writer(tmp_path / "run")
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with Run.reopen(tmp_path / "run") as run:
            assert run.has("plan.json")  # its checksum is the one in run.json, whichever came last
            assert len(read_json(tmp_path / "run" / "plan.json")["filling"]) == 200
            assert all(set(line) == {"step"} for line in run.lines("history.jsonl"))
            assert not list((tmp_path / "run").glob(".*.part"))


def test_killed_twice_just_before_the_rename(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def replace(source, target):
        if Path(target).name == "plan.json":
            raise Killed
        rename(source, target)

    with Run.create(tmp_path / "run") as run:
        run.write_json("plan.json", {"number": 0})
    rename = os.replace
    monkeypatch.setattr(os, "replace", replace)
    for number in (1, 2, 3):
        with pytest.raises(Killed), Run.reopen(tmp_path / "run") as run:
            run.write_json("plan.json", {"number": number})
        assert read_manifest(tmp_path / "run")["files"]["plan.json"]["before"] is not None
    with Run.reopen(tmp_path / "run") as run:
        assert run.read("plan.json") == {"number": 0}


def test_full_disk_is_one_line_and_keeps_the_old_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Run.create(tmp_path / "run") as run:
        run.write_json("plan.json", {"x": 1})
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"cannot write .*plan\.json: No space left on device; free some space"):
            run.write_json("plan.json", {"x": 2})
        with pytest.raises(RunError, match=r"cannot write .*history\.jsonl: No space left"):
            run.append("history.jsonl", {"step": 1})
    assert read_json(tmp_path / "run" / "plan.json") == {"x": 1}
    assert not list((tmp_path / "run").glob(".*.part"))


def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot make the run at .*: Not a directory"):
        Run.create(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["history.jsonl", "bank"])
def test_a_run_writes_nowhere_else(tmp_path, name):
    """A link in a run that comes from somebody else would lead what is appended, or cut off, to another file."""
    Run.create(tmp_path / "run").close()
    outside = tmp_path / "outside"
    outside.write_text("precious, without an end of line")
    (tmp_path / "run" / name).symlink_to(outside)
    with pytest.raises(RunError, match=f"{name} is a link, and a run writes to its own folder alone"):
        Run.reopen(tmp_path / "run")
    assert outside.read_text() == "precious, without an end of line"


@pytest.mark.parametrize("name", ["../outside", "bank/../../outside", "/etc/passwd"])
def test_a_run_names_nothing_elsewhere(tmp_path, name):
    """Whoever writes a run.json could have any file read whole, or one that never ends."""
    with Run.create(tmp_path / "run") as run:
        run.update(files={name: {"now": {}, "before": {}}})
    with pytest.raises(RunError, match=r"run\.json is damaged: its file '.*' lies outside the run"):
        Run.reopen(tmp_path / "run")


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_permission_that_goes_away_keeps_the_old_file(tmp_path, monkeypatch, call):
    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with Run.create(tmp_path / "run") as run:
        run.write_json("plan.json", {"x": 1})
        monkeypatch.setattr(os, call, denied)
        with pytest.raises(RunError, match=r"cannot write .*: Permission denied; make it writable, or choose"):
            run.write_json("plan.json", {"x": 2})
    assert read_json(tmp_path / "run" / "plan.json") == {"x": 1}
    assert not list((tmp_path / "run").glob(".*.part"))
