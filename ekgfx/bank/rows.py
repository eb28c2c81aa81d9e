"""How one training sample's logits lie in a file of the memory bank: whole, or the largest few."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ekgfx.errors import TrainingError
from ekgfx.training.loss import softened_kl

Rows = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class RowFormat:
    """How one sample lies in a row: its index in the data set, and its logits in half precision.

    shape: of a sample's logits (C, or C × … for dense outputs). top_k: None keeps all of them; a number k keeps the k
    largest with their classes, and one value for the rest that keeps their share of softmax(z/T).
    """

    shape: tuple[int, ...]
    top_k: int | None = None
    temperature: float = 1.0

    @property
    def dtype(self) -> np.dtype[Any]:
        """The row as a NumPy structure."""
        if self.top_k is None:
            return np.dtype([("sample", "<u4"), ("values", "<f2", self.shape)])
        index = "<u2" if self.shape[0] <= 2**16 else "<u4"
        return np.dtype([("sample", "<u4"), ("values", "<f2", (self.top_k + 1,)), ("classes", index, (self.top_k,))])

    def encode(self, index: Tensor, logits: Tensor) -> Rows:
        """Sample indices B and logits B × C × … → B rows.

        Raises TrainingError where the logits are not finite in half precision.
        """
        rows = np.empty(len(logits), self.dtype)
        rows["sample"] = index.numpy()
        if self.top_k is None:
            rows["values"] = logits.half().cpu().numpy()
        else:
            top = logits.topk(self.top_k, dim=1)
            rest = (logits / self.temperature).scatter(1, top.indices, -torch.inf).logsumexp(1, keepdim=True)
            rest = self.temperature * (rest - np.log(self.shape[0] - self.top_k))
            rows["values"] = torch.cat([top.values, rest], 1).half().cpu().numpy()
            rows["classes"] = top.indices.cpu().numpy()
        if not np.isfinite(rows["values"]).all():
            raise TrainingError(
                "a teacher's logits are not finite in half precision (65504 at most); check its weights"
            )
        return rows

    def decode(self, rows: Rows) -> Tensor:
        """B rows → logits B × C × …, float32."""
        values = torch.from_numpy(rows["values"].astype(np.float32))
        if self.top_k is None:
            return values
        logits = values[:, -1:].repeat(1, self.shape[0])
        return logits.scatter(1, torch.from_numpy(rows["classes"].astype(np.int64)), values[:, :-1])


def infidelity(row: RowFormat, rows: Rows, logits: Tensor) -> float:
    """Σ_samples KL_T(full ‖ stored): what the row format loses. logits: B × C × …, from which `rows` were made."""
    full, stored = logits.float().cpu().movedim(1, -1), row.decode(rows).movedim(1, -1)
    return float(softened_kl(full, stored, row.temperature).reshape(len(rows), -1).mean(1).sum())
