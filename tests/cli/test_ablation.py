"""The paper's ablations from the command line: knowledge in the search and in fine-tuning, importance."""

import json
from pathlib import Path

import pytest

from ekgfx.base.files import read_lines
from ekgfx.runs.directory import read_manifest


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A digits network that all ablations start from."""
    from safetensors.torch import save_file

    import ekgfx
    from ekgfx import data
    from ekgfx.models import digits_cnn

    model = digits_cnn()
    ekgfx.finetune(model, data.load("digits"), epochs=2, batch_size=64, lr=0.05)
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(
    ("guide", "tune", "importance", "teachers"),
    [
        ("none", "single", "magnitude", 1),
        ("single", "none", "fpgm", None),
        ("ensemble", "ensemble", "bn-scale", 2),
        ("none", "none", "taylor", None),
    ],
)
def test_every_switch_reaches_its_stage(ekgfx, tmp_path, weights, guide, tune, importance, teachers):
    (tmp_path / "short.yaml").write_text(
        "model: ekgfx.models:digits_cnn\n"
        "data: digits\n"
        "search: {flops: 0.8, train_per_class: 0, val_per_class: 4}\n"
        "finetune: {epochs: 1, batch_size: 256, teachers: 2}\n"
    )
    switches = ("--knowledge", guide, "--finetune-knowledge", tune, "--importance", importance)
    done = ekgfx("prune", "--recipe", "short.yaml", "--weights", weights, *switches, "-o", "run")
    assert done.code == 0, done.err
    run = tmp_path / "run"
    settings = read_manifest(run)["settings"]
    assert (settings["search"]["knowledge"], settings["finetune"]["knowledge"]) == (guide, tune)
    found = json.loads((run / "plan.json").read_text())["search"]["settings"]
    assert (found["knowledge"], found["importance"]) == (guide, importance)
    for step in read_lines(run / "history.jsonl"):
        measure = step["measure"]
        if guide == "none":  # the reward is the label loss alone
            assert measure["reward"] == pytest.approx(-measure["loss"])
        else:
            assert measure["reward"] < -measure["loss"] - 1e-4
    bank = run / "bank" / "bank.json"
    assert bank.exists() == (teachers is not None)
    if teachers is not None:
        taught_by = [teacher["step"] for teacher in json.loads(bank.read_text())["teachers"]]
        assert len(taught_by) == teachers
        assert tune != "single" or taught_by == [0]


def test_importance_decides_what_goes(ekgfx, tmp_path, weights):
    """The same widths, other channels."""
    kept = {}
    for importance in ("taylor", "magnitude", "fpgm", "bn-scale"):
        arguments = ("--flops", 0.5, "--search", "uniform", "--importance", importance, "-o", importance)
        done = ekgfx("prune", "ekgfx.models:digits_cnn", "--data", "digits", "--weights", weights, *arguments)
        assert done.code == 0, done.err
        plan = json.loads((tmp_path / importance / "plan.json").read_text())
        kept[importance] = json.dumps(plan["kept"], sort_keys=True)
    assert len(set(kept.values())) == 4
