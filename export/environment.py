"""What a timing depends on besides the model."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort
import torch

from ekgfx.runs import directory as run


def environment(threads: int) -> dict[str, str]:
    """The processor, the GPU and its driver, the threads used, the machine's load, and the versions of everything.

    Values are text; what is not there (a GPU) is left out.
    """
    facts: dict[str, str] = {
        "cpu": processor(),
        "cpus": str(available_cpus()),
        "threads": str(threads),
        **run.environment(),
        "onnxruntime": ort.__version__,
    }
    if sys.platform != "win32":
        facts["load"] = f"{os.getloadavg()[0]:.1f}"
    return {**facts, **_gpu()}


def busy(facts: Mapping[str, str], alone: bool = False) -> str:
    """One line when other work competed for the processors while timing began; empty when not. alone: only the own time
    of a thread was counted."""
    if float(facts.get("load", "0")) <= float(facts["cpus"]):
        return ""
    said = f"the machine was busy (load {facts['load']} on {facts['cpus']} CPUs)"
    if alone:
        return f"{said}: what others took of the processor is not counted, but they share its memory and caches"
    return f"{said}: these timings tell little"


def available_cpus() -> int:
    """Processors this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def processor() -> str:
    """What the processor calls itself; its architecture where it does not say."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> Mapping[str, str]:
    if not torch.cuda.is_available():
        return {}
    facts = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        if answer.returncode == 0:
            facts["driver"] = answer.stdout.strip()
    return facts
