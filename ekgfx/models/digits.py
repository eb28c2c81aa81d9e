"""A small network for scikit-learn's handwritten digits that has one of each thing that couples channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class SqueezeExcite(nn.Module):
    """Gates every channel by a function of all channels' means (Hu et al.)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(x.mean(dim=(2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Residual(nn.Module):
    """relu(x + se(bn(conv(conv_bn_relu(x)))))"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = conv_bn_relu(channels, channels, 3)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels, channels // 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.se(self.bn(self.conv(self.inner(x)))))


class DigitsCNN(nn.Module):
    """Stem, residual block with squeeze-and-excitation, depthwise-separable layer, concatenation of two branches.

    Args:
        width: channels of the stem; the other layers are multiples of it
        num_classes: outputs of the classifier
    """

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = conv_bn_relu(1, width, 3)
        self.block = Residual(width)
        self.depthwise = conv_bn_relu(width, width, 3, stride=2, groups=width)
        self.pointwise = conv_bn_relu(width, 2 * width, 1)
        self.narrow = conv_bn_relu(2 * width, width, 1)
        self.wide = conv_bn_relu(2 * width, width, 3)
        self.fuse = conv_bn_relu(2 * width, 4 * width, 3, stride=2)
        self.classifier = nn.Linear(4 * width, num_classes)
        # mean and std of scikit-learn's digits on [0, 1]
        self.pretrained_cfg = {"input_size": (1, 8, 8), "num_classes": num_classes, "mean": (0.305,), "std": (0.376,)}

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) → (B, num_classes)."""
        x = self.pointwise(self.depthwise(self.block(self.stem(x))))
        x = self.fuse(torch.cat([self.narrow(x), self.wide(x)], dim=1))
        return self.classifier(x.mean(dim=(2, 3)))


def digits_cnn(num_classes: int = 10, width: int = 16) -> DigitsCNN:
    """About 30,000 parameters at width 16, 8×8 images of one channel; the quick start takes a wider one."""
    return DigitsCNN(width, num_classes)
