"""Convolutions and norms with a twist: cheap, standardized, blurred, rearranged, re-parameterizable."""

from timm.layers import (
    BlurPool2d,
    DepthToSpace,
    EvoNorm2dB0,
    EvoNorm2dS0,
    FilterResponseNormTlu2d,
    ScaledStdConv2d,
    SpaceToDepth,
    StdConv2d,
)
from timm.models.byobnet import RepVggBlock
from timm.models.convnext import ConvNeXtBlock
from timm.models.fastvit import RepMixer
from timm.models.ghostnet import GhostModule
from timm.models.nfnet import NormFreeBlock
from torch import nn

from tests.support.families.base import Images, family


@family(
    (3, 4, 4),
    groups=[
        (8, "stem> >body.primary_conv.0"),
        (
            6,
            "body.primary_conv.0> body.primary_conv.1> body.cheap_operation.0> body.cheap_operation.1> >head",
        ),
    ],
)
def ghost_module() -> nn.Module:
    """Half of the channels are computed, the others are depthwise copies of them: a channel goes with its ghost."""
    return Images(GhostModule(8, 12), out=12)


@family(
    (3, 4, 4),
    groups=[
        (8, "stem> >body.primary_conv.0"),
        (
            5,
            "body.primary_conv.0> body.primary_conv.1> body.cheap_operation.0> body.cheap_operation.1> >head",
        ),
    ],
)
def ghost_module_of_odd_width() -> nn.Module:
    """The last ghost is cut off by the module itself, so the last channel has none, and is an axis of one."""
    return Images(GhostModule(8, 11), out=11)


@family(
    (3, 4, 4),
    groups=[
        (8, "stem> body.conv_dw> body.norm> >body.mlp.fc1 body.mlp.fc2> body.gamma:0 >head"),
        (12, "body.mlp.fc1> body.mlp.grn> >body.mlp.fc2"),
    ],
)
def global_response_norm_and_layer_scale() -> nn.Module:
    """GRN divides by the mean over channels, which is that of the kept ones."""
    return Images(ConvNeXtBlock(8, kernel_size=3, mlp_ratio=1.5, use_grn=True, ls_init_value=0.1))


@family((3, 4, 4), groups=[(8, "stem> body> body.v:0 >head")], tolerance=1e-5)
def evo_norm_with_batch_statistics() -> nn.Module:
    """Its statistics over space are computed in float32."""
    return Images(EvoNorm2dB0(8))


@family(
    (3, 4, 4),
    groups=[(3, "stem> body> body.v:0 >head"), (4, "stem> body> body.v:0 >head")],
    tolerance=1e-5,
)
def evo_norm_with_group_statistics() -> nn.Module:
    """3 groups of 4 channels, by a reshape: groups and members are free; statistics are over the kept members."""
    return Images(EvoNorm2dS0(12, groups=3), 12, 12)


@family((3, 4, 4), groups=[(8, "stem> body> body.tau:0 >head")], tolerance=1e-5)
def filter_response_norm() -> nn.Module:
    """A channel is normalized by its own mean square over space."""
    return Images(FilterResponseNormTlu2d(8))


@family((3, 4, 4), groups=[(8, "stem> >body"), (6, "body> >head")])
def standardized_weights() -> nn.Module:
    """Kernels are normalized over all inputs, that is over the kept ones; outputs are alone with their kernels."""
    return Images(StdConv2d(8, 6, 3, bias=True), out=6)


@family(
    (3, 4, 4),
    groups=[(2, "stem> body> body.gain:0 >head"), (4, "stem> >body"), (3, "body> body.gain:0 >head")],
)
def standardized_weights_in_groups() -> nn.Module:
    return Images(ScaledStdConv2d(8, 6, 3, groups=2), out=6)


