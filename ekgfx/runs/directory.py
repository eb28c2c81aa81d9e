"""The run directory: everything one job knows, in files that survive a kill at any moment.

How the files are written: `ekgfx.base.files`. One process at a time may write to a run: it holds the lock file, which
the operating system releases when that process dies.
"""

import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import filelock

from ekgfx.base.files import (
    PARTIAL,
    advice,
    append_line,
    checksum,
    json_text,
    read_json,
    read_lines,
    replacing,
    write_json,
)
from ekgfx.base.schema import read
from ekgfx.base.units import budget_of
from ekgfx.errors import RunError
from ekgfx.runs.scores import Score
from ekgfx.settings.budgets import BUDGETS, label_of, which

FORMAT = 1
MANIFEST = "run.json"
POINTS = "budgets"
"""In a run of several budgets: the folder of the runs of all but the tightest, whose network is the run's own."""
STAGES = {"before": "before", "searched": "after search", "repaired": "after repair", "finetuned": "after fine-tuning"}
"""The keys of run.json's results, in order, and what they are called."""
_ENTRIES: dict[str, Any] = {
    "created": str,
    "command": tuple[str, ...],
    "versions": Mapping[str, str],
    "status": str,
    "error": str | None,
    "files": Mapping[str, Mapping[str, Any]],
    "settings": Mapping[str, Any] | None,
    "results": Mapping[str, Score],
    "source": Mapping[str, Any] | None,
    "ancestors": tuple[str, ...],
    "points": tuple[Mapping[str, float | str], ...],
    "part_of_several": bool,
    "inputs": tuple[tuple[Any, ...], ...] | None,
    "named_inputs": Mapping[str, tuple[Any, ...]],
    "weights": str,
    "device": str,
    "data": Mapping[str, str],
}
"""The types of run.json's entries; what settings hold is a recipe, and checked as one."""
_LOCK = ".lock"
_PACKAGES = ("ekgfx", "torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxruntime-gpu", "onnxruntime")


def read_manifest(path: Path) -> dict[str, Any]:
    """run.json of the run at `path`; RunError when it is no run, damaged, or written by a newer ekgfx."""
    if not path.is_dir():
        raise RunError(f"no run at {path}: the folder does not exist; `ekgfx prune` makes one")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict):
        raise RunError(f"{path / MANIFEST} is damaged: it holds no object; restore it, or start a new run")
    check_format(manifest, path / MANIFEST)
    for key, hint in _ENTRIES.items():
        if key in manifest:
            read(hint, manifest[key], str(path / MANIFEST), RunError, key)
    for name in manifest.get("files", ()):
        if Path(name).is_absolute() or ".." in Path(name).parts:  # as in a run that comes from somebody else
            raise RunError(f"{path / MANIFEST} is damaged: its file {name[:100]!r} lies outside the run")
    return {"files": {}, **manifest}


def check_format(value: Mapping[str, Any], where: Path) -> None:
    """Refuses a file whose format this version does not know."""
    version = value.get("format")
    if type(version) is not int or version < 1:
        raise RunError(f"{where} is damaged: it names no format version; restore it, or start a new run")
    if version > FORMAT:
        raise RunError(f"{where} has format {version}, this ekgfx reads up to {FORMAT}: upgrade ekgfx")


def verify(path: Path, name: str) -> Path:
    """The path of a run's file, after comparing it with the checksum in run.json (RunError when it differs)."""
    recorded = read_manifest(path).get("files", {}).get(name)
    file = path / name
    if not isinstance(recorded, Mapping):
        raise RunError(f"the run at {path} has no {name} yet; finish it with `ekgfx prune --resume {path}`")
    if not file.is_file():
        raise RunError(f"{file} is missing; restore it, or make the run again")
    # A kill between recording a new file and its rename leaves the file before it, which is whole.
    if checksum(file) not in (recorded.get("now"), recorded.get("before")):
        raise RunError(f"{file} was changed or cut short since it was written; restore it, or make the run again")
    return file


def at_budget(path: Path, budget: Mapping[str, float | str | None]) -> Path:
    """The run of one of several budgets in the run at `path`; that one itself where no budget is named.

    Raises BudgetError when the run has no such budget; says which it has.
    """
    wanted = {key: asked for key, asked in budget.items() if asked is not None}
    if not wanted:
        return path
    points = read_manifest(path).get("points", ())
    for key, asked in ((key, asked) for point in points for key, asked in point.items()):
        if key not in BUDGETS:  # their names are those of folders
            raise RunError(f"{path / MANIFEST} is damaged: {key[:100]!r} is no budget; restore it")
        budget_of(key, asked)
    number = which(points, wanted)
    return path if number == len(points) - 1 else path / POINTS / label_of(points[number])


def newest(root: Path = Path("runs")) -> Path:
    """The run under `root` that was created last."""
    found = [(read_manifest(path.parent).get("created", ""), path.parent) for path in root.glob(f"*/{MANIFEST}")]
    if not found:
        raise RunError(f"no run under {root}/; name one, or make one with `ekgfx prune`")
    return max(found)[1]


