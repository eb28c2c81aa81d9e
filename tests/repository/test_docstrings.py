"""What is public says how it is called: every argument by name, and an example, which is run here as it stands."""

import copy
import doctest
import importlib
import inspect
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

import ekgfx
from tests.support import ROOT

LISTED = re.findall(r"^\.\. auto(?:function|class):: ekgfx\.(\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
PUBLIC = sorted({*LISTED, *(name for name in ekgfx.__all__ if not name.startswith("_"))})


def found(name: str) -> object:
    """The object of a dotted name below `ekgfx`; a public function is before the package of the same name."""
    *package, last = name.split(".")
    return getattr(importlib.import_module(".".join(("ekgfx", *package))), last)


FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(found(name))]
EXAMPLES = {name: doctest.DocTestParser().get_examples(inspect.getdoc(found(name)) or "") for name in PUBLIC}


@cache
def digits() -> dict:
    """Names that examples take for granted."""
    torch.manual_seed(0)
    model, images = ekgfx.models.digits_cnn().eval(), torch.randn(4, 1, 8, 8)
    data = ekgfx.data.load("digits", classes=10)
    batches = list(data.loader("train", 32, subset=range(64)))
    traced = ekgfx.trace(model, images)
    result = ekgfx.search(traced, flops=0.7, strategy="uniform", importance="magnitude")
    pruned = ekgfx.prune(model, result.plan, traced, calibrate=batches)
    bank = ekgfx.build_bank(traced, result, data.loader("train", 256), teachers=2)
    return {
        "model": model,
        "images": images,
        "batches": batches,
        "traced": traced,
        "result": result,
        "plan": result.plan,
        "pruned": pruned,
        "bank": bank,
        "data": data,
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return ekgfx.export.to_onnx(digits()["pruned"], digits()["images"], tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_named(name):
    function = found(name)
    text = inspect.getdoc(function) or ""
    told = re.findall(r"^    \**(\w+): ", text.partition("Args:\n")[2], re.M)
    assert [p for p in inspect.signature(function).parameters if p not in told] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_there_is_an_example(name):
    assert EXAMPLES[name], f"{name} has no example"


@pytest.mark.parametrize("name", [name for name in PUBLIC if EXAMPLES[name]])
def test_examples_run(name, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = digits()
    names = {"torch": torch, "ekgfx": ekgfx, **given}
    names |= {key: copy.deepcopy(given[key]) for key in ("model", "pruned")}  # some examples train them
    names["traced"] = given["traced"].rebound(names["model"])
    if name == "report.write":
        ekgfx.save(given["pruned"], "run")
        names["run"] = Path("run")
    if name.startswith("export.") and name != "export.to_onnx":
        for file in ("net.onnx", "dense.onnx"):
            shutil.copy(exported, file)
    for step in EXAMPLES[name]:
        if not step.options.get(doctest.SKIP):
            exec(compile(step.source, f"the example of ekgfx.{name}", "exec"), names)
