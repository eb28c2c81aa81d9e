"""Attention over channels and over kernels: gates are tied to what they gate, their bottlenecks are free."""

import torch
from timm.layers import CecaModule, EcaModule, GlobalContext, SEModule
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from timm.layers.selective_kernel import SelectiveKernel
from timm.layers.split_attn import SplitAttn
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.families.base import Images, family


@family(
    (3, 4, 4),
    groups=[(8, "stem> >body.fc1 body.fc2> >head"), (3, "body.fc1> body.bn> >body.fc2")],
)
def squeeze_excite() -> nn.Module:
    return Images(SEModule(8, rd_channels=3, norm_layer=nn.BatchNorm2d))


@family((3, 4, 4), groups=[(8, "stem> >head")])
def efficient_channel_attention() -> nn.Module:
    """A filter along the channels' averages, taken over the kept channels."""
    return Images(EcaModule(8))


@family((3, 4, 4), groups=[])
def circular_channel_attention() -> nn.Module:
    """The same with the first channel after the last; padding by copies holds all of them."""
    return Images(CecaModule(8))


@family(
    (3, 4, 4),
    groups=[(8, "stem> >body.channel.fc1 body.channel.fc2> >head"), (3, "body.channel.fc1> >body.channel.fc2")],
)
def convolutional_block_attention() -> nn.Module:
    """CBAM: the bottleneck is used twice; the gate over space has the mean and the maximum over channels."""
    return Images(CbamModule(8, rd_channels=3))


@family(
    (3, 4, 4),
    groups=[
        (8, "stem> >body.conv_attn >body.mlp_scale.fc1 body.mlp_scale.fc2> >body.mlp_add.fc1 body.mlp_add.fc2> >head"),
        (3, "body.mlp_scale.fc1> body.mlp_scale.norm> >body.mlp_scale.fc2"),
        (3, "body.mlp_add.fc1> body.mlp_add.norm> >body.mlp_add.fc2"),
    ],
)
def global_context() -> nn.Module:
    """Attention over positions makes one context, which scales and shifts the channels."""
    return Images(GlobalContext(8, rd_channels=3, fuse_add=True))


@family(
    (3, 4, 4),
    groups=[
        (8, "stem> >body.conv1 body.conv_h> body.conv_w> >head"),
        (3, "body.conv1> body.bn1> >body.conv_h >body.conv_w"),
    ],
)
def coordinate_attention() -> nn.Module:
    """Rows and columns are pooled, joined along space and taken apart again."""
    return Images(CoordAttn(8, rd_channels=3))


@family(
    (3, 4, 4),
    groups=[
        (4, "stem> >body.conv"),
        (6, "body.conv> body.bn0> >body.fc1 body.fc2> >head"),
        (6, "body.fc1> body.bn1> >body.fc2"),
    ],
)
def split_attention() -> nn.Module:
    """ResNeSt: 2 splits are summed up, so they stay: a grouped convolution [2]·4 → [2]·6, gated by [2]·6."""
    return Images(SplitAttn(8, 6, radix=2, rd_channels=3, norm_layer=nn.BatchNorm2d), out=6)


@family(
    (3, 4, 4),
    groups=[
        (2, "stem> body.conv> body.bn0> body.fc1> body.bn1> body.fc2> >head"),
        (2, "stem> >body.conv"),
        (3, "body.conv> body.bn0> >body.fc1 body.fc2> >head"),
        (4, "body.fc1> body.bn1> >body.fc2"),
    ],
)
def split_attention_of_two_cardinal_groups() -> nn.Module:
    """All convolutions are grouped: [2]·groups·2 → [2]·groups·3, then groups·3 → groups·4 → groups·[2]·3."""
    return Images(SplitAttn(8, 6, radix=2, groups=2, rd_channels=4, norm_layer=nn.BatchNorm2d), out=6)


@family(
    (3, 4, 4),
    groups=[
        (4, "stem> >body.paths.0.conv >body.paths.1.conv"),
        (
            6,
            "body.paths.0.conv> body.paths.0.bn> body.paths.1.conv> body.paths.1.bn> "
            ">body.attn.fc_reduce body.attn.fc_select> >head",
        ),
        (3, "body.attn.fc_reduce> body.attn.bn> >body.attn.fc_select"),
    ],
)
def selective_kernel() -> nn.Module:
    """Two paths read half of the input each, [2]·4; a softmax over paths weighs their outputs."""
    return Images(SelectiveKernel(8, 6, rd_channels=3), out=6)


class Involution(nn.Module):
    """A kernel for every position and every one of 2 groups of channels, computed from that position."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.span = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 2 * 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernel = self.span(self.reduce(x).relu()).view(n, 2, 9, h, w).unsqueeze(2)
        windows = F.unfold(x, 3, padding=1).view(n, 2, c // 2, 9, h, w)
        return (kernel * windows).sum(3).view(n, c, h, w)


@family(
    (3, 4, 4),
    groups=[
        (2, "stem> >body.reduce body.span> >head"),
        (4, "stem> >body.reduce >head"),
        (3, "body.reduce> >body.span"),
    ],
    by_graph="body",
)
def involution() -> nn.Module:
    """channels = groups·4 are unfolded to groups·4·[9] and meet kernels of groups·[9]."""
    return Images(Involution())


class SummedGate(nn.Module):
    """A gate over space: the energy of all channels of a convolution, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x).square().sum(1, keepdim=True).tanh()


@family((3, 4, 4), groups=[(8, "stem> >body.conv >head"), (6, "body.conv>")])
def channels_added_up() -> nn.Module:
    """What is cut takes its part out of the sum: of a channel that is zero, nothing."""
    return Images(SummedGate())


class Reordered(nn.Module):
    """Channels rolled by one, and others in reverse, each added to some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(8, n, 1) for n in (6, 6, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x).roll(1, 1) + self.b(x), self.c(x).flip(1) + self.d(x)], 1)


@family((3, 4, 4), groups=[(8, "stem> >body.a >body.b >body.c >body.d")])
def rolled_and_reversed_channels() -> nn.Module:
    """Where order changes, a cut would have to follow it: all stay, with what meets them."""
    return Images(Reordered(), out=11)


class EinsumGate(SummedGate):
    """The same sum, as an einsum with a letter that only one factor has."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.einsum("nchw->nhw", self.conv(x).square())[:, None].tanh()


@family((3, 4, 4), groups=[(8, "stem> >body.conv >head"), (6, "body.conv>")])
def channels_added_up_by_einsum() -> nn.Module:
    return Images(EinsumGate())
