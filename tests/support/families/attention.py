"""Attention in its forms: heads are what is free; features per head where nothing depends on their number."""

import inspect

import pytest
import timm
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.cait import TalkingHeadAttn
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from timm.models.xcit import XCA
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.families.base import Images, Tokens, family


@family(
    (4, 5),
    groups=[
        (12, "embed> >body.qkv"),
        (3, "body.qkv> >body.proj"),
        (12, "body.proj> >head"),
    ],
)
def packed_qkv() -> nn.Module:
    """qkv = [3]·heads·[features]: the fused kernel's implicit scale 1/√features holds the features."""
    return Tokens(Attention(12, num_heads=3, qkv_bias=True), 12)


@family(
    (4, 5),
    groups=[
        (12, "embed> >body.qkv"),
        (3, "body.qkv> >body.proj"),
        (4, "body.qkv> >body.proj body.q_norm> body.k_norm>"),
        (12, "body.proj> >head"),
    ],
)
def packed_qkv_with_an_explicit_scale() -> nn.Module:
    """Scaled by a number of its own, features may go as well: one axis of q, k and v, and of the norms of q and k."""
    attention = Attention(12, num_heads=3, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    attention.fused_attn = False
    return Tokens(attention, 12)


@family(
    (4, 5),
    groups=[
        (8, "embed> >body.q_proj >body.k_proj >body.v_proj >body.gate"),
        (2, "body.q_proj> body.k_proj> body.v_proj> body.gate> >body.proj"),
        (3, "body.q_proj> body.gate> >body.proj"),
        (3, "body.v_proj> body.gate> >body.proj"),
        (8, "body.proj> >head"),
    ],
    by_graph="body",
)
def grouped_query_attention() -> nn.Module:
    """Six query heads on two key-value heads: queries = key heads·repeats·[3]; the repeats of a key are free, too.

    Keys are repeated for the queries of their group, so the second query of each key may go. The gate follows what
    comes out of attention: query heads, and features of the values, which nothing ties to those of the keys.
    """
    if "num_kv_heads" not in inspect.signature(AttentionRope).parameters:
        pytest.skip(f"timm {timm.__version__} has no keys shared among queries")
    return Tokens(AttentionRope(8, 6, attn_head_dim=3, num_kv_heads=2, qkv_fused=False, gated=True))


class Projected(nn.Module):
    """Attention with a given scale, q, k and v by layers of their own; PyTorch repeats `keys` heads for the queries."""

    def __init__(self, queries: int, keys: int, features: int) -> None:
        super().__init__()
        self.q, self.proj = nn.Linear(8, queries * features), nn.Linear(queries * features, 8)
        self.k, self.v = nn.Linear(8, keys * features), nn.Linear(8, keys * features)
        self.heads, self.grouped = (queries, keys, keys), keys < queries

    def turn(self, x: Tensor) -> Tensor:
        """What is done to q and k before they meet."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        layers = zip((self.q, self.k, self.v), self.heads, strict=True)
        q, k, v = (layer(x).unflatten(-1, (n, -1)).transpose(1, 2) for layer, n in layers)
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, scale=0.5, enable_gqa=self.grouped)
        return self.proj(y.transpose(1, 2).flatten(2))


@family(
    (4, 5),
    groups=[
        (8, "embed> >body.q >body.k >body.v"),
        (2, "body.q> body.k> body.v> >body.proj"),
        (3, "body.q> >body.proj"),
        (3, "body.q> body.k>"),
        (3, "body.v> >body.proj"),
        (8, "body.proj> >head"),
    ],
    by_graph="body",
)
def fused_grouped_query_attention() -> nn.Module:
    """The same by PyTorch's own grouped queries, with a given scale."""
    return Tokens(Projected(6, 2, 3))


@family(
    (4, 5),
    groups=[
        (8, "embed> >body.qkv"),
        (2, "body.qkv> >body.proj body.relative_position_bias_table:1"),
        (4, "body.qkv> >body.proj"),
        (8, "body.proj> >head"),
    ],
)
def relative_position_bias() -> nn.Module:
    """A table of relative positions × heads, looked up by position and added to the attention map."""
    return Tokens(WindowAttention(8, num_heads=2, window_size=2))


@family(
    (3, 4, 4),
    groups=[
        (8, "stem> body.norm1> >body.attn.qkv body.attn.proj> body.norm2> >body.mlp.fc1 body.mlp.fc2> >head"),
        (2, "body.attn.qkv> >body.attn.proj body.attn.relative_position_bias_table:1"),
        (4, "body.attn.qkv> >body.attn.proj"),
        (12, "body.mlp.fc1> >body.mlp.fc2"),
    ],
)
def shifted_windows() -> nn.Module:
    """Windows of 2 × 2 shifted by one: rolled, partitioned, masked, attended and put back; channels are untouched."""
    block = SwinTransformerBlock(8, (4, 4), num_heads=2, window_size=2, shift_size=1, mlp_ratio=1.5)
    return Images(block, channels_last=True)


@family(
    (3, 4, 4),
    groups=[
        (4, "stem> body.norm> >body.reduction"),
        (6, "body.reduction> >head"),
    ],
)
def patch_merging() -> nn.Module:
    """The norm and the reduction see 2 × 2 patches: [2]·[2]·channels."""
    return Images(PatchMerging(4, 6), 4, 6, channels_last=True)


@family(
    (4, 5),
    groups=[
        (8, "embed> >body.qkv"),
        (2, "body.qkv> >body.proj >body.proj_l body.proj_w>"),
        (2, "body.proj_l> >body.proj_w"),
        (4, "body.qkv> >body.proj"),
        (8, "body.proj> >head"),
    ],
    by_graph="body",
)
def talking_heads() -> nn.Module:
    """Attention maps are mixed over heads before and after the softmax: in between are heads of their own.

    q, k and v are packed, so the heads that proj_l reads are those that proj_w makes.
    """
    return Tokens(TalkingHeadAttn(8, num_heads=2, qkv_bias=True))


@family(
    (4, 5),
    groups=[
        (8, "embed> >body.qkv"),
        (2, "body.qkv> >body.proj body.temperature:0"),
        (8, "body.proj> >head"),
    ],
    by_graph="body",
)
def cross_covariance_attention() -> nn.Module:
    """XCA: the softmax runs over the channels of a head, which therefore stay; heads are free."""
    return Tokens(XCA(8, num_heads=2, qkv_bias=True))


class Rotary(Projected):
    """Rotary position embedding of q and k by halves."""

    def __init__(self) -> None:
        super().__init__(2, 2, 4)
        angles = torch.arange(4)[:, None] / torch.tensor([1.0, 10.0])
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))

    def turn(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin


@family(
    (4, 5),
    groups=[
        (8, "embed> >body.q >body.k >body.v"),
        (2, "body.q> body.k> body.v> >body.proj"),
        (2, "body.q> body.k>"),
        (4, "body.v> >body.proj"),
        (8, "body.proj> >head"),
    ],
    by_graph="body",
)
def rotary_position_embedding() -> nn.Module:
    """Features turn in pairs (i, i + 2): [2]·pairs; a pair goes from q, k and both tables."""
    return Tokens(Rotary())
