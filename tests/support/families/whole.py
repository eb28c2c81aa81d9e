"""How blocks are wired: concatenations, fusions of resolutions, several heads, several outputs."""

import timm
import torch
from timm.models.cspnet import CrossStage3
from timm.models.deit import VisionTransformerDistilled
from timm.models.densenet import DenseBlock
from timm.models.hrnet import HighResolutionModule
from timm.models.resnet import BasicBlock
from timm.models.vovnet import OsaBlock
from torch import Tensor, nn

from tests.support.families.base import Images, family


@family(
    (3, 4, 4),
    groups=[
        (
            4,
            "stem> body.denselayer1.norm1> >body.denselayer1.conv1 "
            "body.denselayer2.norm1> >body.denselayer2.conv1 >head",
        ),
        (6, "body.denselayer1.conv1> body.denselayer1.norm2> >body.denselayer1.conv2"),
        (3, "body.denselayer1.conv2> body.denselayer2.norm1> >body.denselayer2.conv1 >head"),
        (6, "body.denselayer2.conv1> body.denselayer2.norm2> >body.denselayer2.conv2"),
        (3, "body.denselayer2.conv2> >head"),
    ],
)
def dense_block() -> nn.Module:
    """Every layer reads all that came before; its norm has a part of each."""
    return Images(DenseBlock(2, 4, bn_size=2, growth_rate=3), 4, 10)


@family(
    (3, 4, 4),
    groups=[
        (4, "stem> >body.conv_mid.0.conv >body.conv_concat.conv"),
        (3, "body.conv_mid.0.conv> body.conv_mid.0.bn> >body.conv_mid.1.conv >body.conv_concat.conv"),
        (3, "body.conv_mid.1.conv> body.conv_mid.1.bn> >body.conv_concat.conv"),
        (5, "body.conv_concat.conv> body.conv_concat.bn> >head"),
    ],
)
def one_shot_aggregation() -> nn.Module:
    """VoVNet: all intermediate outputs are joined once."""
    return Images(OsaBlock(4, 3, 5, layer_per_block=2), 4, 5)


@family(
    (3, 4, 4),
    groups=[
        (8, "stem> >body.conv_down.conv"),
        (8, "body.conv_down.conv> body.conv_down.bn> >body.conv_exp.conv"),
        (
            4,
            "body.conv_exp.conv> body.conv_exp.bn> >body.blocks.0.conv1.conv body.blocks.0.conv3.conv> "
            "body.blocks.0.conv3.bn> >body.conv_transition.conv",
        ),
        (2, "body.blocks.0.conv1.conv> body.blocks.0.conv1.bn> >body.blocks.0.conv2.conv"),
        (2, "body.blocks.0.conv2.conv> body.blocks.0.conv2.bn> >body.blocks.0.conv3.conv"),
        (6, "body.conv_transition.conv> body.conv_transition.bn> >head"),
    ],
)
def cross_stage_partial() -> nn.Module:
    """Halves of one convolution's output, split in equal pieces: [2]·4. One half goes through residual blocks."""
    layers = {"act_layer": nn.ReLU, "norm_layer": nn.BatchNorm2d}
    ratios = {"expand_ratio": 8 / 6, "block_ratio": 4 / 6, "bottle_ratio": 0.5}
    stage = CrossStage3(8, 6, stride=2, dilation=1, depth=1, **ratios, **layers)
    return Images(stage, out=6)


class TwoResolutions(nn.Module):
    """HRNet: two branches, each added to the other at its resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.body = HighResolutionModule(2, BasicBlock, (1, 1), [4, 6], (4, 6), "SUM")
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.body([self.high(x), self.low(x)])
        return self.head(torch.cat([high.mean((2, 3)), low.amax((2, 3))], 1))


def _branch(i: int) -> str:
    block = f"body.branches.{i}.0"
    return f">{block}.conv1 {block}.conv2> {block}.bn2>"


@family(
    (3, 4, 4),
    groups=[
        (4, f"high> {_branch(0)} body.fuse_layers.0.1.0> body.fuse_layers.0.1.1> >body.fuse_layers.1.0.0.0 >head"),
        (6, f"low> {_branch(1)} body.fuse_layers.1.0.0.0> body.fuse_layers.1.0.0.1> >body.fuse_layers.0.1.0 >head"),
        (4, "body.branches.0.0.conv1> body.branches.0.0.bn1> >body.branches.0.0.conv2"),
        (6, "body.branches.1.0.conv1> body.branches.1.0.bn1> >body.branches.1.0.conv2"),
    ],
)
def fusion_of_resolutions() -> nn.Module:
    """A resolution's channels are its residual stream and what comes to it from the other, re-sampled."""
    return TwoResolutions()


@family(
    (3, 8, 8),
    groups=[
        (
            8,
            "cls_token:2 dist_token:2 pos_embed:2 patch_embed.proj> blocks.0.norm1> >blocks.0.attn.qkv "
            "blocks.0.attn.proj> blocks.0.norm2> >blocks.0.mlp.fc1 blocks.0.mlp.fc2> norm> >head >head_dist",
        ),
        (2, "blocks.0.attn.qkv> >blocks.0.attn.proj"),
        (16, "blocks.0.mlp.fc1> >blocks.0.mlp.fc2"),
    ],
)
def distilled_transformer() -> nn.Module:
    """Two extra tokens and two heads on one stream."""
    return VisionTransformerDistilled(
        img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, mlp_ratio=2, num_classes=3
    )


@family(
    (3, 32, 32),
    groups=[
        (24, "conv1.0> conv1.1> >conv1.3"),
        (32, "conv1.3> conv1.4> >conv1.6"),
        (
            64,
            "conv1.6> bn1> >layer1.0.conv1 layer1.0.conv2> layer1.0.bn2> >layer2.0.conv1 >layer2.0.downsample.1",
        ),
        (64, "layer1.0.conv1> layer1.0.bn1> >layer1.0.conv2"),
        (128, "layer2.0.conv1> layer2.0.bn1> >layer2.0.conv2"),
    ],
)
def features_only() -> nn.Module:
    """A backbone that returns its second stage: that is its interface and stays; all before it is free."""
    return timm.create_model("resnet10t", features_only=True, out_indices=(2,))
