"""Networks that the experiments need and timm does not have: factories for `MODEL` arguments such as
`ekgfx.models:resnet56_cifar`.

Every factory works without arguments, returns a randomly initialised `nn.Module`, and sets `pretrained_cfg` as timm's
models do: `input_size` (C, H, W), `mean` and `std` of the input on [0, 1], `num_classes`.
"""

from ekgfx.models.digits import digits_cnn
from ekgfx.models.mobilenet_cifar import mobilenetv2_cifar
from ekgfx.models.resnet_cifar import (
    resnet20_cifar,
    resnet20_cifar_projection,
    resnet56_cifar,
    resnet56_cifar_projection,
    tensorflow_state_dict,
)

__all__ = [
    "digits_cnn",
    "mobilenetv2_cifar",
    "resnet20_cifar",
    "resnet20_cifar_projection",
    "resnet56_cifar",
    "resnet56_cifar_projection",
    "tensorflow_state_dict",
]
