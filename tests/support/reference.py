"""What was recorded from the EKG authors' program (see docs/ekg.md), and their network in our names.

The recorded values (thresholds, scores, ranks, knowledge, candidates; 200 kB) lie in `recorded` beside this file. Their
weights (7 MB) and CIFAR-10 are not published with the project: a test that needs them skips where they are missing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ekgfx.models import resnet56_cifar_projection, tensorflow_state_dict

RECORDED = Path(__file__).parent / "recorded"
VAL_BATCH = 256
STAGES = ((16, 32), (32, 16), (64, 8))
"""Channels and image size of the three stages."""


def gate_names() -> list[str]:
    """Our group for each of the program's 30 gates: per stage the stream, then the inner convolution of nine blocks."""
    streams = ["conv1", "layer2.0.conv2", "layer3.0.conv2"]
    return [
        name
        for stage, stream in enumerate(streams, 1)
        for name in (stream, *(f"layer{stage}.{block}.conv1" for block in range(9)))
    ]


def resnet56_cost(kept: list[int]) -> int:
    """The program's cost counter, by hand: conv MACs + 2·H·W·C per norm + the classifier. kept: channels per gate."""
    total, width_in = 0, 3
    for stage, (_, size) in enumerate(STAGES):
        stream, inner = kept[10 * stage], kept[10 * stage + 1 : 10 * stage + 10]
        if stage == 0:
            total += size * size * (9 * width_in * stream + 2 * stream)
        else:
            total += size * size * (width_in * stream + 2 * stream)
        for block, middle in enumerate(inner):
            before = (stream if stage == 0 else width_in) if block == 0 else stream
            total += size * size * (9 * before * middle + 2 * middle + 9 * middle * stream + 2 * stream)
        width_in = stream
    return total + width_in * 10


@dataclass(frozen=True)
class Reference:
    """The recorded files, read on demand. folder: where the weights and the larger files are; data: with cifar10."""

    folder: Path
    data: Path

    def file(self, name: str) -> Path:
        """A recorded file; the test skips where it is not published with the project and not at hand."""
        published = RECORDED / name
        path = published if published.is_file() else self.folder / name
        if not path.is_file():
            pytest.skip(f"no {path}; set EKGFX_REFERENCE to the folder with ekg/")
        return path

    def npz(self, name: str) -> dict[str, np.ndarray]:
        return dict(np.load(self.file(name)))

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file(name).read_text().splitlines()]

    def json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text())

    def model(self) -> nn.Module:
        """The network the search started from."""
        model = resnet56_cifar_projection()
        model.load_state_dict(tensorflow_state_dict(self.npz("weights_after_finetune.npz")), strict=False)
        return model.eval()

    def batches(self, which: str = "val_idx") -> list[tuple[Tensor, Tensor]]:
        """The 320 validation images in the program's order, in batches of 256 and 64; or those of train_sub_idx."""
        files = [self.data / "cifar10" / f"train-{i}.npz" for i in range(4)]
        if not files[0].is_file():
            pytest.skip(f"no {files[0]}; set EKGFX_DATA to the folder with cifar10/ and weights/")
        parts = [np.load(file) for file in files]
        index = self.npz("sampler_indices.npz")[which]
        images = np.concatenate([part["images"] for part in parts])[index]
        labels = torch.from_numpy(np.concatenate([part["labels"] for part in parts])[index]).long()
        shown = torch.from_numpy(images).float().permute(0, 3, 1, 2).contiguous()
        mean = torch.tensor([113.9, 123.0, 125.3]).view(3, 1, 1)
        std = torch.tensor([66.7, 62.1, 63.0]).view(3, 1, 1)
        return list(zip(((shown - mean) / std).split(VAL_BATCH), labels.split(VAL_BATCH), strict=True))

    def knowledge(self, step: int) -> Tensor:
        """T that candidates of step 0 and 1 are rewarded with, 320 × 10 (files are numbered by the step to come)."""
        return torch.from_numpy(np.load(self.file(f"knowledge_after_{step + 1}.npy")))

    def widths(self, step: int) -> list[float]:
        """Width ratio of every gate before a step."""
        return self.lines("search_steps_0-3.jsonl")[step - 1]["width_list"] if step else [1.0] * 30

    def orders(self, step: int) -> list[np.ndarray]:
        """Rank of every channel of every gate at steps 0 to 2."""
        scores = self.npz(f"scores_step{step:02d}.npz")
        return [scores[f"order{gate:02d}"].ravel() for gate in range(30)]

    def scores(self, step: int) -> list[np.ndarray]:
        """Importance of every channel of every gate at steps 0 to 2."""
        scores = self.npz(f"scores_step{step:02d}.npz")
        return [scores[f"score{gate:02d}"].ravel() for gate in range(30)]
