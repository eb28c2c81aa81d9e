"""What the benchmarks share, and whether the commands that the documents publish are theirs."""

import importlib
import os
import re
import signal
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.common import Ended, Lines, Sheet, apart, in_turn, streamed
from tests.support import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/gpu/*.md")]


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def two_then_fails() -> Iterator[int]:
    yield from (1, 2)
    raise ValueError("no third")


def waits() -> None:
    signal.pause()


def test_a_line_that_is_there_is_found_by_any_of_its_entries(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "rows.jsonl")
    assert {"model": "a"} not in lines
    lines.add({"model": "a", "keep": 0.5, "accuracy": 0.9})
    assert {"model": "a"} in lines and {"model": "a", "keep": 0.5} in lines
    assert {"model": "a", "keep": 0.7} not in lines and {"model": "a", "seed": 0} not in lines


def test_a_sheet_goes_on_and_refuses_other_settings(tmp_path: Path) -> None:
    Sheet(tmp_path / "sheet.json", {"keep": 0.5}, methods={}).keep(methods={"a": 1})
    again = Sheet(tmp_path / "sheet.json", {"keep": 0.5}, methods={})
    assert again["methods"] == {"a": 1} and {"hardware", "versions", "date"} <= set(again)
    with pytest.raises(SystemExit, match="other settings"):
        Sheet(tmp_path / "sheet.json", {"keep": 0.7})


def test_a_process_says_how_it_ended() -> None:
    assert apart(divmod, 7, 3, start="fork") == (2, 1)
    with pytest.raises(Ended, match="ZeroDivisionError"):
        apart(divmod, 1, 0, start="fork")
    with pytest.raises(Ended, match="ended with code -9"):
        apart(killed, start="fork")
    with pytest.raises(Ended, match=r"no result after 0\.2 s"):
        apart(waits, timeout=0.2, start="fork")
    seen: list[int] = []
    with pytest.raises(Ended, match="ValueError: no third"):
        seen.extend(streamed(two_then_fails, start="fork"))
    assert seen == [1, 2]


def test_every_round_begins_with_another_one() -> None:
    assert "".join(name for _, name in in_turn("abc", 3)) == "abcbcacab"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_published_commands_exist(page: Path) -> None:
    text = re.sub(r"\\?\n\s*", " ", page.read_text(encoding="utf-8"))
    for place, name, part in re.findall(r"benchmarks/((?:gpu/)?(\w+)\.py)(?: (--help|\w[\w-]*))?", text):
        file = ROOT / "benchmarks" / place
        assert file.is_file(), place
        if file.parent.name == "benchmarks" and "PARTS = {" in file.read_text(encoding="utf-8"):
            assert part in {"--help", *importlib.import_module(f"benchmarks.{name}").PARTS}, f"{place} {part}"


@pytest.mark.parametrize("name", ["analysis", "bank", "coverage", "imagenet", "peers", "ranking", "repair", "search"])
def test_every_part_takes_an_output(name: str) -> None:
    for part, module in importlib.import_module(f"benchmarks.{name}").PARTS.items():
        parser = ArgumentParser()
        module.options(parser)
        assert part in ("list", "rounding", "install") or "--output" in parser.format_help()
        assert f"python benchmarks/{name}.py {part}" in module.__doc__
