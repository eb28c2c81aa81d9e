"""A run imports only code that its user named: a stranger's run, a copied signature or another user's key do not."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch

import ekgfx
from ekgfx.errors import ModelError
from ekgfx.models import source, trust

NET = """
from pathlib import Path
import torch
Path(__file__).with_suffix(".imported").touch()
def make():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), (torch.zeros(2, 4),)
"""


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that was made here from a file."""
    (tmp_path / "net.py").write_text(NET)
    asked = source.parse(f"{tmp_path}/net.py:make")
    built = asked.build()
    traced = ekgfx.trace(built.model, built.example_inputs)
    plan = ekgfx.Plan({next(iter(traced.groups)): (0, 1, 2)}, traced.groups.digest)
    ekgfx.save(ekgfx.prune(built.model, plan, traced), tmp_path / "run", plan=plan, source=asked)
    (tmp_path / "net.imported").unlink()
    trust._named.clear()  # as in another process
    return tmp_path / "run"


def change(run: Path, **entries: object) -> None:
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**manifest, **entries}))


def test_ones_own_run_loads(run):
    assert ekgfx.load(run)[0].out_features == 3


@pytest.mark.parametrize("signature", [None, "", "0" * 64, 7])
def test_a_strangers_run_imports_nothing(run, signature):
    change(run, signature=signature)
    with pytest.raises(ModelError, match="would import .*net.py:make, and was not made by you on this machine"):
        ekgfx.load(run)
    assert not (run.parent / "evil.imported").exists()


def test_a_signature_is_of_one_name(run):
    (run.parent / "evil.py").write_text(NET)
    manifest = json.loads((run / "run.json").read_text())
    change(run, source={**manifest["source"], "model": f"{run.parent}/evil.py:make"})
    with pytest.raises(ModelError, match="would import"):
        ekgfx.load(run)
    assert not (run.parent / "evil.imported").exists()


def test_a_resumed_run_imports_nothing_that_its_settings_name(run, capsys):
    from ekgfx.cli import main

    (run.parent / "evil.py").write_text(NET)
    change(run, settings={"model": f"{run.parent}/evil.py:make", "search": {"flops": 0.5}})
    with pytest.raises(SystemExit) as end:
        main(["prune", "--resume", str(run)])
    assert end.value.code == 2
    assert "would import" in capsys.readouterr().err
    assert not (run.parent / "evil.imported").exists()


def test_an_export_imports_nothing_either(run):
    from ekgfx.pipeline.delivery import original
    from ekgfx.runs.directory import Run

    change(run, signature="")
    with Run.reopen(run) as opened, pytest.raises(ModelError, match="would import"):
        original(opened)


def test_who_has_looked_can_say_so(run, monkeypatch):
    change(run, signature="")
    monkeypatch.setenv(trust.OVERRIDE, "1")
    assert ekgfx.load(run)[0].out_features == 3
    monkeypatch.delenv(trust.OVERRIDE)
    build = source.parse(f"{run.parent}/net.py:make").build
    assert ekgfx.load(run, model=lambda: build().model, example_inputs=(torch.zeros(2, 4),))[0].out_features == 3


def test_another_user_does_not_trust_it(run, tmp_path, monkeypatch):
    trust._key.cache_clear()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    with pytest.raises(ModelError, match="would import"):
        ekgfx.load(run)
    trust._key.cache_clear()


def test_the_key_is_the_users_alone(run):
    key = Path(os.environ["XDG_STATE_HOME"]) / "ekgfx" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == 32


def test_what_everybody_has_needs_no_signature():
    trust.check("timm:resnet18", {}, Path("run"))
    trust.check("ekgfx.models:digits_cnn", {}, Path("run"))
    assert trust.sign("timm:resnet18") == {}
