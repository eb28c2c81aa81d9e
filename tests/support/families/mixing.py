"""Mixing of tokens by other means than attention."""

import pytest
import torch
from timm.models.mlp_mixer import MixerBlock, ResBlock, SpatialGatingBlock
from timm.models.sequencer import LSTM2d
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.families.base import Images, Tokens, family


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


class FirstOf(nn.Module):
    """The first output of a layer that returns several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@family(
    (3, 4, 4),
    groups=[
        (8, "stem> >body.layer.BCdt_proj.conv >body.layer.hz_proj.conv"),
        (4, "body.layer.BCdt_proj.conv> body.layer.dw.conv> body.layer.A:0"),
        (8, "body.layer.hz_proj.conv> >body.layer.out_proj.conv"),
        (8, "body.layer.out_proj.conv> >head"),
    ],
)
def state_space() -> nn.Module:
    """Hidden-state mixing: B, C and Δ share the states, which a convolution of one position carries along as its space.

    h and its gate z share the inner channels.
    """
    efficientvim = pytest.importorskip("timm.models.efficientvim")  # timm 1.0.30
    return Images(FirstOf(efficientvim.HSMSSD(8, state_dim=4)))


def _lstm(name: str) -> str:
    """Where the hidden units of an LSTM are: rows of the gates of both matrices, columns of the recurrent one."""
    both = [f"body.{name}.{kind}_l0{way}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for way in WAYS]
    return " ".join([*(f"{p}:0" for p in both), *(f"body.{name}.weight_hh_l0{way}:1" for way in WAYS)])


WAYS = ("", "_reverse")


@family(
    (3, 4, 4),
    groups=[
        (8, "stem> " + " ".join(f"body.rnn_{n}.weight_ih_l0{way}:1" for n in "vh" for way in WAYS)),
        (3, f"{_lstm('rnn_v')} >body.fc"),
        (3, f"{_lstm('rnn_h')} >body.fc"),
        (8, "body.fc> >head"),
    ],
)
def lstm_mixing() -> nn.Module:
    """A bidirectional LSTM over columns and one over rows. A unit has a row in each of the four gates: [4]·units.

    Both directions have as many units, as PyTorch holds them in one layer.
    """
    return Images(LSTM2d(8, 3), channels_last=True)


class Recurrent(nn.Module):
    """Two layers of GRU, then the last state of a plain recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.rnn = nn.GRU(8, 4, num_layers=2, batch_first=True), nn.RNN(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gru(x)
        _, last = self.rnn(x.transpose(0, 1))
        return last[-1][:, None]


@family(
    (4, 5),
    groups=[
        (8, "embed> body.gru.weight_ih_l0:1"),
        (
            4,
            "body.gru.weight_ih_l0:0 body.gru.weight_hh_l0:0 body.gru.bias_ih_l0:0 body.gru.bias_hh_l0:0 "
            "body.gru.weight_ih_l1:0 body.gru.weight_hh_l1:0 body.gru.bias_ih_l1:0 body.gru.bias_hh_l1:0 "
            "body.gru.weight_hh_l0:1 body.gru.weight_ih_l1:1 body.gru.weight_hh_l1:1 body.rnn.weight_ih_l0:1",
        ),
        (
            8,
            "body.rnn.weight_ih_l0:0 body.rnn.weight_hh_l0:0 body.rnn.weight_hh_l0:1 "
            "body.rnn.bias_ih_l0:0 body.rnn.bias_hh_l0:0 >head",
        ),
    ],
)
def gated_and_plain_recurrence() -> nn.Module:
    """Layers of one module have as many units each."""
    return Tokens(Recurrent())


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


class PointwiseTokens(nn.Module):
    """gMLP as it is often written: a convolution of kernel 1; its channels are the tokens, its space is features."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.tokens, self.down = nn.Linear(8, 12), nn.Conv1d(4, 4, 1), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.up(x).chunk(2, -1)
        return self.down(u * self.tokens(F.layer_norm(v, v.shape[-1:])))


@family(
    (4, 5),
    groups=[(8, "embed> >body.up"), (6, "body.up> >body.down"), (8, "body.down> >head")],
)
def token_mixing_by_convolution() -> nn.Module:
    """A kernel of one position leaves features where they are, so they are free."""
    return Tokens(PointwiseTokens())


class Gated(nn.Module):
    """A gated linear unit between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.up(x)))


@family((4, 5), groups=[(8, "embed> >body.up"), (6, "body.up> >body.down"), (8, "body.down> >head")])
def gated_linear_unit() -> nn.Module:
    """One half is gated by the other: [2]·6."""
    return Tokens(Gated())
