"""What users bring beside timm's models: exact cuts, the class kept, training that goes on."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils import _pytree as pytree

import ekgfx
from ekgfx.errors import EkgfxWarning
from ekgfx.surgery.check import check_pruned, perturb, relative_error
from ekgfx.surgery.masked import MaskedNetwork
from tests.support.users.language import Bert, Gpt, Multimodal, TorchEncoder
from tests.support.users.vision import VISION

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(model: nn.Module, small: Inputs, large: Inputs) -> nn.Module:
    """Cut every group at random: masked = sliced = pruned. `small`: what is traced with; `large`: what is compared on,
    a batch of another size."""
    model = model.double().eval()
    perturb(model)
    traced = ekgfx.trace(model, *small)
    assert traced.unknown_ops == {}
    rng = random.Random(0)
    plan = ekgfx.Plan(
        {n: tuple(sorted(rng.sample(range(g.size), rng.randint(1, g.size - 1)))) for n, g in traced.groups.items()}
    )
    args, kwargs = large
    with torch.no_grad():
        masked = MaskedNetwork(traced, traced.groups.kept(plan))(*args, **kwargs)
        assert relative_error(traced.subnetwork(plan)(*args, **kwargs), masked) < 1e-10
    pruned = ekgfx.prune(model, plan, traced)
    assert type(pruned) is type(model)
    assert check_pruned(traced, plan, pruned, args, kwargs) < 1e-10
    assert sum(p.numel() for p in pruned.parameters()) == traced.cost(plan).params
    return pruned


def pruned_exactly(model: nn.Module, small: Inputs, large: Inputs, *, same: bool = True) -> nn.Module:
    """The same, and then a step of training. same: not one module inside changes its class."""
    pruned = exactly(model, small, large)
    if same:
        assert all(type(a) is type(b) for a, b in zip(pruned.modules(), model.modules(), strict=True))
    args, kwargs = large
    output = pruned.train()(*args, **kwargs)
    sum(t.square().mean() for t in pytree.tree_leaves(output)).backward()
    assert all(p.grad is not None for p in pruned.parameters() if p.requires_grad)
    torch.optim.SGD(pruned.parameters(), 1e-3).step()
    with torch.no_grad():
        trained = pruned.eval()(*args, **kwargs)
        twin = copy.deepcopy(pruned)
        twin.load_state_dict(pruned.state_dict())
        assert relative_error(twin(*args, **kwargs), trained) == 0
    return pruned


def sizes(model: nn.Module, small: Inputs) -> dict[str, int]:
    return {name: group.size for name, group in ekgfx.trace(model.double(), *small).groups.items()}


def of_shapes(shapes: tuple[tuple[int, ...], ...], batch: int) -> Inputs:
    return tuple(randn(batch, *shape, seed=i) for i, shape in enumerate(shapes)), {}


@pytest.mark.parametrize("cls", VISION, ids=lambda cls: cls.__name__)
def test_networks_on_images_sound_and_volumes(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, small = cls(), of_shapes(cls.shapes, 2)
    assert sizes(model, small) == cls.groups
    pruned_exactly(model, small, of_shapes(cls.shapes, 3))


def tokens(batch: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (batch, 6), generator=torch.Generator().manual_seed(batch))


def test_a_bert_with_a_mask() -> None:
    torch.manual_seed(0)
    model = Bert()

    def inputs(batch: int) -> Inputs:
        mask = torch.arange(6)[None] < torch.tensor([6, 4, 5])[:batch, None]
        return (tokens(batch, 13),), {"attention_mask": mask.long()}

    assert sizes(model, inputs(2)) == Bert.groups
    pruned_exactly(model, inputs(2), inputs(3), same=False)


def test_a_gpt_with_tied_embeddings() -> None:
    torch.manual_seed(0)
    model = Gpt()
    assert sizes(model, ((tokens(2, 11),), {})) == Gpt.groups
    pruned = pruned_exactly(model, ((tokens(2, 11),), {}), ((tokens(3, 11),), {}), same=False)
    assert pruned.lm_head.weight is pruned.wte.weight
    assert len(pruned.wte.weight) == 11


def test_pytorchs_own_transformer_layers() -> None:
    torch.manual_seed(0)
    model, small = TorchEncoder(), of_shapes(TorchEncoder.shapes, 2)
    found = sizes(model, small)
    assert sorted(found.values()) == [2, 2, 8, 12, 12]  # per layer heads and hidden units, and the stream
    pruned_exactly(model, small, of_shapes(TorchEncoder.shapes, 3), same=False)


def test_containers_of_inputs_and_outputs() -> None:
    torch.manual_seed(0)
    model = Multimodal()

    def inputs(n: int) -> Inputs:
        return ({"image": randn(n, 3, 6, 6)},), {"hints": [randn(n, 4), randn(n, 4, seed=1)]}

    assert sizes(model, inputs(2)) == Multimodal.groups
    pruned = pruned_exactly(model, inputs(2), inputs(3))
    args, kwargs = inputs(2)
    assert type(pruned(*args, **kwargs)).__name__ == "Boxes"


class Parametrized(nn.Module):
    """Two convolutions whose weights are computed from other parameters, as in a GAN's discriminator."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.a, self.b, self.head = norm(nn.Conv2d(3, 6, 3)), norm(nn.Conv2d(6, 8, 3)), nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).flatten(1))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm, spectral_norm]
)
def test_weights_computed_from_others(norm: Any) -> None:
    """Both the present parametrizations and the former hooks, which many a published GAN has."""
    torch.manual_seed(0)
    model, small = Parametrized(norm), of_shapes(((3, 8, 8),), 2)
    assert sorted(sizes(model, small).values()) == [6, 8]
    pruned = pruned_exactly(model, small, of_shapes(((3, 8, 8),), 3))
    assert pruned.b.in_channels == pruned.a.out_channels < 6


