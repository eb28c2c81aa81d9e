"""More networks of diffusers, one of each further family, in configurations as small as its own tests have."""

from typing import Any

from parts.networks import Inputs, Make, Network, times
from parts.networks_diffusers import saved


def further_diffusers_networks() -> dict[str, Make]:
    """Of more classes of the library, each as its own tests build it."""

    def one(kind: str, inputs: Inputs, options: dict[str, Any], **more: Any) -> Make:
        def make() -> Network:
            import diffusers

            return Network(getattr(diffusers, kind)(**options), inputs, saved, **more)

        return make

    def given(*wanted: Any, single: bool = False) -> Inputs:
        """A shape after the batch, "times", or what a function makes of (batch, whether of another size)."""

        def make(batch: int, another: bool) -> tuple[Any, ...]:
            import torch

            draw = torch.Generator().manual_seed(batch)

            def tensor(said: Any) -> Any:
                if said == "times":
                    return times(batch)
                if callable(said):
                    return said(batch, another)
                shape = said[another] if isinstance(said[0], tuple) else said
                return torch.randn(batch, *shape, generator=draw, dtype=torch.float32 if single else torch.float64)

            return tuple(map(tensor, wanted))

        return make

    def places(batch: int, another: bool) -> Any:
        """Of the tokens of an image, the same in every batch: Flux."""
        import torch

        count = 24 if another else 16
        return torch.arange(count * 3, dtype=torch.float64).view(count, 3) % 5

    def codes(batch: int, another: bool) -> Any:
        import torch

        return torch.arange(batch * 8 * (12 if another else 8)).view(batch, 8, -1) % 20

    def zeros(batch: int, another: bool) -> Any:
        import torch

        return torch.zeros(6, 3, dtype=torch.float64)

    def rotary(batch: int, another: bool) -> Any:
        import torch

        return (torch.ones(17, 4, dtype=torch.float64),) * 2

    def sides(channels: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (channels, size, size), (channels, size + size // 2, size)

    small = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    crossed = {"cross_attention_dim": 24, "attention_head_dim": 4, "in_channels": 4, **small}
    text, plain = (6, 24), {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4}
    multiscale = {f"{end}_qkv_multiscales": ((), (5,)) for end in ("encoder", "decoder")}
    multiscale |= {f"{end}_block_types": ("ResBlock", "EfficientViTBlock") for end in ("encoder", "decoder")}
    multiscale |= {f"{end}_block_out_channels": (8, 8) for end in ("encoder", "decoder")}
    multiscale |= {f"{end}_layers_per_block": (1, 1) for end in ("encoder", "decoder")}
    tiny = {f"{end}_block_out_channels": (8, 8) for end in ("encoder", "decoder")}
    tiny |= {f"num_{end}_blocks": (1, 1) for end in ("encoder", "decoder")}
    ends = {
        "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
        "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip"),
    }
    return {
        "AutoencoderTiny": one(
            "AutoencoderTiny", given(sides(3, 16), single=True), {"latent_channels": 4, **tiny}, double=False
        ),
        "AutoencoderDC": one(
            "AutoencoderDC",
            given(sides(3, 16), single=True),
            {
                **multiscale,
                "latent_channels": 4,
                "attention_head_dim": 4,
                "downsample_block_type": "conv",
                "upsample_block_type": "interpolate",
            },
            double=False,
        ),
        "UNet1DModel": one(
            "UNet1DModel",
            given(((4, 32), (4, 48)), "times"),
            {
                "block_out_channels": (32, 64),
                "sample_size": 32,
                "in_channels": 4,
                "out_channels": 4,
                "extra_in_channels": 64,
                **ends,
            },
        ),
        "UNet3DConditionModel": one(
            "UNet3DConditionModel",
            given(((4, 3, 16, 16), (4, 3, 24, 16)), "times", text),
            {
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
                "out_channels": 4,
                **crossed,
            },
        ),
        "ControlNetModel": one(
            "ControlNetModel",
            given(sides(4, 16), "times", text, sides(3, 32)),
            {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "conditioning_embedding_out_channels": (8, 16),
                **crossed,
            },
        ),
        "PriorTransformer": one(
            "PriorTransformer",
            given((16,), "times", (16,), (6, 16)),
            {
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_layers": 2,
                "embedding_dim": 16,
                "num_embeddings": 6,
                "additional_embeddings": 4,
            },
        ),
        "FluxTransformer2DModel": one(
            "FluxTransformer2DModel",
            given(((16, 4), (24, 4)), text, (20,), "times", places, zeros),
            {
                "patch_size": 1,
                "num_layers": 1,
                "num_single_layers": 1,
                "joint_attention_dim": 24,
                "pooled_projection_dim": 20,
                "axes_dims_rope": (4, 4, 8),
                **plain,
            },
        ),
        "AuraFlowTransformer2DModel": one(
            "AuraFlowTransformer2DModel",
            given(sides(4, 8), text, "times"),
            {
                "sample_size": 8,
                "num_mmdit_layers": 1,
                "num_single_dit_layers": 1,
                "attention_head_dim": 8,
                "num_attention_heads": 4,
                "caption_projection_dim": 32,
                "joint_attention_dim": 24,
                "out_channels": 4,
                "pos_embed_max_size": 64,
            },
        ),
        "SanaTransformer2DModel": one(
            "SanaTransformer2DModel",
            given(sides(4, 8), text, "times", single=True),
            {
                "out_channels": 4,
                "num_layers": 2,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 16,
                "cross_attention_dim": 32,
                "caption_channels": 24,
                "mlp_ratio": 2,
                "sample_size": 8,
                **plain,
            },
            double=False,
        ),
        "UVit2DModel": one(
            "UVit2DModel",
            given(codes, (6, 12), (8,), (5,)),
            {
                "hidden_size": 16,
                "cond_embed_dim": 8,
                "micro_cond_encode_dim": 2,
                "micro_cond_embed_dim": 10,
                "encoder_hidden_size": 12,
                "vocab_size": 32,
                "codebook_size": 20,
                "in_channels": 16,
                "block_out_channels": 16,
                "num_res_blocks": 1,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 32,
                "sample_size": 8,
            },
        ),
        "CogVideoXTransformer3DModel": one(
            "CogVideoXTransformer3DModel",
            given((2, 4, 8, 8), text, "times"),
            {
                "out_channels": 4,
                "time_embed_dim": 8,
                "text_embed_dim": 24,
                "num_layers": 1,
                "sample_width": 8,
                "sample_height": 8,
                "sample_frames": 5,
                "max_text_seq_length": 6,
                **plain,
            },
        ),
        "WanTransformer3DModel": one(
            "WanTransformer3DModel",
            given(((4, 2, 8, 8), (4, 2, 12, 8)), "times", text, single=True),
            {
                "out_channels": 4,
                "text_dim": 24,
                "freq_dim": 16,
                "ffn_dim": 32,
                "num_layers": 2,
                "rope_max_seq_len": 32,
                **plain,
            },
            double=False,
        ),
        "StableAudioDiTModel": one(
            "StableAudioDiTModel",
            given((4, 16), "times", (6, 12), (1, 8), rotary),
            {
                "sample_size": 16,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 1,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "num_key_value_attention_heads": 1,
                "cross_attention_dim": 12,
                "time_proj_dim": 8,
                "global_states_input_dim": 8,
                "cross_attention_input_dim": 12,
            },
            exports=False,
        ),
    }
