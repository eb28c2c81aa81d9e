"""Zeros around an image count in a maximum, whatever an optimizer thinks."""

import onnx
import pytest
import torch
from ekgfx.export import check_parity, to_onnx
from ekgfx.export.session import open_session
from torch import Tensor, nn
from torch.nn import functional as F


class Pooled(nn.Module):
    """A maximum of what `pad` has put a border of one around, after a convolution that does nothing."""

    def __init__(self, pad: nn.Module, **options: object) -> None:
        super().__init__()
        self.conv, self.pad, self.options = nn.Conv2d(1, 1, 1, bias=False), pad, options
        nn.init.ones_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.pad(self.conv(x)), 3, 2, **self.options)  # type: ignore[arg-type]


def test_zeros_before_a_pool(tmp_path) -> None:
    """By hand: every window of a 3×3 image of −1 reaches into the border, and so its maximum is 0; in the middle of a
    5×5 image one does not."""
    model = Pooled(nn.ZeroPad2d(1))
    path = to_onnx(model, -torch.ones(2, 1, 5, 5), tmp_path / "net.onnx")
    session = open_session(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: -torch.ones(1, 1, 5, 5).numpy()})
    assert found.tolist() == [[[[0, 0, 0], [0, -1, 0], [0, 0, 0]]]]


@pytest.mark.parametrize(
    ("pad", "options", "kept"),
    [
        (nn.ZeroPad2d(1), {}, "VALID"),
        (nn.ZeroPad2d((0, 1, 0, 1)), {"dilation": 2}, "VALID"),
        (nn.ConstantPad2d(1, -9.0), {}, "VALID"),
        (nn.Identity(), {"padding": 1}, "NOTSET"),  # its own padding is −∞ in both
        (nn.Identity(), {"ceil_mode": True}, "NOTSET"),
    ],
)
@pytest.mark.parametrize("size", [7, 8])
def test_padding_and_pools(tmp_path, pad: nn.Module, options: dict[str, object], kept: str, size: int) -> None:
    torch.manual_seed(0)
    model, images = Pooled(pad, **options), torch.randn(3, 1, size, size) - 2
    path = to_onnx(model, images, tmp_path / "net.onnx")
    (pool,) = (node for node in onnx.load(path).graph.node if node.op_type == "MaxPool")
    assert {a.name: a.s.decode() for a in pool.attribute if a.name == "auto_pad"}.get("auto_pad", "NOTSET") == kept
    assert check_parity(model, path, images).relative < 1e-6
