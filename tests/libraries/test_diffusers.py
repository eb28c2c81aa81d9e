"""Pruned models of diffusers are still its models: its `from_pretrained` takes back what its arguments can say."""

from typing import Any

import pytest
import torch

import ekgfx
from ekgfx.errors import EkgfxWarning

diffusers = pytest.importorskip("diffusers")


def joint() -> tuple[Any, tuple[torch.Tensor, ...]]:
    """A transformer of two streams, 4 heads of 8, and its inputs."""
    sizes = {"attention_head_dim": 8, "num_attention_heads": 4, "num_layers": 2, "caption_projection_dim": 32}
    more = {"joint_attention_dim": 24, "pooled_projection_dim": 20, "pos_embed_max_size": 16}
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, **sizes, **more
    ).eval()
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 24), torch.randn(2, 20), torch.arange(1, 3)
    return model, inputs


def test_from_pretrained_takes_back_what_the_arguments_say(tmp_path: Any) -> None:
    """Widths are heads times their width, which is in a scale: so whole heads go, and with them the second stream."""
    torch.manual_seed(0)
    model, inputs = joint()
    traced = ekgfx.trace(model, inputs)
    least = ekgfx.search(traced, flops=0.6, strategy="uniform", importance="magnitude", uniform_layers=True)
    pruned: Any = ekgfx.prune(model, least, traced, graphs="forbid")
    changed = {key: value for key, value in pruned.config.items() if key in model.config and value != model.config[key]}
    changed = {key: value for key, value in changed.items() if not key.startswith("_")}
    assert changed == {"num_attention_heads": 3, "caption_projection_dim": 24}
    pruned.save_pretrained(tmp_path)
    again = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path).eval()
    anew = diffusers.SD3Transformer2DModel.from_config(pruned.config).eval()
    anew.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        (wanted,) = pruned(*inputs, return_dict=False)
        for model in (again, anew):
            torch.testing.assert_close(model(*inputs, return_dict=False)[0], wanted)


def test_a_cut_that_no_arguments_say_is_told_of() -> None:
    torch.manual_seed(0)
    model, inputs = joint()
    traced = ekgfx.trace(model, inputs)
    plan = ekgfx.Plan({name: (0,) for name in traced.groups if "ff" in name})
    with pytest.warns(EkgfxWarning, match="no configuration of SD3Transformer2DModel describes this cut"):
        pruned: Any = ekgfx.prune(model, plan, traced)
    assert pruned.config == model.config
