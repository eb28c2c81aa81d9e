"""The networks: names and numbers of published weights, the authors' own logits, and the shortcut's values."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ekgfx import data, models
from ekgfx.errors import ModelError
from ekgfx.models.resnet_cifar import CifarResNet, PadShortcut, tensorflow_conv
from ekgfx.models.source import parse

FACTORIES = [
    models.digits_cnn,
    models.mobilenetv2_cifar,
    models.resnet20_cifar,
    models.resnet20_cifar_projection,
    models.resnet56_cifar,
    models.resnet56_cifar_projection,
]


@pytest.fixture
def reference_dir(data_dir: Path) -> Path:
    """What the EKG authors' program was recorded to do."""
    path = Path(os.environ.get("EKGFX_REFERENCE", data_dir.parent / "reference")) / "ekg"
    if not path.is_dir():
        pytest.skip(f"no recordings of the EKG authors' program in {path}; set EKGFX_REFERENCE to the folder with ekg/")
    return path


@torch.inference_mode()
def correct(model: nn.Module, loader: data.Loader) -> int:
    return sum(int((model(batch.images).argmax(1) == batch.labels).sum()) for batch in loader)


def test_pad_shortcut_takes_every_second_pixel_and_adds_channels_of_zeros() -> None:
    x = torch.arange(2 * 1 * 3 * 4.0).reshape(2, 1, 3, 4)
    y = PadShortcut(1, 2)(x)
    assert y.shape == (2, 4, 2, 2)
    assert y[:, 0].count_nonzero() == 0 and y[:, 2:].count_nonzero() == 0
    assert y[0, 1].tolist() == [[0, 2], [8, 10]]


def test_tensorflow_padding_adds_only_at_bottom_and_right() -> None:
    convolution = tensorflow_conv(1, 1, stride=2)
    nn.init.ones_(convolution.weight)
    y = convolution(torch.ones(1, 1, 4, 4))
    assert y[0, 0].tolist() == [[9, 6], [6, 4]]  # symmetric padding would give [[4, 6], [6, 9]]


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_factories_build_exportable_models_that_say_their_input(factory) -> None:
    model = factory().eval()
    inputs = torch.randn(3, *model.pretrained_cfg["input_size"])
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (inputs[:2],), dynamic_shapes=(batch,), strict=False)
    torch.testing.assert_close(program.module()(inputs), model(inputs))
    assert model(inputs).shape == (3, model.pretrained_cfg["num_classes"])
    assert factory(num_classes=7).eval()(inputs).shape == (3, 7)


def test_sizes_are_those_of_the_papers() -> None:
    def parameters(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    assert parameters(models.resnet20_cifar()) == 269_722  # He et al., table 6: 0.27 M
    assert parameters(models.resnet56_cifar()) == 853_018  # 0.85 M
    # torchvision's MobileNetV2 has 3,504,872, of which 1,281,000 are its classifier of 1000
    assert parameters(models.mobilenetv2_cifar()) == 3_504_872 - 1_281_000 + 12_810
    assert models.mobilenetv2_cifar().forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, 4, 4)


def test_an_impossible_depth_is_refused() -> None:
    with pytest.raises(ModelError, match="depth 34 is no CIFAR ResNet: use 6n"):
        CifarResNet(34)


@pytest.mark.parametrize("depth", [20, 56])
def test_parameter_names_are_those_of_the_published_weights(data_dir: Path, depth: int) -> None:
    with safe_open(data_dir / "weights" / f"resnet{depth}-cifar10.safetensors", "pt") as file:
        published = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    own = CifarResNet(depth).state_dict()
    assert published == {name: tuple(own[name].shape) for name in own if not name.endswith("num_batches_tracked")}


def test_resnet20_has_its_published_accuracy_on_a_tenth_of_the_test_set(data_dir: Path) -> None:
    built = parse("ekgfx.models:resnet20_cifar", str(data_dir / "weights/resnet20-cifar10.safetensors")).build()
    cifar = data.load(f"cifar10:{data_dir / 'cifar10'}", classes=10, **built.data_options)
    right = correct(built.model, cifar.loader("test", 250, subset=range(1000)))
    assert right == pytest.approx(915, abs=2)  # of 1000; 91.73% of all (see the sweep)


def authors_network(file: Path) -> tuple[nn.Module, dict]:
    built = parse("ekgfx.models:resnet56_cifar_projection", str(file)).build()
    return built.model, built.data_options


def test_the_authors_network_gives_their_recorded_logits(data_dir: Path, reference_dir: Path) -> None:
    """Network, padding, weights, pre-processing and batch order at once: the first 64-image batch of the recording."""
    model, options = authors_network(reference_dir / "weights_after_finetune.npz")
    cifar = data.load(f"cifar10:{data_dir / 'cifar10'}", **options)
    order = np.load(reference_dir / "sampler_indices.npz")["val_idx"]
    recorded = torch.from_numpy(np.load(reference_dir / "knowledge_initial_logits.npy"))
    (batch,) = cifar.loader("train", 64, subset=order[256:])  # the recording has batches of 256 and 64
    with torch.no_grad():
        logits = model.train()(batch.images)  # batch statistics, as recorded
    torch.testing.assert_close(logits, recorded[256:], atol=2e-4, rtol=0)


def test_the_authors_variables_are_translated_exactly(reference_dir: Path) -> None:
    variables = np.load(reference_dir / "weights_pretrained.npz")
    state = models.tensorflow_state_dict(variables)
    assert len(state) == len(variables.files) == 287
    kernel = variables["ResNet/BasicBlock1.0/conv3/kernel:0"]
    assert np.array_equal(state["layer2.0.shortcut.conv.weight"].numpy()[5, 3, 0, 0], kernel[0, 0, 3, 5])
    assert np.array_equal(state["linear.weight"].numpy(), variables["ResNet/fc/kernel:0"].T)


def test_a_foreign_variable_is_named() -> None:
    with pytest.raises(ModelError, match="'VGG/conv/weights:0' is no variable"):
        models.tensorflow_state_dict({"VGG/conv/weights:0": np.zeros(1)})


def test_the_digits_network_learns_the_digits() -> None:
    torch.manual_seed(0)
    digits = data.load("digits", classes=10)
    model = models.digits_cnn()
    epochs = 12
    loader = digits.loader("train", 64, shuffle=True, augment=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(loader))
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            train_step(model, optimizer, batch.images, batch.labels)
            schedule.step()
    assert correct(model.eval(), digits.loader("test", 512)) / digits.size("test") > 0.97


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


@pytest.mark.sweep
@pytest.mark.parametrize(("depth", "right"), [(20, 9173), (56, 9339)])
def test_published_accuracy_on_the_whole_test_set(data_dir: Path, depth: int, right: int) -> None:
    file = data_dir / "weights" / f"resnet{depth}-cifar10.safetensors"
    built = parse(f"ekgfx.models:resnet{depth}_cifar", str(file)).build()
    cifar = data.load(f"cifar10:{data_dir / 'cifar10'}", classes=10, **built.data_options)
    assert correct(built.model, cifar.loader("test", 250)) == pytest.approx(right, abs=2)


@pytest.mark.sweep
def test_the_authors_accuracy_on_the_whole_test_set(data_dir: Path, reference_dir: Path) -> None:
    model, options = authors_network(reference_dir / "weights_pretrained.npz")
    cifar = data.load(f"cifar10:{data_dir / 'cifar10'}", classes=10, **options)
    assert correct(model, cifar.loader("test", 250)) == pytest.approx(9384, abs=2)
