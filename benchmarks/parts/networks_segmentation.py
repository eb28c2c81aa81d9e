"""Networks of segmentation_models_pytorch and of MONAI: every architecture, with small encoders or configurations."""

from collections.abc import Callable
from typing import Any

from parts.networks import Inputs, Make, Network, images, tensors, times


def segmenter(kind: str, encoder: str, size: int = 64, other: int = 96, **options: Any) -> Make:
    """One of segmentation_models_pytorch, and what its users do with it: predict, and train by one of its losses."""

    def make() -> Network:
        import segmentation_models_pytorch as smp
        import torch

        model = smp.create_model(kind, encoder_name=encoder, encoder_weights=None, classes=3, **options)

        def use(pruned: Any) -> None:
            (image,) = images(size, other)(2, False)
            found, again = pruned.predict(image), pruned.eval()(image)
            masks = [each[0] if isinstance(each, tuple) else each for each in (found, again)]
            assert torch.equal(*masks)
            loss = smp.losses.DiceLoss("multiclass")(masks[1], torch.zeros(2, size, size, dtype=torch.long))
            loss.backward()

        return Network(model, images(size, other), use)

    return make


def smp_networks() -> dict[str, Make]:
    small = {"encoder_depth": 4, "decoder_channels": (64, 32, 16, 8)}
    labels = {"aux_params": {"classes": 4, "pooling": "avg", "dropout": 0.2}}
    return {
        "unet": segmenter("unet", "resnet18", **small),
        "unet-labels": segmenter("unet", "mobilenet_v2", **small, **labels),
        "unet-scse": segmenter(
            "unet",
            "timm-regnetx_002",
            decoder_attention_type="scse",
            encoder_depth=4,
            decoder_channels=(128, 64, 32, 16),
        ),
        "unet-mit_b0": segmenter("unet", "mit_b0"),
        "unetplusplus": segmenter("unetplusplus", "mobilenet_v2", **small),
        "manet": segmenter("manet", "mobilenet_v2", **small),
        "linknet": segmenter("linknet", "resnet18", encoder_depth=4),
        "fpn": segmenter("fpn", "efficientnet-b0", decoder_segmentation_channels=32, decoder_pyramid_channels=64),
        "pspnet": segmenter("pspnet", "mobilenet_v2", psp_out_channels=64),
        "pan": segmenter("pan", "mobilenet_v2", 128, 160),
        "deeplabv3": segmenter("deeplabv3", "mobilenet_v2", decoder_channels=64),
        "deeplabv3plus": segmenter("deeplabv3plus", "mobilenet_v2", decoder_channels=64, **labels),
        "upernet": segmenter("upernet", "mobilenet_v2", decoder_channels=64),
        "segformer": segmenter("segformer", "mit_b0", decoder_segmentation_channels=64),
        "dpt": segmenter(
            "dpt",
            "tu-vit_tiny_patch16_224",
            64,
            64,
            img_size=64,
            decoder_intermediate_channels=(32, 48, 64, 64),
            decoder_fusion_channels=32,
        ),
    }