@family(
    (3, 4, 4),
    groups=[
        (8, "stem> >body.conv1 body.conv3> body.conv3.gain:0 >head"),
        (4, "body.conv1> body.conv1.gain:0 >body.conv2"),
        (4, "body.conv2> body.conv2.gain:0 >body.conv3"),
    ],
)
def normalizer_free_scaling() -> nn.Module:
    """NFNet: a scaled residual branch that starts with a learned gain of zero, on standardized weights."""
    return Images(NormFreeBlock(8, alpha=0.2, beta=0.9, bottle_ratio=0.5, skipinit=True, act_layer=nn.ReLU))


@family(
    (3, 4, 4),
    groups=[
        (2, "stem> body.weight:0 body.bias:0 >head"),
        (4, "stem> body.weight:0"),
        (3, "body.weight:1 body.bias:0 >head"),
    ],
)
def transposed_convolution_in_groups() -> nn.Module:
    """The weight is (groups·4, 3): inputs are groups·4, outputs groups·3."""
    return Images(nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), out=6)


@family((3, 4, 4), groups=[(8, "stem> >head")])
def blur_pool() -> nn.Module:
    """A depthwise convolution with a buffer, which is cut as well."""
    return Images(BlurPool2d(8))


@family((3, 4, 4), groups=[(8, "stem> >head")])
def blur_pool_of_any_width() -> nn.Module:
    """One filter, expanded to as many channels as come in."""
    return Images(BlurPool2d())


@family((3, 8, 8), groups=[(4, "stem> >head")])
def space_to_depth() -> nn.Module:
    """Blocks of 4 × 4 become channels: [4]·[4]·channels."""
    return Images(SpaceToDepth(4), 4, 64)


@family((3, 4, 4), groups=[(4, "stem> >body.1"), (6, "body.1> >head")])
def pixel_unshuffle() -> nn.Module:
    """Blocks of 2 × 2 become channels behind their own: channels·[4]."""
    return Images(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(16, 6, 1)), 4, 6)


@family((3, 4, 4), groups=[(8, "stem> >body.2"), (6, "body.2> >head")])
def norms_without_parameters() -> nn.Module:
    """They know their number of channels all the same."""
    layers = nn.InstanceNorm2d(8), nn.GroupNorm(1, 8, affine=False), nn.Conv2d(8, 6, 1)
    return Images(nn.Sequential(*layers), out=6)


@family((3, 4, 4), groups=[(3, "stem> >body.1"), (6, "body.1> >head")])
def depth_to_space() -> nn.Module:
    """[2]·[2]·channels become blocks of space, which a kernel runs over."""
    return Images(nn.Sequential(DepthToSpace(2), nn.Conv2d(3, 6, 3)), 12, 6)


@family(
    (3, 4, 4),
    groups=[
        (
            8,
            "stem> body.identity> body.conv_kxk.conv> >body.conv_kxk.conv body.conv_kxk.bn> "
            "body.conv_1x1.conv> >body.conv_1x1.conv body.conv_1x1.bn> >head",
        )
    ],
)
def rep_vgg_block() -> nn.Module:
    """Three parallel branches, one of them the identity, which ties what comes in to what goes out."""
    return Images(RepVggBlock(8, 8))


@family((3, 4, 4), groups=[(8, "stem> >body.reparam_conv"), (8, "body.reparam_conv> >head")])
def rep_vgg_block_fused() -> nn.Module:
    """One convolution: nothing ties its channels any more."""
    model = Images(RepVggBlock(8, 8)).eval()
    model.body.reparameterize()
    return model


@family(
    (3, 4, 4),
    groups=[
        (
            8,
            "stem> body.norm.identity> body.mixer.identity> body.mixer.conv_kxk.0.conv> body.mixer.conv_kxk.0.bn> "
            "body.mixer.conv_scale.conv> body.mixer.conv_scale.bn> body.layer_scale.gamma:0 >head",
        )
    ],
)
def rep_mixer() -> nn.Module:
    """FastViT's token mixer is depthwise in all of its branches."""
    return Images(RepMixer(8, layer_scale_init_value=0.5))


@family((3, 4, 4), groups=[(8, "stem> body.reparam_conv> >head")])
def rep_mixer_fused() -> nn.Module:
    model = Images(RepMixer(8, layer_scale_init_value=0.5)).eval()
    model.body.reparameterize()
    return model
