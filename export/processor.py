"""What the processor has for integer arithmetic."""

import platform
from pathlib import Path

import torch

# The kernel's names of what multiplies 8-bit integers and adds up in 32 bits.
_UNITS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "i8mm": "Arm i8mm",
    "asimddp": "Arm dot product",
}


def integer_unit(info: Path = Path("/proc/cpuinfo")) -> str:
    """The best instructions for INT8 that the processor has; empty where it has none, or does not say so."""
    if info.is_file():
        flags = set(info.read_text(encoding="utf-8", errors="replace").split())
        return next((name for flag, name in _UNITS.items() if flag in flags), "")
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_vnni_supported():
        return "VNNI"
    return "Arm dot product" if platform.machine() == "arm64" else ""  # every Apple processor of that name has it


def no_integer_unit() -> str:
    """One line where INT8 has no instructions of its own here; empty where it has."""
    if integer_unit():
        return ""
    return (
        "this processor has no VNNI, AMX or dot-product instructions: INT8 may be no faster here than fp32; "
        "weights are rounded to 7 bits, so that sums in 16 bits cannot overflow"
    )
