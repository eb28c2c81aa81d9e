"""The networks that the sweep over other libraries builds: small configurations, random weights, their use."""

from collections.abc import Mapping
from typing import Any

from parts.networks import Make, Network, images
from parts.networks_audio import efficientnet_networks, torchaudio_networks
from parts.networks_diffusers import diffusers_networks
from parts.networks_diffusers_more import further_diffusers_networks
from parts.networks_segmentation import monai_networks, smp_networks
from parts.networks_torchvision import networks as torchvision_networks
from parts.networks_ultralytics import networks as ultralytics_networks


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
    "diffusers": {**diffusers_networks(), **further_diffusers_networks()},
    "open_clip": open_clip_networks(),
    "monai": monai_networks(),
    "torchaudio": torchaudio_networks(),
    "efficientnet_pytorch": efficientnet_networks(),
}
