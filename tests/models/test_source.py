"""MODEL arguments: the right models and inputs, and one-line errors."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ekgfx.errors import DataError, ModelError
from ekgfx.models.source import Source, parse


@pytest.fixture
def model_file(tmp_path: Path):
    """Writes a user's file with factories."""

    def write(body: str) -> Path:
        path = tmp_path / "mine.py"
        path.write_text(f"import torch\nfrom torch import nn\n\n{body}\n")
        return path

    return write


def test_timm_models_say_their_input_and_normalization() -> None:
    built = parse("timm:test_efficientnet", weights="none").build()
    config = built.model.pretrained_cfg
    assert built.weights_origin == "random (--weights none)"
    assert built.example_inputs[0].shape == (1, *config["input_size"])
    assert built.data_options == {
        "image_size": config["input_size"][1:],
        "channels": 3,
        "mean": config["mean"],
        "std": config["std"],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }
    assert not built.model.training and built.model(*built.example_inputs).shape == (1, 1000)


def test_input_and_classes_shape_a_timm_model() -> None:
    grey = parse("timm:test_resnet", weights="none", input="2x1x28x28", classes=10).build()
    assert grey.model(*grey.example_inputs).shape == (2, 10)
    small = parse("timm:test_vit", weights="none", input="1x3x64x64").build()  # a fixed input size, 160 by default
    assert small.model(*small.example_inputs).shape == (1, 1000)


def test_example_inputs_are_the_same_every_time() -> None:
    first, again = (parse("ekgfx.models:digits_cnn").build().example_inputs[0] for _ in range(2))
    assert first.shape == (1, 1, 8, 8) and torch.equal(first, again) and first.std() > 0.5


def test_a_file_may_return_model_and_inputs(model_file) -> None:
    path = model_file(
        "class Two(nn.Module):\n"
        "    def __init__(self, num_classes=3):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(4, num_classes), nn.Linear(5, num_classes)\n"
        "    def forward(self, x, y):\n"
        "        return self.a(x) + self.b(y)\n"
        "def both(num_classes=3):\n"
        "    return Two(num_classes), (torch.ones(2, 4), torch.ones(2, 5))\n"
    )
    built = parse(f"{path}:both", classes=7).build()
    assert built.model(*built.example_inputs).shape == (2, 7)
    assert built.normalization is None and built.data_options == {}
    shaped = parse(f"{path}:Two", input="6x4,6x5").build()  # a class is a factory too; its inputs are given
    assert [tuple(x.shape) for x in shaped.example_inputs] == [(6, 4), (6, 5)]
    assert type(shaped.model) is type(built.model)  # the file is imported once


def test_a_model_itself_is_its_own_factory(model_file) -> None:
    path = model_file("net = nn.Linear(6, 2)\nnn.init.constant_(net.weight, 3)")
    one, other = (parse(f"{path}:net", input="1x6").build().model for _ in range(2))
    with torch.no_grad():
        one.weight.zero_()
    assert type(other) is nn.Linear and other.weight.eq(3).all()  # each its own copy, with the weights it had
    with pytest.raises(ModelError, match="is a model and no factory, so it cannot take num_classes=4"):
        parse(f"{path}:net", input="1x6", classes=4).build()


def test_a_file_may_import_its_neighbours(model_file, tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("WIDTH = 6\n")
    path = model_file("def net():\n    from neighbour_of_mine import WIDTH\n    return nn.Linear(WIDTH, 2)")
    assert parse(f"{path}:net", input="1x6").build().model.in_features == 6


def test_a_source_survives_json_and_another_folder(model_file, tmp_path: Path, monkeypatch) -> None:
    model_file("def net():\n    return nn.Linear(3, 2)")
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / "net.safetensors")
    monkeypatch.chdir(tmp_path)
    source = parse("mine.py:net", weights="net.safetensors", input="1x3")
    description = json.loads(json.dumps(source.describe()))
    monkeypatch.chdir("/")
    again = Source.from_description(description)
    assert again == source
    assert torch.equal(again.build().model.weight, load_file(tmp_path / "net.safetensors")["weight"])
    assert again.without_weights().build().weights_origin.startswith("as ")


