"""Files hold data. What brings code along is refused, and does not run; and no line of the package could run it."""

import ast
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ekgfx.data.arrays import read_npz
from ekgfx.errors import EkgfxError
from ekgfx.models.weights import read_weights
from ekgfx.settings import recipe
from tests.support import ROOT


class Armed:
    """Makes a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def saved(file: Path, content: object, **options: Any) -> None:
    torch.save({"weight": content}, file, **options)


def yaml_of(file: Path, armed: Armed) -> None:
    file.write_text(f"model: !!python/object/apply:os.mkdir ['{armed.trace}']\n")


ARMED: dict[str, tuple[str, Callable[[Path, Armed], object], Callable[[Path], object]]] = {
    "torch": ("w.pth", saved, read_weights),
    "torch, old form": ("w.pt", lambda file, it: saved(file, it, _use_new_zipfile_serialization=False), read_weights),
    "pickle": ("w.bin", lambda file, it: file.write_bytes(pickle.dumps(it, 2)), read_weights),
    "weights": ("w.npz", lambda file, it: np.savez(file, weight=np.array([it])), read_weights),
    "images": ("i.npz", lambda file, it: np.savez(file, images=np.array([it])), lambda file: read_npz([file])),
    "recipe": ("r.yaml", yaml_of, lambda file: recipe.load(str(file))),
}


@pytest.mark.parametrize("form", ARMED)
def test_code_in_a_file_does_not_run(form, tmp_path):
    name, write, use = ARMED[form]
    write(tmp_path / name, Armed(tmp_path / "it ran"))
    with pytest.raises(EkgfxError):
        use(tmp_path / name)
    assert not (tmp_path / "it ran").exists()


def test_the_code_would_run_where_it_is_let(tmp_path):
    pickle.loads(pickle.dumps(Armed(tmp_path / "it ran")))
    assert (tmp_path / "it ran").exists()


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every call in the package: place, dotted name, keyword arguments that are constants."""
    for folder in ("ekgfx", "export", "recipes"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    told = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), told


FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}


MADE = ("ekgfx/rewriting/patched.py", {"exec", "compile"})
"""Forwards that are made from a traced graph, in the process that runs them: never from a file."""


def test_no_line_runs_what_a_file_says():
    seen = set()
    for place, name, told in calls():
        seen.add(name)
        made = place.partition(":")[0] == MADE[0] and name in MADE[1]
        assert made or name not in FORBIDDEN, f"{place} calls {name}"
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.", "joblib.")), f"{place} calls {name}"
        assert told.get("weights_only", name != "torch.load"), f"{place} unpickles what is no tensor"
        assert not told.get("allow_pickle") and not told.get("shell"), f"{place}: {name} with {told}"
    assert {"torch.load", "np.load", "yaml.safe_load", "subprocess.run"} <= seen
