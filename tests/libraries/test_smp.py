"""Pruned models of segmentation_models_pytorch: its `from_pretrained` takes back what its arguments can say."""

from typing import Any

import pytest
import torch

import ekgfx

smp = pytest.importorskip("segmentation_models_pytorch")


def test_from_pretrained_takes_a_narrower_decoder_back(tmp_path: Any) -> None:
    """Its arguments name an encoder, and say the widths of the decoder: twice as many of a width, the same of all."""
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, classes=3, decoder_channels=(64, 32, 16, 16, 8)).eval()
    images = torch.randn(2, 3, 64, 64)
    traced = ekgfx.trace(model, images)
    least = ekgfx.search(traced, flops=0.95, strategy="uniform", importance="magnitude", uniform_layers=True)
    pruned: Any = ekgfx.prune(model, least, traced, graphs="forbid")
    changed = {name: value for name, value in pruned.config.items() if model.config[name] != value}
    assert changed.keys() == {"decoder_channels"}
    assert all(new <= old for new, old in zip(changed["decoder_channels"], (64, 32, 16, 16, 8), strict=True))
    pruned.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images), pruned(images))
