"""What PyTorch says of an export that fails, kept from users: it is in the exception as well."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What PyTorch logs and prints about an export that fails is in the exception as well: it goes no further."""
    printed, known = io.StringIO(), logging.root.manager.loggerDict.values()
    loggers = [
        logger for logger in known if isinstance(logger, logging.Logger) and f"{logger.name}.".startswith("torch.")
    ]
    handlers = {handler for logger in loggers for handler in logger.handlers}  # PyTorch gives most of them their own

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    for handler in handlers:
        handler.addFilter(passes)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
            # What a forward keeps is put back; recurrent layers look at a list of their own parameters in each.
            warnings.filterwarnings(
                "ignore", message=r"The tensor attributes? self\..*(was|were) assigned during export"
            )
            yield
        sys.stderr.write(printed.getvalue())  # what the user's own forward says
    finally:
        for handler in handlers:
            handler.removeFilter(passes)
