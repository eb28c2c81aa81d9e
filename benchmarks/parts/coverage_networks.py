"""The networks that the sweep over other libraries builds: small configurations, random weights, their use."""

from collections.abc import Callable, Mapping
from typing import Any

from parts.networks import Make, Network, images
from parts.networks_audio import efficientnet_networks, torchaudio_networks
from parts.networks_segmentation import monai_networks, smp_networks
from parts.networks_torchvision import networks as torchvision_networks
from parts.networks_ultralytics import networks as ultralytics_networks


def diffusers_networks() -> dict[str, Make]:
    def saved(pruned: Any) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            pruned.save_pretrained(folder)

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

    def times(batch: int, draw: Any) -> tuple[Any, ...]:
        import torch

        return (torch.arange(1, batch + 1),)

    def context(width: int) -> Callable[[int, Any], tuple[Any, ...]]:
        def more(batch: int, draw: Any) -> tuple[Any, ...]:
            import torch

            return (*times(batch, draw), torch.randn(batch, 6, width, generator=draw, dtype=torch.float64))

        return more

    def joint(batch: int, draw: Any) -> tuple[Any, ...]:
        import torch

        text = torch.randn(batch, 6, 24, generator=draw, dtype=torch.float64)
        return text, torch.randn(batch, 20, generator=draw, dtype=torch.float64), *times(batch, draw)

    def labels(batch: int, draw: Any) -> tuple[Any, ...]:
        import torch

        return (*times(batch, draw), torch.arange(batch) % 5)

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
            times,
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
            lambda d: d.DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                num_layers=2,
                sample_size=8,
                norm_num_groups=4,
                num_embeds_ada_norm=10,
            ),
            labels,
            4,
            8,
            also=True,
        ),
        "PixArtTransformer2DModel": one(
            lambda d: d.PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                sample_size=8,
                cross_attention_dim=32,
                caption_channels=24,
                norm_num_groups=4,
                use_additional_conditions=False,
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


def open_clip_networks() -> dict[str, Make]:
    def make_one(
        vision: dict[str, Any], text: dict[str, Any], kind: str = "CLIP", width: int = 24, **more: Any
    ) -> Make:
        def make() -> Network:
            import open_clip
            import torch

            parts = {"vision_cfg": {"image_size": 32, **vision}, "text_cfg": text, **more}
            made = getattr(open_clip, kind)(embed_dim=width, **parts)
            if kind == "CoCa":
                # its class leaves it as memory happens to be, and has a method for it that fails
                torch.nn.init.normal_(made.text_decoder.text_projection, std=0.1)

            def inputs(batch: int, another: bool) -> tuple[Any, ...]:
                draw = torch.Generator().manual_seed(batch)
                return *images(32, 48)(batch, another), torch.randint(1, 90, (batch, 8), generator=draw)

            def use(pruned: Any) -> None:
                image, tokens = inputs(2, False)
                assert len(pruned.encode_image(image)) == len(pruned.encode_text(tokens)) == 2

            return Network(made, inputs, use)

        return make

    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2}
    vit = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}
    return {
        "ViT": make_one(vit, text),
        "ResNet": make_one({"layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "patch_size": None}, text),
        "timm": make_one(
            {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "linear"}, text, "CustomTextCLIP"
        ),
        "CoCa": make_one(
            {**vit, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
            {**text, "embed_cls": True, "output_tokens": True},
            "CoCa",
            32,  # that of the text, which reads what the images give
            multimodal_cfg={**text, "mlp_ratio": 2, "attn_pooler_heads": 4},
        ),
    }


NETWORKS: Mapping[str, Mapping[str, Make]] = {
    "torchvision": torchvision_networks(),
    "smp": smp_networks(),
    "ultralytics": ultralytics_networks(),
    "diffusers": diffusers_networks(),
    "open_clip": open_clip_networks(),
    "monai": monai_networks(),
    "torchaudio": torchaudio_networks(),
    "efficientnet_pytorch": efficientnet_networks(),
}
