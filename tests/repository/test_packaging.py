"""The build: what the wheel holds, that every way of starting Python finds all of it, and who may import whom."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import ekgfx
from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BESIDE = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"}
FOLDERS = {"ekgfx": ROOT / "ekgfx", "ekgfx.export": ROOT / "export", "ekgfx.recipes": ROOT / "recipes"}

# Imports point one way, along the pipe: a package imports from lines above its own, or from itself. A package that is
# not named here fails the test until it has been given its place.
PIPE = """
errors axes
base
settings rules
graph models
execution
distributed
data
tracing
rewriting
surgery verify
training
repair latency
bank search
runs landscape
hub export recipes callbacks
pipeline
report
cli
__main__
"""
RANKS = {name: rank for rank, line in enumerate(PIPE.strip().splitlines()) for name in line.split()}


def packages_on_disk() -> set[str]:
    found = set()
    for package, folder in FOLDERS.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(folder).parts]))
    return found


def test_every_folder_is_a_package_of_the_build():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """A copy of what a build needs, so that it neither reads nor leaves `build/` in the working tree."""
    clone = tmp_path_factory.mktemp("clone")
    for folder in FOLDERS.values():
        shutil.copytree(folder, clone / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, clone)
    (clone / "tests").mkdir()
    (clone / "tests" / "test_nothing.py").touch()
    return clone


@pytest.fixture(scope="session")
def installed(clone, tmp_path_factory) -> Path:
    """The wheel built from the clone, unpacked as pip would."""
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=clone, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    assert wheel.name == f"ekgfx-{ekgfx.__version__}-py3-none-any.whl"
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


def test_wheel_is_one_package_with_its_data(installed):
    assert {path.name for path in installed.iterdir()} == {"ekgfx", f"ekgfx-{ekgfx.__version__}.dist-info"}
    held = {path.relative_to(installed / "ekgfx") for path in installed.rglob("ekgfx/**/*") if path.is_file()}
    tree = {
        Path(*package.split(".")[1:]) / path.relative_to(folder)
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*")
        if path.suffix in {".py", ".yaml", ".typed", ".css"}
    }
    assert held == tree
    assert Path("recipes/quickstart.yaml") in held
    assert Path("py.typed") in held
    assert list(installed.rglob("licenses/LICENSE"))


def test_sdist_makes_the_same_wheel(clone, installed, tmp_path):
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

    def make(kind: str, source: Path) -> Path:
        subprocess.run([sys.executable, "-c", build, kind, str(tmp_path)], cwd=source, check=True, capture_output=True)
        return next(tmp_path.glob("*.whl" if kind == "build_wheel" else "*.tar.gz"))

    sdist = make("build_sdist", clone)
    with tarfile.open(sdist) as archive:
        held = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
        assert held > BESIDE - {"MANIFEST.in"}
        assert not [name for name in held if name.startswith(("tests", "docs", "benchmarks"))]
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
        archive.extractall(tmp_path / "unpacked")
    wheel = make("build_wheel", next((tmp_path / "unpacked").iterdir()))
    assert set(zipfile.ZipFile(wheel).namelist()) == {
        path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()
    }
    if importlib.util.find_spec("twine"):
        judge = [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
        judged = subprocess.run(judge, capture_output=True, text=True)
        assert judged.returncode == 0, judged.stdout


def test_the_version_is_said_once():
    """pyproject.toml takes it from the package; CITATION.cff, which cannot, agrees."""
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ekgfx.__version__"}
    assert f"\nversion: {ekgfx.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def where(module: str, cwd: Path, installed: Path, *flags: str) -> Path:
    """The file that `module` is taken from by a Python started in `cwd` with the wheel in its site-packages."""
    code = f"import importlib.util; print(importlib.util.find_spec({module!r}).origin)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-S", *flags, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip()).resolve()


@pytest.mark.parametrize("module", ["export", "recipes"])
def test_clone_that_shadows_the_installed_package_is_whole(module, clone, installed):
    """After `pip install .`, Python started in the clone's root takes ./ekgfx, which does not hold export/."""
    assert where("ekgfx", clone, installed) == clone / "ekgfx" / "__init__.py"
    assert where(f"ekgfx.{module}", clone, installed) == clone / module / "__init__.py"


@pytest.mark.parametrize("module", ["export", "recipes"])
def test_installed_package_looks_nowhere_else(module, clone, installed, tmp_path):
    """A stranger's top-level `export` next to the installed package is not ours."""
    shutil.copytree(installed, tmp_path / "site")
    (tmp_path / "site" / module).mkdir()
    (tmp_path / "site" / module / "__init__.py").write_text("raise RuntimeError")
    origin = where(f"ekgfx.{module}", tmp_path, tmp_path / "site")
    assert origin == tmp_path / "site" / "ekgfx" / module / "__init__.py"


def test_public_names_load_and_stay_callable_after_their_submodules():
    import ekgfx.repair  # sets ekgfx.repair to the package, if nothing prevents it
    import ekgfx.search

    assert callable(ekgfx.trace)
    assert callable(ekgfx.search)
    for name in ekgfx.__all__:
        assert getattr(ekgfx, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'tarce'"):
        ekgfx.tarce  # noqa: B018


def test_type_checkers_see_the_public_names_that_python_sees():
    tree = ast.parse((ROOT / "ekgfx" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module.removeprefix("ekgfx.") for node in block.body for alias in node.names}
    assert seen == ekgfx._HOMES
    assert set(ekgfx.__all__) == {*seen, "EkgfxError", "__version__"}


def imported(path: Path, package: str) -> Iterator[str]:
    """The ekgfx modules that a file imports, at its top or inside functions, with relative imports resolved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    wrong, unknown = [], set()
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            relative = path.relative_to(folder).with_suffix("").parts
            owner = package if path.parent == folder else f"{package}.{'.'.join(relative[:-1])}"
            name = f"{package}.{relative[0]}" if package == "ekgfx" else package
            if name == "ekgfx.__init__":
                continue  # the public surface imports everything, lazily
            for target in imported(path, owner):
                parts = target.split(".")
                if parts[0] in {"export", "recipes"}:
                    wrong.append(
                        f"{path.relative_to(ROOT)} imports {target}: only ekgfx.{parts[0]} exists when installed"
                    )
                if parts[0] != "ekgfx" or len(parts) < 2:
                    continue
                here, there = name.split(".")[1], parts[1]
                if here not in RANKS:
                    unknown.add(here)
                elif there in RANKS and RANKS[there] > RANKS[here]:
                    wrong.append(f"{path.relative_to(ROOT)} ({here}) imports {target}, which comes after it")
    assert not wrong, "\n".join(wrong)
    assert not unknown, f"give these files a place in PIPE: {sorted(unknown)}"


def test_ci_runs_the_two_lines_of_the_readme():
    """.ci/run takes the lines that begin with `pip install` from the README; these are the ones it finds."""
    lines = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert lines == [
        "pip install . && ekgfx prune --recipe quickstart",
        "pip install '.[test]' && pytest -n 2 --dist loadfile",
    ]
