"""Networks on tokens, and with inputs and outputs of several kinds."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BertLayer(nn.Module):
    """Post-norm self-attention with a mask, and a feed-forward part, spelled out as the reference does."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.head_size, self.all_head_size = heads, width // heads, width
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down, self.out_norm = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, self.head_size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = (q @ k.transpose(-1, -2) / 2.0 + mask).softmax(-1)
        y = (scores @ v).permute(0, 2, 1, 3).contiguous()
        y = y.view(*y.shape[:-2], self.all_head_size)
        x = self.norm(self.dense(y) + x)
        return self.out_norm(self.down(F.gelu(self.up(x))) + x)


class Bert(nn.Module):
    """Word, position and segment embeddings; two inputs by name; a dictionary comes out."""

    tokens = 13
    groups = {
        "words": 8,
        "layers.0.query#0": 2,
        "layers.0.query#1": 4,
        "layers.0.value": 4,
        "layers.0.up": 12,
        "layers.1.query#0": 2,
        "layers.1.query#1": 4,
        "layers.1.value": 4,
        "layers.1.up": 12,
        "pooler": 8,
    }

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.segments = nn.Embedding(13, 8), nn.Embedding(6, 8), nn.Embedding(2, 8)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList(BertLayer(8, 2, 12) for _ in range(2))
        self.pooler, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("position_ids", torch.arange(6)[None])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.words(input_ids) + self.positions(self.position_ids[:, : input_ids.shape[1]])
        x = self.norm(x + self.segments(torch.zeros_like(input_ids)))
        mask = (1.0 - attention_mask[:, None, None].to(x.dtype)) * -1e4
        for layer in self.layers:
            x = layer(x, mask)
        return {"logits": self.classifier(self.pooler(x[:, 0]).tanh())}


class GptBlock(nn.Module):
    """Pre-norm causal attention by a mask buffer, packed qkv by `split`, and an MLP."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, width
        self.ln_1, self.c_attn, self.c_proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ln_2, self.c_fc, self.proj = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("bias", torch.tril(torch.ones(context, context)).view(1, 1, context, context))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(self.n_embd, dim=2)
        q, k, v = (y.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * 0.5
        scores = scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(b, t, c)
        x = x + self.c_proj(y)
        return x + self.proj(F.gelu(self.c_fc(self.ln_2(x))))


class Gpt(nn.Module):
    """Tied embeddings: tokens and vocabulary stay; the stream, heads, their features and the MLP are free."""

    tokens = 11
    groups = {"wte": 8, "blocks.0.c_attn#0": 2, "blocks.0.c_attn#1": 4, "blocks.0.c_fc": 16}

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList([GptBlock(8, 2, 6)])
        self.ln_f, self.lm_head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class TorchEncoder(nn.Module):
    """PyTorch's own transformer layers: MultiheadAttention packs its projections in parameters of its own."""

    shapes = ((5, 6),)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Boxes(NamedTuple):
    scores: Tensor
    corners: Tensor


class Multimodal(nn.Module):
    """A dictionary of images and a list of vectors go in, a named tuple comes out."""

    groups = {"image": 6, "text": 5, "joint": 8}

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.joint = nn.Conv2d(3, 6, 3), nn.Linear(4, 5), nn.Linear(6 + 5, 8)
        self.scores, self.corners = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, batch: dict[str, Tensor], *, hints: list[Tensor]) -> Boxes:
        text = self.text(hints[0]).relu() + self.text(hints[1])
        x = self.joint(torch.cat([self.image(batch["image"]).mean((2, 3)), text], -1)).relu()
        return Boxes(self.scores(x), self.corners(x))
