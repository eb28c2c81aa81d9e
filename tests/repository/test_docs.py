"""What the documents show is run: every block of Python as it stands, in order, page by page; the commands of the tour
for real, all others as far as the command line reads them; recipes and links are followed."""

import os
import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import click
import pytest
import torch
import yaml

import ekgfx
from ekgfx.cli import cli
from ekgfx.data.spec import OPENERS
from ekgfx.models import digits_cnn
from ekgfx.settings.recipe import Recipe
from tests.support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN_WHOLE = "docs/tour.md"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def having(language: str) -> list[str]:
    return [name(page) for page in PAGES if blocks(page, language)]


# -- what a page takes for granted -------------------------------------------------------------------------------------


def digits_batches() -> dict:
    """A model and data under the names that ekg.md uses."""
    torch.manual_seed(0)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    batch = (images, labels, torch.arange(16))
    model = digits_cnn().eval()
    return {
        "model": model,
        "example_input": images[:2],
        "batches": [batch],
        "train_batches": [batch],
        "data": [(torch.stack([images, images]), *batch[1:])],
        "build": digits_cnn,
        "ekgfx": ekgfx,
        "traced": ekgfx.trace(model, images[:2]),
    }


def cifar_folder() -> dict:
    """DIR with a few images of CIFAR's form, and the weights file that the page names."""
    import numpy as np

    from ekgfx.models import resnet56_cifar
    from ekgfx.runs.checkpoint import save_tensors

    draw = np.random.default_rng(0)
    Path("DIR").mkdir()
    for split, count in (("train", 3000), ("test", 20)):
        images = draw.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(f"DIR/{split}.npz", images=images, labels=np.arange(count) % 10)
    save_tensors(resnet56_cifar(), Path("resnet56-cifar10.safetensors"))
    return {"Network": digits_cnn}


# Pages about a library that is no dependency; where it is not installed, their blocks are not run.
ABOUT = {
    "docs/yolo.md": "ultralytics",
    "docs/lightning.md": "pytorch_lightning",
    "docs/transformers.md": "transformers",
}
GIVEN: dict[str, Callable[[], dict]] = {
    "docs/ekg.md": digits_batches,
    "docs/models-and-data.md": cifar_folder,
    "docs/tour.md": lambda: small_run() or {},
}
# A page's text as it is run: no GPU, and fewer epochs.
INSTEAD = {"docs/models-and-data.md": {'.to("cuda")': "", "range(100)": "range(1)"}}


def small_run() -> None:
    """runs/small, as the tour's commands leave it."""
    model, images = digits_cnn().eval(), torch.zeros(2, 1, 8, 8)
    plan = ekgfx.Plan({"fuse.0": tuple(range(8))})
    made = ekgfx.models.source.parse("ekgfx.models:digits_cnn")
    ekgfx.save(ekgfx.prune(model, plan, example_inputs=images), "runs/small", plan=plan, source=made)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in having("python") if page != "CONTRIBUTING.md"])
def test_python(page, folder, capsys):
    if page in ABOUT:
        pytest.importorskip(ABOUT[page], reason=f"{page} is about {ABOUT[page]}, which is not installed")
    names = GIVEN.get(page, dict)()
    for number, text in enumerate(blocks(ROOT / page, "python")):
        for shown, run in INSTEAD.get(page, {}).items():
            text = text.replace(shown, run)
        exec(compile(text, f"{page}, block {number + 1}", "exec"), names)
    if page == "README.md":
        images = torch.zeros(4, 1, 8, 8)
        assert names["traced"].cost(names["result"].plan).macs <= 0.55 * names["traced"].cost().macs
        assert torch.equal(names["again"](images), names["pruned"].eval()(images))
        assert not [file for file in os.listdir("out") if file.endswith((".pt", ".pkl"))]


def test_contributing_teaches_a_rule_that_frees_the_channels():
    """In as many lines as it says; the last block is the operator's test, and runs it."""
    names: dict = {}
    for text in blocks(ROOT / "CONTRIBUTING.md", "python"):
        exec(text, names)
    (rule,) = re.findall(
        r"^def project_rule.*?(?=^```)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert 4 <= len(rule.splitlines()) <= 6
    traced = ekgfx.trace(names["Net"](), torch.randn(2, 4))
    assert {name: {(p.parameter, p.dim) for p in group.places} for name, group in traced.groups.items()} == {
        "stem": {("stem.weight", 0), ("stem.bias", 0), ("weight", 1)},
        "weight": {("weight", 0), ("head.weight", 1)},
    }


# -- commands ----------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `ekgfx …` in a page's shell blocks, also under torchrun; of `a|b` the first is taken."""
    found = []
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words[:1] == ["torchrun"]:
                    words = words[words.index("-m") + 1 :]
                if words[:1] == ["ekgfx"]:
                    found.append([word.split("|")[0] for word in words[1:] if word != "…"])
    return found


@pytest.mark.parametrize("page", [page for page in having("sh") if commands(ROOT / page)])
def test_commands_are_understood(page, folder):
    """The command exists, has these options, and takes these values."""
    for arguments in commands(ROOT / page):
        with cli.make_context("ekgfx", list(arguments)) as context:
            named, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
            try:
                command.make_context(named, rest, parent=context)
            except click.UsageError as error:
                pytest.fail(f"{page}: ekgfx {shlex.join(arguments)}: {error.format_message()}")
        for option, value in pairwise(arguments):
            assert option != "--data" or value.partition(":")[0] in OPENERS, f"{page}: there are no data '{value}'"


def test_the_tour(folder, capsys):
    page = ROOT / RUN_WHOLE
    (small,) = blocks(page, "yaml")
    (folder / "small.yaml").write_text(small)
    assert "# small.yaml" in small
    for arguments in commands(page):
        cli.main(arguments, standalone_mode=False)
    assert {file.name for file in folder.iterdir()} == {"groups.svg", "small.yaml", "small.onnx", "runs"}
    assert (folder / "runs" / "small" / "report.html").is_file()
    told = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    held = [file for file in (folder / "runs" / "small").iterdir() if not file.name.startswith(".")]
    assert not [file.name for file in held if f"`{file.name}{'/' * file.is_dir()}" not in told]


@pytest.mark.parametrize("page", having("yaml"))
def test_recipes(page):
    for text in blocks(ROOT / page, "yaml"):
        found = Recipe.from_json(yaml.safe_load(text), page)
        assert Recipe.from_json(found.to_json(), page) == found


@pytest.mark.parametrize("page", [name(page) for page in PAGES])
def test_programs_and_tests_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for file, test in re.findall(r"\b((?:benchmarks|examples|tests)/[\w/.-]+\.(?:py|txt))(?:::(\w+))?", text):
        assert (ROOT / file).is_file(), f"{page} names {file}"
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8") or not test, f"{page} names {file}::{test}"


@pytest.mark.parametrize("page", [name(page) for page in PAGES])
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_every_page_is_in_the_contents():
    listed = (ROOT / "docs" / "index.md").read_text().splitlines()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or page.stem in listed, f"{page.name} is in no toctree of docs/index.md"
