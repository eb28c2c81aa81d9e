"""Fixtures that several test files share."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.reference import Reference


# Benchmarks run as scripts and import what lies beside them; last, so that no other package is hidden.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))


def development_data() -> Path:
    """The folder with real data and weights, if there is one: EKGFX_DATA, by default ../shared/data beside the
    repository."""
    return Path(os.environ.get("EKGFX_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data and weights."""
    path = development_data()
    if not path.is_dir():
        pytest.skip(f"no development data in {path}; set EKGFX_DATA to the folder with cifar10/ and weights/")
    return path


@pytest.fixture(scope="session", autouse=True)
def state_of_its_own(tmp_path_factory) -> None:
    """The key that runs are signed with is one of the tests, here and in processes started from here."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The networks here are small: a second thread of torch gains little, and loses much on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet_after_commands() -> Iterator[None]:
    """The command line shows what is logged at INFO from its first call on; other tests are as without it."""
    log = logging.getLogger("ekgfx")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture(scope="session")
def reference() -> "Reference":
    """What was recorded from the EKG authors' program."""
    from tests.support.reference import Reference

    data = development_data()
    return Reference(Path(os.environ.get("EKGFX_REFERENCE", data.parent / "reference")) / "ekg", data)
