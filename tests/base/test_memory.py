"""Freed memory is kept for the next tensor, unless the environment says otherwise."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from ekgfx.base.memory import keep_freed_memory

kept = keep_freed_memory()
for _ in range(4):
    torch.ones(1 << 24).add(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 24).add(1)  # two blocks of 64 MiB, each of 16,384 pages
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told to keep memory")
def test_pages_are_used_again_unless_the_environment_says_otherwise() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    faults = {}
    for variables in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"}):
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, env=own | variables, capture_output=True, text=True, check=True)
        kept, number = done.stdout.split()
        faults[kept] = int(number)
    assert faults.keys() == {"True", "False"}
    if faults["False"] < 1_000:
        pytest.skip("this system maps pages of 2 MiB: there is little to see")
    assert faults["True"] < faults["False"] / 2
