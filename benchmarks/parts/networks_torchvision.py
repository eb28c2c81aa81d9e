"""Networks of torchvision: one of each family at least, and small configurations of those that are slow."""

from collections.abc import Callable
from typing import Any

from parts.networks import Inputs, Make, Network, images, tensors


def classifier(name: str, size: int = 64, other: int = 96, **options: Any) -> Make:
    """One of the library's by name."""

    def make() -> Network:
        import torchvision

        return Network(torchvision.models.get_model(name, weights=None, num_classes=7, **options), images(size, other))

    return make


def built(build: Callable[[Any], Any], inputs: Inputs, **more: Any) -> Make:
    """A small configuration of one of the library's classes. more: what else is said of a network."""

    def make() -> Network:
        import torchvision

        return Network(build(torchvision.models), inputs, **more)

    return make


def segmenter(name: str, aux: bool) -> Make:
    """A segmentation model, and its loss."""

    def make() -> Network:
        import torch
        import torchvision

        make_one = torchvision.models.get_model
        model = make_one(name, weights=None, weights_backbone=None, num_classes=5, aux_loss=aux or None)

        def use(pruned: Any) -> None:
            found = pruned.train()(*images(64, 96)(2, False))
            target = torch.zeros(2, 64, 64, dtype=torch.long)
            sum(torch.nn.functional.cross_entropy(each, target) for each in found.values()).backward()

        return Network(model, images(64, 96), use)

    return make


def backbone(build: Callable[[Any, Any], Any], size: int = 64, other: int = 96) -> Make:
    """The backbone of a detector; the detector finds something with the cut one in its place, and trains."""

    def make() -> Network:
        import torch
        import torchvision
        from torchvision.models.detection import backbone_utils

        detector = build(torchvision.models.detection, backbone_utils).double()

        def use(pruned: Any) -> None:
            detector.backbone = pruned
            image = torch.rand(3, size, size + 16, dtype=torch.float64)
            assert len(detector.eval()([image])) == 1
            box = torch.tensor([[4.0, 4.0, 30.0, 30.0]], dtype=torch.float64)
            target = {"boxes": box, "labels": torch.ones(1, dtype=torch.long)}
            target["masks"] = torch.ones(1, size, size + 16, dtype=torch.uint8)
            target["keypoints"] = torch.full((1, 17, 3), 10.0)  # which has to be float32
            sum(detector.train()([image, image], [target, target]).values()).backward()

        return Network(detector.backbone, images(size, other), use)

    return make


def detector(name: str, **options: Any) -> Make:
    """The backbone of one of the library's detectors by name."""
    none = {"weights": None, "weights_backbone": None, "num_classes": 5}
    return backbone(lambda d, u: getattr(d, name)(**none, **options))


def pyramid(kind: str, **options: Any) -> Make:
    """The backbone of a detector on a feature pyramid of ResNet-18."""

    def build(d: Any, u: Any) -> Any:
        below = u.resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
        return getattr(d, kind)(below, num_classes=5, min_size=64, max_size=96, **options)

    return backbone(build)


def flow(name: str) -> Make:
    """Optical flow between two images, in two rounds."""

    def make() -> Network:
        import torchvision

        two = tensors(*[((3, 128, 128), (3, 128, 160))] * 2, single=True)  # it makes its grids in float32
        model = torchvision.models.get_model(name, weights=None)
        return Network(model, lambda batch, another: (*two(batch, another), 2), double=False, exports=False)

    return make


def shifted(d: Any, kind: str, **options: Any) -> Any:
    sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 7}
    return getattr(d, kind)(**sizes, **options)


def swin_v2(models: Any) -> Any:
    from torchvision.models import swin_transformer as s

    v2 = {"block": s.SwinTransformerBlockV2, "downsample_layer": s.PatchMergingV2}
    return shifted(models, "SwinTransformer", patch_size=[4, 4], window_size=[4, 4], **v2)


def convnext(models: Any) -> Any:
    from torchvision.models.convnext import CNBlockConfig

    blocks = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 48, 2), CNBlockConfig(48, None, 1)]
    return models.ConvNeXt(blocks, num_classes=7)


