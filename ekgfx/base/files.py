"""Files that survive a kill at any moment and say clearly what the disk refuses.

A file is written beside its place, flushed to disk and renamed, so that it is either the old one or the new one. Line
files only grow; a last line that was torn by a kill does not count.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from ekgfx.errors import RunError

NO_SPACE = "free some space, then start again or go on with --resume"
PARTIAL = ".part"
"""How the name of a file ends that is still being written."""


@contextmanager
def replacing(path: Path, before_rename: Callable[[Path], None] = lambda _: None) -> Iterator[Path]:
    """Yields a path beside `path` to write to; when the block ends well, that file is flushed and takes `path`'s place.

    before_rename: called with the finished file. Raises RunError when the disk refuses (no space, no permission);
    `path` then is as it was.
    """
    if not path.name:
        raise RunError(f"cannot write '{path}': it names no file")
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        partial.touch()
        usual = partial.stat().st_mode
        yield partial
        partial.chmod(usual)  # some writers put a file of their own in its place, that nobody else may read
        with partial.open("r+b") as written:
            os.fsync(written.fileno())
        before_rename(partial)
        os.replace(partial, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; {advice(error)}") from error
    except SafetensorError as error:  # how that library reports what the disk refuses
        raise RunError(f"cannot write {path}: {error}; {NO_SPACE}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, wholly or not at all; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path` as indented JSON, wholly or not at all. NaN and infinity are refused (ValueError)."""
    write_text(path, json_text(value))


def read_json(path: Path) -> Any:
    """The value in a JSON file; RunError when it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing; a run is made by `ekgfx prune -o {path.parent}`") from error
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}; restore it, or start a new run") from error


def checksum(path: Path) -> dict[str, Any]:
    """What `verify` compares: the file's length in bytes and its SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line to a JSON-lines file, on disk when this returns; a torn last line gives way to it."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with path.open("ab+") as file:
            file.truncate(_whole_lines(file))
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; {advice(error)}") from error


def read_lines(path: Path) -> list[Any]:
    """The records of a JSON-lines file; a last line without its end (being written, or torn) is left out."""
    if not path.exists():
        return []
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()]
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}; restore it, or start a new run") from error


def _whole_lines(file: BinaryIO) -> int:
    """How many bytes of a file its whole lines take, looked up from its end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - 4096, 0)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _flush_folder(path: Path) -> None:
    """Makes a rename in this folder last (POSIX; Windows has no such call)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def json_text(value: Any) -> str:
    """A value as a JSON file holds it: indented, one line end at its end. NaN and infinity are refused (ValueError)."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def advice(error: OSError) -> str:
    """What to do about what the operating system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NO_SPACE
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it writable, or choose another folder"
    return "check the folder, or choose another"