STAGES = {f"body.layer{i}.0.conv2" for i in (2, 3, 4)}


def test_a_backbone_with_a_feature_pyramid_goes_back_into_its_detector() -> None:
    """RetinaNet: the pyramid's outputs are what the heads read and stay; the backbone shrinks inside."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    backbone = _resnet_fpn_extractor(ResNet(BasicBlock, [1, 1, 1, 1]), 5, returned_layers=[2, 3, 4])
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,)), ((1.0,),) * 4)
    detector = RetinaNet(backbone, 3, min_size=64, max_size=64, anchor_generator=anchors)
    images = randn(1, 3, 64, 64)
    found = sizes(backbone, ((images,), {}))
    inner = "fpn.inner_blocks.2.0"  # added up over the levels, read by the output convolutions
    assert set(found) == {"body.conv1", *(f"body.layer{i}.0.conv1" for i in (1, 2, 3, 4)), *STAGES, inner}
    pruned = pruned_exactly(backbone, ((images,), {}), ((randn(2, 3, 64, 64),), {}))
    assert set(pruned(images)) == {"0", "1", "2", "pool"}
    detector.backbone = pruned
    result = detector.double().eval()(list(images))
    assert set(result[0]) == {"boxes", "scores", "labels"}


def test_a_detector_of_two_stages_is_cut_as_a_whole() -> None:
    """Faster R-CNN: proposals and heads run as they are, on as many boxes as the cut network finds; it still trains."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    backbone = _resnet_fpn_extractor(ResNet(BasicBlock, [1, 1, 1, 1]), 5)
    detector = FasterRCNN(backbone, 3, min_size=64, max_size=96, box_detections_per_img=5).double().eval()
    images = list(randn(2, 3, 64, 64))
    with pytest.warns(EkgfxWarning, match="training mode was not traced"):
        traced = ekgfx.trace(detector, (images,), leaf=["rpn", "roi_heads"])
    assert {f"backbone.{name}" for name in STAGES} <= set(traced.groups)
    plan = ekgfx.Plan({name: tuple(range(0, group.size, 2)) for name, group in traced.groups.items()})
    pruned: Any = ekgfx.prune(detector, plan, traced)
    assert type(pruned) is FasterRCNN and not ekgfx.replaced(pruned)
    others = [randn(3, 80, 64)]
    assert check_pruned(traced, plan, pruned, (images,)) < 1e-10
    assert set(pruned(others)[0]) == {"boxes", "labels", "scores"}
    target = {"boxes": torch.tensor([[1.0, 1.0, 30.0, 30.0]]).double(), "labels": torch.tensor([1])}
    losses = pruned.train()(others, [target])
    sum(losses.values()).backward()
    assert pruned.backbone.body.conv1.weight.grad.abs().sum() > 0


