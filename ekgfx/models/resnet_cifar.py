"""ResNets in the CIFAR form: a 3×3 stem of 16 channels and three stages of 16, 32 and 64 channels.

Source: He et al., Deep Residual Learning for Image Recognition, section 4.2. Two forms of the shortcut where the shape
changes: option A (strided identity, zero-padded channels; no parameters) and option B (1×1 convolution with BatchNorm),
the latter with TensorFlow's padding as in the network of the EKG authors.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from ekgfx.errors import ModelError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The EKG authors' constants: CIFAR's, but in the order blue, green, red, applied to red, green, blue. Their weights
# were trained that way, and lose 0.8% accuracy with the constants in the right order.
AUTHORS_MEAN = (113.9 / 255, 123.0 / 255, 125.3 / 255)
AUTHORS_STD = (66.7 / 255, 62.1 / 255, 63.0 / 255)


class PadShortcut(nn.Module):
    """Option A: every second pixel, and channels of zeros before and after the input's."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, before + C + after, ⌈H/2⌉, ⌈W/2⌉)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


def pad_shortcut(inputs: int, outputs: int) -> nn.Module:
    extra = outputs - inputs
    return PadShortcut(extra // 2, extra - extra // 2)


def projection_shortcut(inputs: int, outputs: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(outputs)))


def symmetric_conv(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def tensorflow_conv(inputs: int, outputs: int, stride: int) -> nn.Module:
    """TensorFlow's SAME padding: at stride 2 it pads only the bottom and the right of an even image."""
    if stride == 1:
        return symmetric_conv(inputs, outputs, stride)
    return Conv2dSame(inputs, outputs, 3, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))"""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        shortcut: Callable[[int, int], nn.Module],
        conv3x3: Callable[[int, int, int], nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else shortcut(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet with 6n + 2 layers for 32×32 images; parameter names as in Y. Idelbayev's pytorch_resnet_cifar10.

    Args:
        depth: number of layers, 6n + 2 (20, 32, 44, 56, 110 …)
        num_classes: outputs of the classifier
        projection: 1×1 convolutions as shortcuts and TensorFlow's padding, instead of option A
    """

    def __init__(self, depth: int, num_classes: int = 10, projection: bool = False) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ModelError(f"depth {depth} is no CIFAR ResNet: use 6n + 2, such as 20, 32, 44, 56 or 110")
        shortcut = projection_shortcut if projection else pad_shortcut
        conv3x3 = tensorflow_conv if projection else symmetric_conv
        blocks = (depth - 2) // 6

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = BasicBlock(inputs, outputs, stride, shortcut, conv3x3)
            return nn.Sequential(
                first, *(BasicBlock(outputs, outputs, 1, shortcut, conv3x3) for _ in range(blocks - 1))
            )

        self.conv1 = symmetric_conv(3, 16, 1)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.linear = nn.Linear(64, num_classes)
        self.pretrained_cfg = {
            "input_size": (3, 32, 32),
            "num_classes": num_classes,
            "mean": AUTHORS_MEAN if projection else IMAGENET_MEAN,
            "std": AUTHORS_STD if projection else IMAGENET_STD,
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet20_cifar(num_classes: int = 10) -> CifarResNet:
    """ResNet-20, option-A shortcuts, ImageNet's mean and std."""
    return CifarResNet(20, num_classes)


def resnet56_cifar(num_classes: int = 10) -> CifarResNet:
    """ResNet-56, option-A shortcuts, ImageNet's mean and std."""
    return CifarResNet(56, num_classes)


def resnet20_cifar_projection(num_classes: int = 10) -> CifarResNet:
    """ResNet-20 in the form of the EKG authors: projection shortcuts, TensorFlow's padding, their mean and std."""
    return CifarResNet(20, num_classes, projection=True)


def resnet56_cifar_projection(num_classes: int = 10) -> CifarResNet:
    """ResNet-56 of the EKG authors: projection shortcuts, TensorFlow's padding, their mean and std."""
    return CifarResNet(56, num_classes, projection=True)


_TENSORFLOW_LEAVES = {
    "kernel:0": "weight",
    "biases:0": "bias",
    "gamma:0": "weight",
    "beta:0": "bias",
    "moving_mean:0": "running_mean",
    "moving_variance:0": "running_var",
}
_TENSORFLOW_LAYERS = {"conv": "conv1", "bn": "bn1", "fc": "linear"}  # of the network itself
_TENSORFLOW_BLOCK_LAYERS = {"conv3": "shortcut.conv", "bn3": "shortcut.bn"}  # of a block; the others keep their names


def tensorflow_state_dict(variables: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """State dict of a `CifarResNet(projection=True)` from the EKG authors' TensorFlow variables.

    Names such as `ResNet/BasicBlock1.0/conv3/kernel:0` become `layer2.0.shortcut.conv.weight`; kernels go from
    H×W×I×O to O×I×H×W, the classifier's from I×O to O×I, the norms' vectors from 1×1×1×C to C.

    Raises:
        ModelError: a variable has another form of name.
    """
    state = {}
    for name, array in variables.items():
        _, *scope, leaf = name.split("/")
        if leaf not in _TENSORFLOW_LEAVES or len(scope) not in (1, 2):
            raise ModelError(f"'{name}' is no variable of the EKG authors' ResNet (such as ResNet/conv/kernel:0)")
        if len(scope) == 1:
            layer = _TENSORFLOW_LAYERS.get(scope[0], scope[0])
        else:
            stage, block = scope[0].removeprefix("BasicBlock").split(".")
            layer = f"layer{int(stage) + 1}.{block}.{_TENSORFLOW_BLOCK_LAYERS.get(scope[1], scope[1])}"
        state[f"{layer}.{_TENSORFLOW_LEAVES[leaf]}"] = _from_tensorflow_layout(torch.from_numpy(array), leaf)
    return state


def _from_tensorflow_layout(tensor: Tensor, leaf: str) -> Tensor:
    if leaf != "kernel:0":
        return tensor.flatten()
    return tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor.t().contiguous()
