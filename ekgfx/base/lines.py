"""Lines of the user's own code, as messages name them."""

import linecache
import os
import sys
import sysconfig
from pathlib import Path
from types import CodeType, FrameType

import torch

_PACKAGE = Path(__file__).parents[1]
_OURS = tuple(f"{_PACKAGE / part}{os.sep}" for part in ("base", "graph", "tracing", "rewriting", "pipeline"))
_PYTORCH = tuple(f"{path}{os.sep}" for path in torch.__path__)
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep


def is_users(path: str) -> bool:
    """Whether a file is neither PyTorch's nor Python's, and none of those that trace and write forwards."""
    if path.startswith(("<", *_PYTORCH, *_OURS)):
        return False
    return not path.startswith(_STANDARD) or "site-packages" in path


def shown(path: str, number: int) -> str:
    """A line by its place and what is written there."""
    short = os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path
    return f"{short}:{number} `{linecache.getline(path, number).strip()}`"


def calling() -> str:
    """The innermost line of the user's code that is running; "" where none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else shown(frame.f_code.co_filename, frame.f_lineno)


def asking() -> FrameType | None:
    """The frame that runs what led here, without our own, and without those through which a function of a tensor is
    handed on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _between(frame.f_code):
        frame = frame.f_back
    return frame


def _between(code: CodeType) -> bool:
    return code.co_filename.startswith(_OURS) or code.co_name == "__torch_function__"
