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


def returned(model: Any, inputs: tuple[torch.Tensor, ...], flops: float, folder: Any) -> dict[str, Any]:
    """The arguments that a cut changes, once `from_pretrained` has given equal outputs."""
    traced = ekgfx.trace(model, inputs)
    least = ekgfx.search(traced, flops=flops, strategy="uniform", importance="magnitude", uniform_layers=True)
    pruned: Any = ekgfx.prune(model, least, traced, graphs="forbid")
    pruned.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = pruned(*inputs, return_dict=False)[0]
        torch.testing.assert_close(again(*inputs, return_dict=False)[0], wanted)
    names = (name for name in model.config if not name.startswith("_"))
    return {name: pruned.config[name] for name in names if pruned.config[name] != model.config[name]}


def test_a_width_that_would_equal_another_when_doubled_is_told_by_tripling_it(tmp_path: Any) -> None:
    """Of 16 and 32 channels, twice the first leaves out the layer between them. The last stage's attention has one head
    of all its channels, whose width is in a scale, so that stage stays; groups of norms stay four."""
    torch.manual_seed(0)
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = diffusers.AutoencoderKL(
        **ends, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, latent_channels=4
    ).eval()
    changed = returned(model, (torch.randn(2, 3, 16, 16),), 0.85, tmp_path)
    assert changed.keys() <= {"block_out_channels", "latent_channels"}
    assert changed["block_out_channels"][0] < 16 and changed["block_out_channels"][1] == 32


def test_of_two_numbers_whose_product_is_a_width_the_one_that_a_model_takes_moves(tmp_path: Any) -> None:
    """Heads times their width is the stream's width. The width of a head is that of its positions, which are inputs."""
    torch.manual_seed(0)
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8)}
    more = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20}
    model = diffusers.FluxTransformer2DModel(**sizes, **more).eval()
    image, text, pooled = torch.randn(2, 16, 4), torch.randn(2, 6, 24), torch.randn(2, 20)
    inputs = (image, text, pooled, torch.tensor([1.0, 2.0]), torch.rand(16, 3), torch.zeros(6, 3))
    assert returned(model, inputs, 0.7, tmp_path) == {"num_attention_heads": 1}
