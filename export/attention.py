"""Attention of any rank, written as the matrix products it stands for.

ONNX exporters translate scaled dot-product attention for 4-D inputs only, yet windowed and pooled transformers
attend over 5-D tensors. ONNX's MatMul and Softmax take any number of leading dimensions, so the plain formula

    softmax(q kᵀ · scale + mask) v

is a lossless translation for all of them.
"""

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` computes, from operators that every exporter knows.

    query: (…, L, E); key: (…, S, E); value: (…, S, V); attn_mask: broadcastable to (…, L, S), boolean (True attends)
    or added to the scores. Returns (…, L, V). With `enable_gqa`, key and value may have fewer heads (dim -3), each
    serving a run of query heads. Returns NotImplemented for active dropout, which is no function of its inputs.
    """
    if dropout_p > 0:
        return NotImplemented
    if enable_gqa:
        shared = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
    # Scaling the query before the product, not the scores after it, keeps half-precision scores in range.
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        weights = torch.softmax(scores, -1)
    elif attn_mask.dtype == torch.bool:
        # A query that may attend to nothing gets zeros, not the NaN of an empty softmax.
        weights = torch.ops.aten._safe_softmax(scores.masked_fill(~attn_mask, float("-inf")), -1)
    else:
        weights = torch.softmax(scores + attn_mask, -1)
    return weights @ value
