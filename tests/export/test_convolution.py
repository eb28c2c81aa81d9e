"""Convolutions as matrix products, and the files of networks that need them."""

import pytest
import torch
from ekgfx.export import check_parity, to_onnx
from ekgfx.export.convolution import conv2d
from torch import Tensor, nn
from torch.nn import functional as F


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((1, 1), (1, 1), (0, 0), (1, 1)), ((3, 2), (2, 1), (1, 2), (1, 3)), ((3, 3), (3, 2), (0, 1), (2, 1))],
)
def test_products_are_the_convolution(groups, kernel, stride, padding, dilation):
    torch.manual_seed(0)
    images = torch.randn(2, 6, 9, 10, dtype=torch.float64)
    weight = torch.randn(12, 6 // groups, *kernel, dtype=torch.float64)
    for bias in (None, torch.randn(12, dtype=torch.float64)):
        settings = (bias, stride, padding, dilation, groups)
        torch.testing.assert_close(conv2d(images, weight, *settings), F.conv2d(images, weight, *settings))


class PerSample(nn.Module):
    """A full and a depthwise convolution with a mixture of three kernels for every sample, as in CondConv."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.route, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 3), nn.Linear(12, 5)
        self.full, self.depth = nn.Parameter(torch.randn(3, 12, 8, 3, 3)), nn.Parameter(torch.randn(3, 12, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        share = self.route(x.mean((2, 3))).softmax(-1)
        batch, height, width = x.shape[0], x.shape[2], x.shape[3]
        for kernels, groups in ((self.full, 1), (self.depth, 12)):
            weight = torch.einsum("be,eoihw->boihw", share, kernels).flatten(0, 1)
            x = F.conv2d(x.reshape(1, -1, height, width), weight, padding=1, groups=batch * groups)
            x = x.reshape(batch, 12, height, width).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("fp16", [False, True])
def test_kernels_of_every_sample_are_exported_for_any_batch_size(tmp_path, fp16):
    torch.manual_seed(0)
    model, images = PerSample().eval(), torch.randn(3, 3, 8, 8)
    parity = check_parity(model, to_onnx(model, images, tmp_path / "net.onnx", fp16=fp16), images)
    assert parity.batches == (1, 3)
    assert parity.relative < (1e-2 if fp16 else 1e-5)
