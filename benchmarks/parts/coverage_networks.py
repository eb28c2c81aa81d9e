"""The networks that the sweep over other libraries builds: small configurations, random weights, their use."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Network:
    """model: as the library makes it. inputs: (batch, whether of another size) → its positional arguments. use: what
    people do with such a model, tried on the cut one; leaf: as `ekgfx.trace` takes it. exports: to ONNX, from here."""

    model: Any
    inputs: Callable[[int, bool], tuple[Any, ...]]
    use: Callable[[Any], Any] | None = None
    leaf: tuple[str, ...] = ()
    exports: bool = True


Make = Callable[[], Network]


def images(size: int, other: int, channels: int = 3) -> Callable[[int, bool], tuple[Any, ...]]:
    """Random images in float64."""

    def make(batch: int, another: bool) -> tuple[Any, ...]:
        import torch

        side = other if another else size
        draw = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, channels, side, side, generator=draw, dtype=torch.float64),)

    return make


def torchvision_networks() -> dict[str, Make]:
    def classifier(name: str, size: int, other: int) -> Make:
        def make() -> Network:
            import torchvision

            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            return Network(
                torchvision.models.get_model(name, weights=None, num_classes=7, **options), images(size, other)
            )

        return make

    def segmenter(name: str) -> Make:
        def make() -> Network:
            import torchvision

            model = torchvision.models.get_model(
                name, weights=None, weights_backbone=None, num_classes=5, aux_loss=None
            )
            return Network(model, images(64, 96))

        return make

    def backbone(name: str) -> Make:
        def make() -> Network:
            import torch
            import torchvision

            detector = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5).double()

            def use(pruned: Any) -> None:
                detector.backbone = pruned
                detector.eval()([torch.rand(3, 64, 80, dtype=torch.float64)])

            return Network(detector.backbone, images(64, 96), use)

        return make

    small = "alexnet densenet121 efficientnet_b0 googlenet mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf"
    small += " resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 vgg11_bn convnext_tiny swin_t swin_v2_t"
    found: dict[str, Make] = {name: classifier(name, 64, 96) for name in small.split()}
    found |= {"inception_v3": classifier("inception_v3", 128, 160), "vit_b_16": classifier("vit_b_16", 224, 224)}
    found |= {"maxvit_t": classifier("maxvit_t", 224, 224)}
    found |= {n: segmenter(n) for n in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50")}
    detectors = "fasterrcnn_mobilenet_v3_large_320_fpn ssdlite320_mobilenet_v3_large retinanet_resnet50_fpn"
    return found | {n: backbone(n) for n in detectors.split()}


def smp_networks() -> dict[str, Make]:
    def make_one(kind: str, encoder: str) -> Make:
        def make() -> Network:
            import segmentation_models_pytorch as smp
            import torch

            model = smp.create_model(kind, encoder_name=encoder, encoder_weights=None, classes=3)

            def use(pruned: Any) -> None:
                image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
                assert torch.equal(pruned.predict(image), pruned.eval()(image))
                loss = smp.losses.DiceLoss("multiclass")(pruned(image), torch.zeros(1, 64, 64, dtype=torch.long))
                loss.backward()

            return Network(model, images(64, 96), use)

        return make

    kinds = "unet unetplusplus manet linknet fpn pspnet pan deeplabv3 deeplabv3plus upernet segformer"
    found = {kind: make_one(kind, "resnet18") for kind in kinds.split()}
    return found | {"unet-mobilenet_v2": make_one("unet", "mobilenet_v2"), "unet-mit_b0": make_one("unet", "mit_b0")}


def ultralytics_networks() -> dict[str, Make]:
    def make_one(file: str) -> Make:
        def make() -> Network:
            import numpy as np
            from ultralytics import RTDETR, YOLO

            yolo = (RTDETR if file.startswith("rtdetr") else YOLO)(f"{file}.yaml")

            def use(pruned: Any) -> None:
                yolo.model, yolo.predictor = pruned.float().eval(), None
                yolo.predict(np.zeros((96, 96, 3), dtype=np.uint8), imgsz=96, verbose=False)
                pruned.double()

            return Network(yolo.model, images(64, 96), use, exports=False)

        return make

    files = "yolov8n yolov8n-seg yolov8n-pose yolov8n-cls yolov8n-obb yolov5n yolov9t yolov10n yolo11n yolo12n"
    return {file: make_one(file) for file in [*files.split(), "rtdetr-resnet50"]}


def diffusers_networks() -> dict[str, Make]:
    def saved(pruned: Any) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            pruned.save_pretrained(folder)

    def one(build: Callable[[Any], Any], more: Callable[[int, Any], tuple[Any, ...]], channels: int, size: int) -> Make:
        def make() -> Network:
            import diffusers
            import torch

            def inputs(batch: int, another: bool) -> tuple[Any, ...]:
                (image,) = images(size, size + size // 2, channels)(batch, another)
                return image, *more(batch, torch.Generator().manual_seed(batch))

            return Network(build(diffusers), inputs, saved)

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


def monai_networks() -> dict[str, Make]:
    def make_one(build: Callable[[Any], Any], size: int = 32, other: int = 48, channels: int = 1) -> Make:
        def make() -> Network:
            import monai.networks.nets as nets

            return Network(build(nets), images(size, other, channels))

        return make

    flat = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
    return {
        "UNet": make_one(lambda n: n.UNet(channels=(8, 16, 32), strides=(2, 2), num_res_units=1, **flat)),
        "BasicUNet": make_one(lambda n: n.BasicUNet(features=(8, 8, 16, 16, 32, 8), **flat)),
        "AttentionUnet": make_one(lambda n: n.AttentionUnet(channels=(8, 16, 32), strides=(2, 2), **flat)),
        "SegResNet": make_one(lambda n: n.SegResNet(init_filters=8, **flat)),
        "DynUNet": make_one(
            lambda n: n.DynUNet(
                kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[8, 16, 32], **flat
            )
        ),
        "VNet": make_one(lambda n: n.VNet(**flat)),
        "DenseNet121": make_one(lambda n: n.DenseNet121(**flat)),
        "UNETR": make_one(
            lambda n: n.UNETR(1, 3, (32, 32), feature_size=8, hidden_size=48, mlp_dim=64, num_heads=4, spatial_dims=2),
            32,
            32,
        ),
        "SwinUNETR": make_one(
            lambda n: n.SwinUNETR(in_channels=1, out_channels=3, feature_size=12, spatial_dims=2), 32, 64
        ),
        "ViT": make_one(
            lambda n: n.ViT(1, (32, 32), 8, 48, 64, 2, 4, classification=True, num_classes=3, spatial_dims=2), 32, 32
        ),
        "EfficientNetBN": make_one(
            lambda n: n.EfficientNetBN(
                "efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=1, num_classes=3
            )
        ),
    }


NETWORKS: Mapping[str, Mapping[str, Make]] = {
    "torchvision": torchvision_networks(),
    "smp": smp_networks(),
    "ultralytics": ultralytics_networks(),
    "diffusers": diffusers_networks(),
    "open_clip": open_clip_networks(),
    "monai": monai_networks(),
}
