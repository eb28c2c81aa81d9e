"""What the command line prints, and how soon."""

import json
import subprocess
import sys

import pytest
import yaml

from ekgfx.cli import render
from ekgfx.cli.summary import advice, show
from ekgfx.rules.registry import _RULES
from ekgfx.runs.directory import Run
from ekgfx.settings import recipe
from ekgfx.settings.recipe import Recipe
from tests.cli.conftest import environment


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\n"
        "from ekgfx.cli import main\n"
        "for arguments in (['--help'], ['prune', '--help'], ['recipes'], ['--version']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: assert not end.code\n"
        "slow = {'torch', 'timm', 'onnx', 'matplotlib', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_groups_as_a_table(ekgfx):
    done = ekgfx("groups", "timm:test_resnet", "--why")
    assert done.code == 0, done.err
    assert "MACs governed" in done.out
    assert "kernel size" in done.out
    assert "output of the model" in done.out


def test_a_table_through_a_pipe_is_whole_however_narrow_the_window(ekgfx, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    done = ekgfx("groups", "timm:test_resnet")
    head = done.out.splitlines()[0]
    assert "MACs governed" in head and "parameters cut" in head and "…" not in done.out


TWO_OUTPUTS = """
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        features = self.stem(x)
        return {"logits": self.head(features), "features": features}
"""


def test_groups_of_a_model_of_which_one_output_matters(ekgfx, tmp_path):
    """The stem is an output itself, and stays, unless another one is said to be the one that matters."""
    (tmp_path / "two.py").write_text(TWO_OUTPUTS)
    model = [f"{tmp_path}/two.py:Two", "--input", "1x3x8x8", "--json"]
    for typed, sizes in ((), []), (("--outputs", "logits"), [8]):
        found = json.loads(ekgfx("groups", *model, *typed).out)
        assert [group["size"] for group in found["groups"]] == sizes
    done = ekgfx("groups", *model, "--outputs", "boxes")
    assert done.code == 2 and "boxes" in done.err and "logits" in done.err and "\n" not in done.err.strip()


def test_groups_as_json(ekgfx):
    done = ekgfx("groups", "timm:test_resnet", "--json")
    facts = json.loads(done.out)
    stem = facts["groups"][0]
    assert {"parameter": f"{stem['name']}.weight", "dim": 0, "layout": str(stem["size"])} in stem["places"]
    assert facts["macs"] > 0
    assert facts["frozen"]
    assert facts["unknown_ops"] == {}


CUSTOM = """
import torch
from torch import nn

@torch.library.custom_op("ekgfx_cli_test::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2

@double.register_fake
def _(x):
    return torch.empty_like(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(double(double(self.a(x))))

def net():
    return Net(), (torch.randn(2, 4),)
"""


def test_an_unknown_operator_is_reported_once_with_what_it_costs(ekgfx, tmp_path):
    (tmp_path / "custom.py").write_text(CUSTOM)
    shown = ekgfx("groups", "custom.py:net", "--why").out
    line = "ekgfx_cli_test.double.default has no rule (2 uses): what touches it stays whole, which costs 56"
    assert " ".join(shown.split()).count(line) == 1  # a: 4·8 + 8, b: 8·2
    facts = json.loads(ekgfx("groups", "custom.py:net", "--json").out)
    assert facts["unknown_ops"] == {"ekgfx_cli_test.double.default": {"uses": 2, "parameters": 4 * 8 + 8 + 8 * 2}}


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("return Effect(())", "is not understood: the rule does not hold here, it says an output of shape (), the"),
        (
            "return Effect(call['x'], sums=[('x', None, -1)])",
            "counts as 0 MACs (2 uses): its rule does not say what it",
        ),
    ],
)
def test_a_rule_that_fails_or_does_not_say_its_cost_is_reported(ekgfx, tmp_path, body, line):
    rule = f"""
import ekgfx
from ekgfx.rules import Effect

@ekgfx.rule("ekgfx_cli_test.double.default", replace=True)
def rule(call):
    {body}
"""
    (tmp_path / "custom.py").write_text(CUSTOM + rule)
    try:
        shown = " ".join(ekgfx("groups", "custom.py:net").out.split())
    finally:
        _RULES.pop("ekgfx_cli_test.double.default", None)
    assert shown.count(f"ekgfx_cli_test.double.default {line}") == 1