def test_a_run_is_left_to_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder but no run: it has no run.json"):
        parse(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    source = parse(str(tmp_path))
    assert source.is_run and source.model == str(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet50", "did you mean 'timm:resnet50'?"),
        ("resnet57", "use timm:NAME, hf:NAME|DIR, torchvision:NAME, package.module:factory, path/file.py"),
        ("timm:resnt50", "timm has no model 'resnt50': did you mean timm:resnet50 or"),
        ("timm:qqqqqq", "see timm.list_models()"),
        ("timm:resnet50.a9_in1k", "timm has no weights 'a9_in1k' for resnet50: use one of a1_in1k, "),
        ("nowhere/net.py:net", "no such file: 'nowhere/net.py'"),
        ("net.py", "'net.py' names no factory: use net.py:FACTORY"),
        ("resnet50.a1_in1k", "did you mean 'timm:resnet50.a1_in1k'?"),
        ("torch.nn.Linear", "unknown model 'torch.nn.Linear': did you mean 'torch.nn:Linear'?"),
        ("microsoft/resnet-50", "did you mean 'hf:microsoft/resnet-50'?"),
        ("huggingface:bert", "No module named 'huggingface'; did you mean 'hf:bert'?"),
        ("tim:resnet18", "No module named 'tim'; did you mean 'timm:resnet18'?"),
        ("net.onnx", "is ONNX, of which nothing can be pruned: name the PyTorch model"),
        ("ekgfx.models:resnet57_cifar", "no factory 'resnet57_cifar' in ekgfx.models: did you mean resnet56_cifar or"),
        ("ekgfx.nothing:net", "cannot import 'ekgfx.nothing': ModuleNotFoundError"),
        ("torch.nn:Identity", "torch.nn:Identity does not say what input it takes: use --input"),
        ("builtins:dict", "factory builtins:dict returned dict: return the model (a torch.nn.Module)"),
        ("torch.nn:Linear", "factory torch.nn:Linear failed: TypeError"),
    ],
)
def test_unusable_models_are_explained(model: str, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        parse(model).build()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("odd_net.py", "'odd_net.py' names no factory: use odd_net.py:Net or odd_net.py:make"),
        ("odd_net.make", "unknown model 'odd_net.make': did you mean 'odd_net.py:make'?"),
        (
            "odd_net:make",
            "cannot import 'odd_net': ModuleNotFoundError: No module named 'odd_net'; did you mean 'odd_net.py:make'?",
        ),
        ("odd_nets.odd_net:make", "did you mean 'odd_nets/odd_net.py:make'?"),
        ("last.ckpt", "'last.ckpt' is a file, not a network: if it holds weights, MODEL is the network that they are"),
    ],
)
def test_what_lies_in_the_folder_is_meant(model: str, message: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "odd_nets").mkdir()
    for place in ("odd_net.py", "odd_nets/odd_net.py"):
        (tmp_path / place).write_text("class Net: ...\n\n\ndef make():\n    return Net()\n")
    (tmp_path / "last.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # as the command has it
    with pytest.raises(ModelError, match=re.escape(message)):
        parse(model)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def net(:", "cannot import .*SyntaxError"),
        ("def net():\n    return nn.Linear(2, 2), torch.ones(1, 2), 3", "returned tuple: return the model"),
        ("def net():\n    return nn.Linear(2, 2), [1, 2]", "returned tuple: return the model"),
        ("def net():\n    raise KeyError('depth')", "failed: KeyError: 'depth'"),
        ("def net():\n    return nn.Linear(2, 2)", "has no parameter num_classes, so it cannot take 5 classes"),
    ],
)
def test_unusable_files_are_explained(model_file, body: str, message: str) -> None:
    path = model_file(body)
    with pytest.raises(ModelError, match=message):
        parse(f"{path}:net", input="1x2", classes=5 if "num_classes" in message else None).build()


def test_an_error_of_ours_in_a_factory_passes_unchanged(model_file) -> None:
    path = model_file("from ekgfx.errors import DataError\ndef net():\n    raise DataError('mine')")
    with pytest.raises(DataError, match="^mine$"):
        parse(f"{path}:net").build()


@pytest.mark.parametrize("shape", ["", "3x", "1x0x3", "1,a", "1x-3"])
def test_an_input_that_is_no_shape_is_refused(shape: str) -> None:
    with pytest.raises(ModelError, match=f"input '{shape}' is no shape"):
        parse("timm:resnet18", input=shape)
    with pytest.raises(ModelError, match="'1,3,32,32' is 4 inputs of one dimension: write 1x3x32x32 for one"):
        parse("timm:resnet18", input="1,3,32,32")
    with pytest.raises(ModelError, match="classes 0: use at least 1"):
        parse("timm:resnet18", classes=0)
