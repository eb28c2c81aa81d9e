"""MobileNetV2 in the CIFAR form: timm's network with two strides less, so that a 32×32 image keeps 4×4 at the end."""

from typing import Any

import timm
from torch import nn


def mobilenetv2_cifar(num_classes: int = 10) -> nn.Module:
    """MobileNetV2 (Sandler et al.) for 32×32 images: stride 1 in the stem and the second stage, as is usual.

    Parameter names and shapes are those of timm's `mobilenetv2_100`.
    """
    model: Any = timm.create_model("mobilenetv2_100", num_classes=num_classes)
    model.conv_stem.stride = (1, 1)
    model.blocks[1][0].conv_dw.stride = (1, 1)
    model.pretrained_cfg = {
        "input_size": (3, 32, 32),
        "num_classes": num_classes,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
    }
    return model