def test_recipes_shows_the_whole_recipe(ekgfx):
    done = ekgfx("recipes", "quickstart")
    assert Recipe.from_json(yaml.safe_load(done.out)) == recipe.load("quickstart")
    assert "quickstart" in ekgfx("recipes").out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 "),
        (940, "940 "),
        (999.6, "1.00 k"),
        (4_117_000_000, "4.12 G"),
        (11_689_512, "11.7 M"),
        (123_456, "123 k"),
    ],
)
def test_human(value, text):
    assert render.human(value).strip() == text.strip()


def test_change_says_kept_and_removed():
    assert render.change(4.12e9, 2.26e9) == "4.12 G → 2.26 G (54.9% kept, 45.1% removed)"


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("digits", "digits"),
        ("folder:images", "folder:HERE/images"),
        ("folder:/images", "folder:/images"),
        ("timm:torch/cifar10", "timm:torch/cifar10"),
        ("timm:torch/cifar10@data", "timm:torch/cifar10@HERE/data"),
        (None, None),
    ],
)
def test_data_means_the_same_when_a_run_goes_on_elsewhere(spec, meant, tmp_path, monkeypatch):
    from ekgfx.base.named import absolute

    monkeypatch.chdir(tmp_path)
    assert absolute(spec) == (meant and meant.replace("HERE", str(tmp_path)))


def test_every_training_setting_is_a_recipe_key():
    """The recipe's training sections repeat `ekgfx.training.optimization.Training`, which the command line must not
    import."""
    from dataclasses import fields

    from ekgfx.training.optimization import Training

    ours = {f.name: f.type for f in fields(recipe.Training)}
    theirs = {f.name: f.type for f in fields(Training) if f.name != "seed"}  # the recipe has one seed for everything
    assert ours == theirs


@pytest.mark.parametrize(
    ("faster", "left", "latency", "align", "widths", "says"),
    [
        (1.1, 0.5, None, 1, [13, 16, 21], "2 of 3 widths are no multiple of 8, and leave hardware idle; --align 8"),
        (1.1, 0.5, None, None, [8, 16, 24], "though all widths are even: --latency 0.6"),
        (1.5, 0.5, None, 1, [13, 16, 21], None),  # half of what 2 would be
        (1.1, 0.5, 0.6, None, [13, 16, 21], None),
        (1.1, 0.5, None, 16, [5, 16, 32], None),  # of the five, none could be a multiple
    ],
)
def test_advice_where_the_milliseconds_did_not_follow(faster, left, latency, align, widths, says):
    found = advice(faster, left, {"latency": latency, "align": align}, widths)
    assert found is None if says is None else found is not None and says in found


def test_a_network_that_was_not_timed_in_some_precision_leaves_a_gap(tmp_path, capsys):
    """What is left out because it is slower (fp16, INT8) is no reason to say nothing of the rest."""
    score = {"accuracy": 0.5, "loss": 1.5, "agreement": None, "macs": 1000, "params": 10}
    results = {"before": score, "searched": {**score, "macs": 500}}
    with Run.create(tmp_path / "run", settings=Recipe(model="m").to_json(), results=results) as run:
        run.write_json("plan.json", {"kept": {}})
        timing = {"provider": "cpu", "batch": 1, "median_ms": 1.0}
        timings = [timing | {"precision": "fp32", "network": "dense", "median_ms": 2.0}]
        timings += [timing | {"precision": precision, "network": "pruned"} for precision in ("fp32", "int8")]
        run.write_json("export.json", {"latency": {"timings": timings}})
    show(tmp_path / "run")
    shown = capsys.readouterr().out
    assert "2.00 times as fast on cpu fp32 batch 1;" in " ".join(shown.split())
    (before,) = (line for line in shown.splitlines() if line.startswith("before"))
    assert [cell.strip() for cell in before.split("│")[-2:]] == ["2 ms", "–"]