def small_backbone(layers: dict[str, str]) -> nn.Module:
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.resnet import BasicBlock, ResNet

    return IntermediateLayerGetter(ResNet(BasicBlock, [1, 1, 1, 1]), return_layers=layers)


def segmenter(name: str) -> nn.Module:
    from torchvision.models import segmentation as seg

    match name:
        case "DeepLabV3":
            head = seg.deeplabv3.DeepLabHead(512, 4, (2, 3))
            return seg.DeepLabV3(small_backbone({"layer4": "out"}), head)
        case "FCN":
            backbone = small_backbone({"layer3": "aux", "layer4": "out"})
            return seg.FCN(backbone, seg.fcn.FCNHead(512, 4), seg.fcn.FCNHead(256, 4))
        case _:
            return seg.LRASPP(small_backbone({"layer2": "low", "layer4": "high"}), 128, 512, 4, inter_channels=16)


@pytest.mark.parametrize("name", ["DeepLabV3", "FCN", "LRASPP"])
def test_torchvisions_segmentation(name: str) -> None:
    """Dictionaries of maps at the input's resolution; the classes stay, backbone and heads shrink."""
    torch.manual_seed(0)
    model = segmenter(name)
    pruned = pruned_exactly(model, ((randn(1, 3, 32, 32),), {}), ((randn(2, 3, 32, 32),), {}))
    assert pruned(randn(2, 3, 32, 32))["out"].shape == (2, 4, 32, 32)
    assert sum(p.numel() for p in pruned.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())


UNET_PLAN = ekgfx.Plan({"enc2.0": (0, 2, 3), "mid.0": (1, 2, 5, 7), "up2": (0, 1)})


def test_the_memory_format_is_kept() -> None:
    """A network in channels-last stays so."""
    model = VISION[0]().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    traced = ekgfx.trace(model, x)
    pruned = ekgfx.prune(model, UNET_PLAN, traced)
    assert check_pruned(traced, UNET_PLAN, pruned, (x,)) < 1e-5
    kernels = [p for p in pruned.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert pruned(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = VISION[0]().eval().to(dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    traced = ekgfx.trace(model, x)
    pruned = ekgfx.prune(model, UNET_PLAN, traced)
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert check_pruned(traced, UNET_PLAN, pruned, (x,)) < 0.05


@pytest.mark.parametrize("depths", [[2], pytest.param([2, 1], marks=pytest.mark.sweep)])
def test_shifted_windows_of_torchvision(depths: list[int]) -> None:
    """Swin V2 writes its mask, and zeros of the bias of keys, into views: PyTorch makes the graph functional, and puts
    its inputs into another order than the model has. Heads are free as well."""
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    torch.manual_seed(0)
    model = SwinTransformer(
        *([4, 4], 8, depths, [2] * len(depths), [4, 4], 1.5, 0.0, 0.0, 0.0, 3),
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )
    small = of_shapes(((3, 32, 32),), 2)
    found = sizes(model, small)
    blocks = [f"features.{2 * stage + 1}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    heads = {f"{block}.attn.cpb_mlp.2": 2 for block in blocks}
    assert {n: s for n, s in found.items() if n.endswith("cpb_mlp.2")} == heads
    pruned_exactly(model, small, of_shapes(((3, 32, 32),), 3), same=False)


CLASSIFIERS = ["squeezenet1_1", "shufflenet_v2_x0_5"]
MORE = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t"),
    *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "resnext50_32x4d", "swin_v2_t", "vgg11_bn"),
    *("vit_b_32", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "r3d_18", "swin3d_t"),
]
SHAPES = {"inception_v3": (3, 96, 96), "maxvit_t": (3, 224, 224), "vit_b_32": (3, 224, 224)}


@pytest.mark.parametrize("name", [*CLASSIFIERS, *(pytest.param(name, marks=pytest.mark.sweep) for name in MORE)])
def test_torchvision(name: str) -> None:
    """Networks as torchvision builds them; what only training uses (auxiliary classifiers) stays whole."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = get_model(name, weights=None, **options, **({"weights_backbone": None} if "v3_large" in name else {}))
    shape = (3, 8, 64, 64) if "3d" in name else SHAPES.get(name, (3, 64, 64))
    exactly(model, of_shapes((shape,), 2), of_shapes((shape,), 3))
