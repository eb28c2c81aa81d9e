"""What a search costs is known before it runs."""

import torch
from torch import nn

import ekgfx
from ekgfx.search.effort import fitting_batch


def test_batches_fit_into_memory() -> None:
    # Kept for each sample, in float32: 8×6×6 of the convolution, as many of the ReLU, 8 of the mean, 2 of the head.
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    traced = ekgfx.trace(net, torch.zeros(2, 3, 8, 8))
    sample = 4 * (8 * 36 + 8 * 36 + 8 + 8 + 2)
    assert fitting_batch(traced) == 256
    assert fitting_batch(traced, memory=64 * sample) == 64
    assert fitting_batch(traced, memory=64 * sample - 1) == 32
    assert fitting_batch(traced, memory=1) == 1
