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
@pytest.mark.parametrize(("variable", "kept"), [("", True), ("MALLOC_TRIM_THRESHOLD_", False)])
def test_pages_are_used_again(variable: str, kept: bool) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    own |= {variable: "131072"} if variable else {}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=own, capture_output=True, text=True, check=True)
    said, faults = done.stdout.split()
    assert said == str(kept)
    assert int(faults) < 8 * 16_384 if kept else int(faults) >= 16 * 16_384  # few, or every page every time
