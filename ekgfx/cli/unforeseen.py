"""What the command line says of an exception that nobody foresaw: one line, and a file for whoever can mend it."""

import os
import tempfile
import traceback
from pathlib import Path

_OURS = str(Path(__file__).parents[1]) + os.sep


def unforeseen(error: Exception) -> str:
    """What was raised and where, in one line; the whole traceback goes to a file in the folder for temporary ones."""
    trace = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in trace if "site-packages" not in frame.filename and not frame.filename.startswith(_OURS)]
    frame = users[-1] if users and "importlib" not in users[-1].filename else trace[-1]
    where = f"{frame.filename}:{frame.lineno}"
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{what} (at {where}), which ekgfx did not expect; {_written(error)}"


def _written(error: Exception) -> str:
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="ekgfx-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return "there is no room to write down where it came from"
    return f"please report it with {file.name}, unless the line is your own"
