"""Prune any PyTorch model to a budget, keep its accuracy, prove the speed-up."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ekgfx.errors import EkgfxError

if TYPE_CHECKING:
    from ekgfx.bank import Bank, build_bank
    from ekgfx.graph.plan import Plan
    from ekgfx.repair import repair
    from ekgfx.rewriting.patched import Replacement, replaced
    from ekgfx.rules import rule
    from ekgfx.runs.checkpoint import load, save
    from ekgfx.search import search
    from ekgfx.search.ratios import plan
    from ekgfx.search.sensitivity import sensitivity
    from ekgfx.surgery.calibrate import calibrate
    from ekgfx.surgery.cut import prune
    from ekgfx.surgery.restored import restore_statistics
    from ekgfx.surgery.transfer import transfer
    from ekgfx.tracing.trace import trace
    from ekgfx.tracing.traced import TracedModel
    from ekgfx.training.finetune import finetune
    from ekgfx.training.loss import EKGLoss

__version__ = "0.1.0"

__all__ = [
    "trace",
    "TracedModel",
    "search",
    "plan",
    "sensitivity",
    "prune",
    "calibrate",
    "restore_statistics",
    "transfer",
    "replaced",
    "Replacement",
    "repair",
    "build_bank",
    "finetune",
    "save",
    "load",
    "Plan",
    "Bank",
    "EKGLoss",
    "rule",
    "EkgfxError",
    "__version__",
]

# Public name → the file that defines it; a new one goes here, into __all__ and into the imports above. They are loaded
# at first use, so that `ekgfx --help` does not wait for torch (a test checks it).
_HOMES = {
    "trace": "tracing.trace",
    "TracedModel": "tracing.traced",
    "search": "search",
    "plan": "search.ratios",
    "sensitivity": "search.sensitivity",
    "prune": "surgery.cut",
    "calibrate": "surgery.calibrate",
    "restore_statistics": "surgery.restored",
    "transfer": "surgery.transfer",
    "replaced": "rewriting.patched",
    "Replacement": "rewriting.patched",
    "repair": "repair",
    "build_bank": "bank",
    "finetune": "training.finetune",
    "save": "runs.checkpoint",
    "load": "runs.checkpoint",
    "Plan": "graph.plan",
    "Bank": "bank",
    "EKGLoss": "training.loss",
    "rule": "rules",
}
_SUBMODULES = ("data", "export", "hub", "landscape", "models")

# In a clone, `export/` and `recipes/` stand beside this folder and setuptools moves them into the package when it
# builds. Python started in the clone's root takes `./ekgfx` for the installed package and would not find them; the root
# is therefore one more place to look for submodules. A built package holds `export/` itself and looks nowhere else, and
# after `pip install -e` both ways lead to the same files.
_here = Path(__file__).parent
if not (_here / "export").is_dir() and (_here.parent / "export" / "__init__.py").is_file():
    __path__.append(str(_here.parent))


class _Package(ModuleType):
    """Lets a public function and the package of the same name live together: `ekgfx.search(...)` next to
    `from ekgfx.search.race import Race`. Importing a submodule sets it as an attribute of its package, and would
    hide the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"ekgfx.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"ekgfx.{name}")
    raise AttributeError(f"module 'ekgfx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
