"""Mixing of tokens by other means than attention."""

import torch
from timm.models.mlp_mixer import MixerBlock, ResBlock, SpatialGatingBlock
from torch import Tensor, nn

from .base import Images, Tokens, family


@family(
    (4, 5),
    groups=[
        (8, "embed> body.norm1> body.norm2> >body.mlp_channels.fc1 body.mlp_channels.fc2> >head"),
        (6, "body.mlp_tokens.fc1> >body.mlp_tokens.fc2"),
        (12, "body.mlp_channels.fc1> >body.mlp_channels.fc2"),
    ],
)
def mixer() -> nn.Module:
    """The MLP over tokens has a free hidden width; the tokens themselves stay."""
    return Tokens(MixerBlock(8, 4, (0.75, 1.5)))


@family(
    (4, 5),
    groups=[
        (
            8,
            "embed> body.norm1.alpha:2 body.norm1.beta:2 body.norm2.alpha:2 body.norm2.beta:2 body.ls1:0 body.ls2:0 "
            ">body.mlp_channels.fc1 body.mlp_channels.fc2> >head",
        ),
        (12, "body.mlp_channels.fc1> >body.mlp_channels.fc2"),
    ],
)
def res_mlp_with_layer_scale() -> nn.Module:
    return Tokens(ResBlock(8, 4, 1.5))


@family(
    (4, 5),
    groups=[
        (8, "embed> body.norm> >body.mlp_channels.fc1 body.mlp_channels.fc2> >head"),
        (6, "body.mlp_channels.fc1> body.mlp_channels.gate.norm> >body.mlp_channels.fc2"),
    ],
)
def spatial_gating() -> nn.Module:
    """gMLP: one half of the hidden channels, mixed over tokens, gates the other: [2]·6."""
    return Tokens(SpatialGatingBlock(8, 4, 1.5))


class GlobalFilter(nn.Module):
    """Multiplication with a learned complex filter in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, 3, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho")


@family((3, 4, 4), groups=[(8, "stem> body.filter:2 >head")])
def global_filter() -> nn.Module:
    """Frequencies are over space; each channel has a filter of its own."""
    return Images(GlobalFilter(), channels_last=True)


class FourierMixing(nn.Module):
    """FNet: the real part of a Fourier transform over tokens and features."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(torch.fft.fft2(x, dim=(1, 2)).real))


@family((4, 5), groups=[(6, "body.up> >body.down"), (8, "body.down> >head")])
def fourier_transform_of_features() -> nn.Module:
    """A transform over the features mixes them all: they stay."""
    return Tokens(FourierMixing())