def fresh_path(model: str, root: Path = Path("runs")) -> Path:
    """A new folder name under `root`, from the model's name and the time."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", model.rsplit(":", 1)[-1]).strip("-.") or "run"
    return root / f"{stem}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def environment() -> dict[str, str]:
    """Versions of Python, the platform and the packages that decide a result."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(eq=False)
class Run:
    """A run directory that this process may write to, until `close` (or the end of a `with` block)."""

    path: Path
    manifest: dict[str, Any]
    _lock: filelock.FileLock

    @classmethod
    def create(cls, path: Path, **facts: Any) -> Self:
        """Makes `path` and its run.json, which holds `facts` (JSON values) besides command, versions and time.

        RunError when `path` already holds a run or other files, or cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the run at {path}: {error.strerror or error}; {advice(error)}") from error
        lock = _acquire(path)
        found = sorted(entry.name for entry in path.iterdir() if entry.name != _LOCK)
        if found:
            lock.release()
            if MANIFEST in found:
                raise RunError(f"{path} already holds a run; go on with --resume {path}, or choose another with -o")
            raise RunError(f"{path} holds other files ({found[0]}, …); choose an empty or new folder with -o")
        manifest = {
            "format": FORMAT,
            "created": datetime.now(UTC).isoformat(),
            "command": sys.argv,
            "versions": environment(),
            "status": "running",
            "files": {},
            **facts,
        }
        run = cls(path, manifest, lock)
        try:
            run.update()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """Takes an existing run to write to it; what a kill left half-written is cleared away.

        RunError when it is no run, is in use, or holds links, through which it would write elsewhere.
        """
        read_manifest(path)
        _refuse_links(path)
        lock = _acquire(path)
        for partial in path.rglob(f".*{PARTIAL}"):
            partial.unlink()
        run = cls(path, read_manifest(path), lock)
        run._settle()
        return run

    def update(self, **facts: Any) -> None:
        """Changes entries of run.json."""
        self.manifest = {**self.manifest, **facts}
        write_json(self.path / MANIFEST, self.manifest)

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """As `replacing`, for a file of the run, whose checksum is recorded in run.json just before the rename."""
        with replacing(self.path / name, lambda partial: self._record(name, partial)) as partial:
            yield partial

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file of the run and records its checksum."""
        with self.replacing(name) as partial:
            partial.write_text(json_text(value), encoding="utf-8")

    def read(self, name: str) -> Any:
        """The value in a JSON file of the run, after comparing the file with its checksum."""
        return read_json(verify(self.path, name))

    def has(self, name: str) -> bool:
        """Whether this run has finished writing a file; RunError when the file was changed since."""
        return name in self.manifest["files"] and (self.path / name).exists() and verify(self.path, name).is_file()

    def drop(self, *names: str) -> None:
        """Removes files that no longer belong to the run's network."""
        self.update(files={name: entry for name, entry in self.manifest["files"].items() if name not in names})
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def adopt(self, name: str) -> None:
        """Records the checksum of a file that was written into the run by somebody else's means."""
        self._record(name, self.path / name)

    def _record(self, name: str, file: Path) -> None:
        before = self.manifest["files"].get(name, {}).get("now")
        self.update(files={**self.manifest["files"], name: {"now": checksum(file), "before": before}})

    def _settle(self) -> None:
        """Records the file that is there where a kill left the one before: the next one's `before` must name it."""
        files = dict(self.manifest["files"])
        for name, entry in files.items():
            file = self.path / name
            if entry.get("before") is not None and file.is_file() and checksum(file) == entry["before"]:
                files[name] = {"now": entry["before"], "before": None}
        if files != self.manifest["files"]:
            self.update(files=files)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Adds one line to a JSON-lines file, on disk when this returns."""
        append_line(self.path / name, record)

    def lines(self, name: str) -> list[Any]:
        """The records of a JSON-lines file, oldest first; none when there is no such file."""
        return read_lines(self.path / name)

    def fail(self, reason: str) -> None:
        """Marks the run as failed; one that has nothing to show yet goes away."""
        if self.manifest["files"] or any(self.path.glob("*.safetensors")):
            self.update(status="failed", error=reason)
        else:
            for name in (MANIFEST, _LOCK):
                (self.path / name).unlink(missing_ok=True)
            self.close()
            with suppress(OSError):  # somebody else put something there
                self.path.rmdir()

    def close(self) -> None:
        """Lets other processes write to this run."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _acquire(path: Path) -> filelock.FileLock:
    lock = filelock.FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise RunError(f"another process is using the run at {path}; wait for it, or choose another folder") from error
    except OSError as error:
        raise RunError(f"cannot lock the run at {path}: {error.strerror or error}; {advice(error)}") from error
    return lock


def in_use(path: Path) -> bool:
    """Whether a process is working on the run; nothing is written."""
    lock = filelock.FileLock(path / _LOCK)
    try:
        if (path / _LOCK).exists():
            lock.acquire(timeout=0)
            lock.release()
        return False
    except (filelock.Timeout, OSError):
        return True


def _refuse_links(path: Path) -> None:
    for entry in path.rglob("*"):
        if entry.is_symlink():
            raise RunError(f"{entry} is a link, and a run writes to its own folder alone; put the file itself there")
