"""The written-out attention against PyTorch's own, in float64."""

import pytest
import torch
from ekgfx.export import check_parity, to_onnx
from ekgfx.export.attention import attention
from torch import nn
from torch.nn import functional as F

LEADING = [(), (2,), (2, 4), (2, 3, 4), (2, 2, 3, 4)]


def tensors(leading: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*leading, rows, width, dtype=torch.float64, generator=generator)
        for rows, width in ((5, 8), (7, 8), (7, 6))
    ]


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.linspace(-2, 2, 35, dtype=torch.float64).view(5, 7)}],
    ids=["plain", "causal", "scale", "bias"],
)
def test_equals_pytorch(leading, options):
    query, key, value = tensors(leading)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attention(query, key, value, **options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("leading", LEADING)
def test_boolean_mask_and_a_query_that_may_attend_to_nothing(leading):
    query, key, value = tensors(leading)
    mask = torch.rand(*leading, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[..., 2, :] = False
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    result = attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert (result[..., 2, :] == 0).all()


def test_shared_key_and_value_heads():
    query = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 7, 4, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(attention(query, key, value, enable_gqa=True), expected, rtol=1e-12, atol=1e-12)


def test_active_dropout_is_refused():
    assert attention(*tensors((2,)), dropout_p=0.1) is NotImplemented


class Viewed(nn.Module):
    """It views what the fused kernel returns: queries before heads in memory, so that it is contiguous as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(8, 24), nn.Embedding(9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        apart = torch.arange(5)[:, None] - torch.arange(5) + 4
        bias = self.bias(apart).permute(2, 0, 1)[None]
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).contiguous().view(x.shape[0], 5, 8)


def test_a_view_of_what_a_kernel_returns(tmp_path):
    torch.manual_seed(0)
    model, x, path = Viewed().eval(), torch.randn(3, 5, 8), tmp_path / "net.onnx"
    to_onnx(model, x, path)
    assert check_parity(model, path, x).relative < 1e-5
