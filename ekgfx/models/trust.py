"""Whose Python a run may import: only what its user named.

A run that was made from `path/file.py:factory`, or from a factory of another package, names code that is imported
whenever the run is loaded; a run that comes from somebody else could name any. So a run carries a signature of that
name, made with a key that belongs to one user on one machine. Where it does not fit, nothing is imported.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from ekgfx.errors import ModelError

OVERRIDE = "EKGFX_TRUST_RUNS"
"""Environment variable: "1" imports what any run names."""
_OURS = ("timm:", "hf:", "torchvision:", "ekgfx.models:")
_named: set[str] = set()


def sign(model: str | None) -> dict[str, str]:
    """The entry of run.json that says that the user named `model`; empty where it names no code of others."""
    if model is None or model.startswith(_OURS):
        return {}
    _named.add(model)
    key = _key()
    return {"signature": "" if key is None else _signature(key, model)}


def check(model: str, manifest: Mapping[str, Any], run: Path) -> None:
    """Refuses to import code that a run names and its user did not (ModelError)."""
    if model.startswith(_OURS) or model in _named or os.environ.get(OVERRIDE) == "1":
        return
    key, signature = _key(), manifest.get("signature")
    if key is None or not isinstance(signature, str) or not hmac.compare_digest(_signature(key, model), signature):
        raise ModelError(
            f"the run {run} would import {model}, and was not made by you on this machine; look at that code, then "
            f"set {OVERRIDE}=1, or load the run in Python with ekgfx.load(path, model=build)"
        )


def _signature(key: bytes, model: str) -> str:
    return hmac.new(key, model.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


@cache
def _key() -> bytes | None:
    """The user's key, made at first use; None where it can neither be read nor kept."""
    folder = platformdirs.user_state_path("ekgfx", appauthor=False)
    file = folder / "key"
    if not folder.is_absolute():  # there is no home
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not file.exists():
            partial = folder / f"key.{os.getpid()}"
            partial.touch(mode=0o600)
            partial.write_bytes(secrets.token_bytes(32))
            try:
                os.link(partial, file)  # whole or not at all, and the first of two processes wins
            except FileExistsError:
                pass
            finally:
                partial.unlink()
        key = file.read_bytes()
    except OSError:
        return None
    return key if len(key) == 32 else None
