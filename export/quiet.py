"""Silence for the exporters' running commentary; errors and exceptions still come through."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

_CHATTERS = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir", "onnxruntime")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings and log lines below ERROR of the packages that write ONNX; each logger gets its level back."""
    loggers = [logging.getLogger(name) for name in _CHATTERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def headline(error: BaseException) -> str:
    """The first line of an exception's message that says something, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