def multiscale(models: Any) -> Any:
    from torchvision.models.video import mvit

    def block(heads: int, width: int, after: int, stride: int) -> Any:
        window, steps = [3, 3, 3], [1, stride, stride]
        return mvit.MSBlockConfig(heads, width, after, window, window, steps, [1, 2, 2])

    settings = [block(1, 16, 16, 1), block(2, 16, 32, 2), block(2, 32, 32, 1)]
    ways = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    return models.video.MViT((32, 32), 4, settings, num_classes=7, **ways)


def video(maker: str, block: str = "BasicBlock") -> Make:
    """A small residual network for video."""

    def build(models: Any) -> Any:
        from torchvision.models.video import resnet as r

        first, later = (
            (r.Conv3DSimple, getattr(r, maker)) if maker != "Conv3DNoTemporal" else (r.Conv3DSimple, r.Conv3DNoTemporal)
        )
        stem = r.R2Plus1dStem if maker == "Conv2Plus1D" else r.BasicStem
        model = r.VideoResNet(getattr(r, block), [first, later, later, later], [1, 1, 1, 1], stem, num_classes=7)
        return model

    return built(build, tensors(((3, 4, 32, 32), (3, 8, 48, 48))))


def networks() -> dict[str, Make]:
    small = "alexnet densenet121 efficientnet_b0 efficientnet_v2_s mnasnet0_5 mobilenet_v2 mobilenet_v3_small resnet18"
    small += " regnet_x_400mf regnet_y_400mf resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1"
    found: dict[str, Make] = {name: classifier(name) for name in small.split()}
    found["googlenet"] = classifier("googlenet", init_weights=False, aux_logits=True)
    found["inception_v3"] = classifier("inception_v3", 128, 160, init_weights=False, aux_logits=True)
    one = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    found |= {
        "vgg11_bn": classifier("vgg11_bn", 32, 64),
        "ConvNeXt": built(convnext, images(64, 96)),
        "VisionTransformer": built(lambda m: m.VisionTransformer(num_classes=7, **one), images(32, 32)),
        "SwinTransformer": built(
            lambda m: shifted(m, "SwinTransformer", patch_size=[4, 4], window_size=[4, 4]), images(32, 48), also=True
        ),
        "SwinTransformerV2": built(swin_v2, images(32, 48), also=True),
        "MaxVit": built(lambda m: m.MaxVit((64, 64), 16, 4, [16, 32], [1, 2], 8, 0.1, num_classes=7), images(64, 64)),
        "raft_small": flow("raft_small"),
        "VideoResNet-r3d": video("Conv3DSimple"),
        "VideoResNet-mc3": video("Conv3DNoTemporal"),
        "VideoResNet-r2plus1d": video("Conv2Plus1D"),
        "s3d": built(lambda m: m.video.S3D(num_classes=7), tensors(((3, 13, 209, 209), (3, 13, 240, 209)))),
        "MViT": built(multiscale, tensors(((3, 4, 32, 32), (3, 4, 32, 32)))),
        "SwinTransformer3d": built(
            lambda m: shifted(m.video, "SwinTransformer3d", patch_size=[2, 4, 4], window_size=[2, 4, 4]),
            tensors(((3, 4, 32, 32), (3, 4, 48, 48))),
            also=True,
        ),
        "lraspp_mobilenet_v3_large": segmenter("lraspp_mobilenet_v3_large", False),
        "deeplabv3_mobilenet_v3_large": segmenter("deeplabv3_mobilenet_v3_large", True),
        "fcn_resnet50": segmenter("fcn_resnet50", True),
        "fasterrcnn_mobilenet_v3_large_320_fpn": detector("fasterrcnn_mobilenet_v3_large_320_fpn"),
        "ssdlite320_mobilenet_v3_large": detector("ssdlite320_mobilenet_v3_large"),
        "MaskRCNN": pyramid("MaskRCNN"),
        "KeypointRCNN": pyramid("KeypointRCNN", num_keypoints=17),
        "RetinaNet": pyramid("RetinaNet"),
        "FCOS": pyramid("FCOS"),
    }
    return found
