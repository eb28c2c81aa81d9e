"""A repair that is under way, in one safetensors file: what is refitted so far, and the records in its header."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ekgfx.base.files import replacing
from ekgfx.base.schema import read
from ekgfx.errors import RunError
from ekgfx.repair.walk import LayerRepair

SECONDS = 20.0
"""Between two checkpoints."""
FORMAT = 1


class Progress:
    """Writes a checkpoint now and then, and finds the one that an interrupted repair has left.

    identity: what must be the same for a repair to go on. path: None writes none.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any], names: Sequence[str]) -> None:
        self.path, self.identity, self.names = path, dict(identity), list(names)
        self.written = time.monotonic()

    def load(self) -> tuple[int, list[LayerRepair], dict[str, Tensor]]:
        """Operators that are done, their records, and weights that changed; nothing where there is no checkpoint, or
        one of another repair. Raises RunError: it is damaged."""
        if self.path is None or not self.path.is_file():
            return 0, [], {}
        try:
            with safe_open(self.path, "pt") as file:
                told = json.loads((file.metadata() or {})["repair"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no iterator of its own
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise RunError(f"{self.path} is damaged ({error}); delete it, and the repair starts anew") from error
        if told.get("format") != FORMAT:
            raise RunError(f"{self.path} has a format that this ekgfx does not read; upgrade ekgfx, or delete it")
        if told.get("identity") != self.identity:
            return 0, [], {}
        layers = [read(LayerRepair, layer, str(self.path), RunError) for layer in told["layers"]]
        return int(told["done"]), layers, weights

    def save(self, done: int, layers: Sequence[LayerRepair], weights: Mapping[str, Tensor]) -> None:
        """Writes the checkpoint, unless one was written a moment ago."""
        if self.path is None or time.monotonic() - self.written < SECONDS:
            return
        state = {
            "format": FORMAT,
            "identity": self.identity,
            "done": done,
            "layers": [asdict(layer) for layer in layers],
        }
        plain = {name: weights[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in self.names}
        with replacing(self.path) as partial:
            save_file(plain, partial, metadata={"repair": json.dumps(state)})
        self.written = time.monotonic()
