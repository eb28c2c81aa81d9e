"""Networks of diffusers: small configurations of those that most pipelines are made of."""

from collections.abc import Callable
from typing import Any

from parts.networks import Make, Network, images, times


def saved(pruned: Any) -> None:
    """As the library saves a model."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)


def diffusers_networks() -> dict[str, Make]:
    def one(
        build: Callable[[Any], Any],
        more: Callable[[int, Any], tuple[Any, ...]],
        channels: int,
        size: int,
        also: bool = False,
    ) -> Make:
        def make() -> Network:
            import diffusers
            import torch

            def inputs(batch: int, another: bool) -> tuple[Any, ...]:
                (image,) = images(size, size + size // 2, channels)(batch, another)
                return image, *more(batch, torch.Generator().manual_seed(batch))

            return Network(build(diffusers), inputs, saved, also=also)

        return make

    def context(width: int) -> Callable[[int, Any], tuple[Any, ...]]:
        def more(batch: int, draw: Any) -> tuple[Any, ...]:
            import torch

            return (times(batch), torch.randn(batch, 6, width, generator=draw, dtype=torch.float64))

        return more

    def joint(batch: int, draw: Any) -> tuple[Any, ...]:
        import torch

        text = torch.randn(batch, 6, 24, generator=draw, dtype=torch.float64)
        return text, torch.randn(batch, 20, generator=draw, dtype=torch.float64), times(batch)

    def labels(batch: int, draw: Any) -> tuple[Any, ...]:
        import torch

        return times(batch), torch.arange(batch) % 5

    tokens = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "sample_size": 8}
    tokens |= {"norm_num_groups": 4}
    small = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}

    def autoencoder(kind: str) -> Any:
        ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        return one(lambda d: getattr(d, kind)(**ends, **small), lambda batch, draw: (), 3, 16)

    return {
        "UNet2DModel": one(
            lambda d: d.UNet2DModel(
                sample_size=16,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=8,
                **small,
            ),
            lambda batch, draw: (times(batch),),
            3,
            16,
        ),
        "UNet2DConditionModel": one(
            lambda d: d.UNet2DConditionModel(
                sample_size=16,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=24,
                attention_head_dim=8,
                **small,
            ),
            context(24),
            4,
            16,
        ),
        "AutoencoderKL": autoencoder("AutoencoderKL"),
        "VQModel": autoencoder("VQModel"),
        "DiTTransformer2DModel": one(
            lambda d: d.DiTTransformer2DModel(num_embeds_ada_norm=10, **tokens),
            labels,
            4,
            8,
            also=True,
        ),
        "PixArtTransformer2DModel": one(
            lambda d: d.PixArtTransformer2DModel(
                out_channels=4, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False, **tokens
            ),
            lambda batch, draw: context(24)(batch, draw)[::-1],
            4,
            8,
            also=True,
        ),
        "SD3Transformer2DModel": one(
            lambda d: d.SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=24,
                caption_projection_dim=32,
                pooled_projection_dim=20,
                out_channels=4,
                pos_embed_max_size=16,
            ),
            joint,
            4,
            8,
        ),
    }