def medical(build: Callable[[Any], Any], inputs: Inputs, masks: bool = True, double: bool = True) -> Make:
    """One of MONAI's; networks that return a mask go through its sliding window and its Dice loss."""

    def make() -> Network:
        import monai.networks.nets as nets

        def use(pruned: Any) -> None:
            import torch
            from monai.inferers import sliding_window_inference
            from monai.losses import DiceLoss

            (image,) = inputs(1, False)
            wide = torch.nn.functional.pad(image, (0, image.shape[-1] // 2))
            found = sliding_window_inference(wide, image.shape[2:], 2, pruned.eval())
            assert found.shape[2:] == wide.shape[2:]
            target = torch.zeros_like(found[:, :1])
            DiceLoss(to_onehot_y=True, softmax=True)(
                pruned(wide[..., : image.shape[-1]]), target[..., : image.shape[-1]]
            ).backward()

        return Network(build(nets), inputs, use if masks else None, double=double)

    return make


def monai_networks() -> dict[str, Make]:
    flat: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
    deep: dict[str, Any] = {**flat, "spatial_dims": 3}
    two, three = images(32, 48, 1), tensors(((1, 16, 16, 16), (1, 16, 32, 16)))
    fixed = images(32, 32, 1)
    steps = {"channels": (8, 16, 32), "strides": (2, 2)}
    heads = {"hidden_size": 48, "mlp_dim": 64, "num_heads": 4, "spatial_dims": 2}
    return {
        "UNet": medical(lambda n: n.UNet(num_res_units=1, **steps, **flat), two),
        "UNet-3d": medical(lambda n: n.UNet(num_res_units=2, **steps, **deep), three),
        "BasicUNet": medical(lambda n: n.BasicUNet(features=(8, 8, 16, 16, 32, 8), **flat), two),
        "BasicUNetPlusPlus": medical(lambda n: n.BasicUNetPlusPlus(features=(8, 8, 16, 16, 32, 8), **flat), two, False),
        "AttentionUnet": medical(lambda n: n.AttentionUnet(**steps, **flat), two),
        "SegResNet": medical(lambda n: n.SegResNet(init_filters=8, **flat), two),
        "SegResNetDS": medical(lambda n: n.SegResNetDS(init_filters=8, dsdepth=2, **flat), two, False),
        "DynUNet": medical(
            lambda n: n.DynUNet(
                kernel_size=[3, 3, 3],
                strides=[1, 2, 2],
                upsample_kernel_size=[2, 2],
                filters=[8, 16, 32],
                res_block=True,
                deep_supervision=True,
                **flat,
            ),
            two,
            False,
        ),
        "VNet": medical(lambda n: n.VNet(**flat), two),
        "HighResNet": medical(lambda n: n.HighResNet(**flat), two),
        "AutoEncoder": medical(
            lambda n: n.AutoEncoder(channels=(8, 16, 32), strides=(2, 2, 2), num_res_units=1, **flat), two
        ),
        "VarAutoEncoder": medical(
            lambda n: n.VarAutoEncoder(2, (1, 32, 32), 3, 8, (8, 16, 32), (2, 2, 2)), fixed, False
        ),
        "UNETR": medical(lambda n: n.UNETR(1, 3, (32, 32), feature_size=8, **heads), fixed),
        "SwinUNETR": medical(
            lambda n: n.SwinUNETR(1, 3, feature_size=12, spatial_dims=2, window_size=4), images(64, 96, 1)
        ),
        "ViT": medical(
            lambda n: n.ViT(1, (32, 32), 8, num_layers=2, classification=True, num_classes=3, **heads), fixed, False
        ),
        "ViTAutoEnc": medical(lambda n: n.ViTAutoEnc(1, (32, 32), 4, 3, num_layers=2, **heads), fixed, False),
        "DenseNet121": medical(lambda n: n.DenseNet121(init_features=16, growth_rate=8, **flat), two, False),
        "ResNet": medical(
            lambda n: n.ResNet("bottleneck", [1, 1, 1, 1], [8, 16, 32, 64], 2, 1, num_classes=3), two, False
        ),
        "SENet": medical(
            lambda n: n.SENet(2, 1, "se_resnetxt_bottleneck", (1, 1, 1, 1), 4, 16, inplanes=32, num_classes=3),
            two,
            False,
        ),
        "EfficientNetBN": medical(
            lambda n: n.EfficientNetBN(
                "efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=1, num_classes=3
            ),
            two,
            False,
        ),
        "FlexibleUNet": medical(lambda n: n.FlexibleUNet(3, 2, "efficientnet-b0"), images(64, 96)),
        "DiffusionModelUNet": medical(
            lambda n: n.DiffusionModelUNet(
                2, 1, 1, (1, 1), (8, 16), (False, True), norm_num_groups=4, num_head_channels=8
            ),
            lambda batch, another: (*images(16, 24, 1)(batch, another), times(batch)),
            False,
        ),
        "VQVAE": medical(
            lambda n: n.VQVAE(2, 1, 1, (16, 16), 1, (8, 8), ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2, 8, 6),
            tensors(((1, 16, 16), (1, 24, 16)), single=True),
            False,
            double=False,
        ),
        "RegUNet": medical(lambda n: n.RegUNet(2, 1, 4, 2, out_channels=2), two, False),
        "LocalNet": medical(lambda n: n.LocalNet(2, 1, 4, (0, 1, 2), out_channels=2), two, False),
        "MedNeXt": medical(
            lambda n: n.MedNeXt(init_filters=4, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 1), **flat), two
        ),
        "Quicknat": medical(lambda n: n.Quicknat(num_classes=3, num_channels=1, num_filters=8), two),
        "VoxelMorphUNet": medical(lambda n: n.VoxelMorphUNet(2, 2, 8, (8, 8), (8, 8)), images(32, 48, 2), False),
        "MILModel": medical(
            lambda n: n.MILModel(3, "att_trans", pretrained=False, backbone="resnet18"),
            tensors(((4, 3, 32, 32), (4, 3, 32, 48))),
            False,
        ),
        "DAF3D": medical(lambda n: n.DAF3D(1, 2), tensors(((1, 32, 32, 32), (1, 32, 32, 32))), False),
    }
