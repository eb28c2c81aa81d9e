"""What the C library does with memory that tensors gave back.

glibc hands a block of more than a few hundred kilobytes to the system at once, and each page of the next one is then
mapped and zeroed anew. A network's outputs are such blocks: that was a third of the CPU time of ResNet-50's forward
pass on a virtual machine (`benchmarks/analysis.py freed`).
"""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_OWN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
MOST = 2**31 - 1
"""Bytes at the end of the heap beyond which memory goes back to the system."""


def keep_freed_memory() -> bool:
    """Keeps what this process frees for its next tensors, up to 2 GiB, where the C library is glibc.

    Does nothing where the environment says how memory is to be managed: by a variable of `mallopt(3)`, GLIBC_TUNABLES
    or LD_PRELOAD. The command line calls it; a program of your own may, once, at its beginning.

    Returns:
        Whether it was done.

    Example:
        >>> from ekgfx.base.memory import keep_freed_memory
        >>> done = keep_freed_memory()
    """
    if any(name in os.environ for name in _OWN):
        return False
    try:
        option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return False
    return bool(option(_MMAP_MAX, 0)) and bool(option(_TRIM_THRESHOLD, MOST))
