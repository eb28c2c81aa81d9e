"""MODEL arguments that name a library: torchvision, transformers, and what plug-ins bring."""

import importlib.util
import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ekgfx.base import named
from ekgfx.cli import main
from ekgfx.errors import ModelError
from ekgfx.models.source import Source, parse

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
TINY = {"model_type": "bert", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TINY |= {"intermediate_size": 48, "max_position_embeddings": 40, "architectures": ["BertForSequenceClassification"]}


def plug(name: str, pretrained: bool, num_classes: int = 3) -> tuple[nn.Module, Tensor]:
    if name != "tiny":
        raise KeyError(name)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, num_classes)), torch.ones(2, 5)


plug.names = lambda: ["tiny", "large"]  # type: ignore[attr-defined]


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in under the name `mine`."""
    entry = EntryPoint("mine", f"{__name__}:plug", "ekgfx.models")
    monkeypatch.setattr(EntryPoint, "load", lambda self: plug)
    monkeypatch.setattr(named, "plugins", lambda: {"mine": entry})


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def test_torchvision_models_say_their_images() -> None:
    built = parse("torchvision:shufflenet_v2_x0_5", weights="none", classes=7).build()
    assert built.weights_origin == "random (--weights none)"
    assert built.example_inputs[0].shape == (1, 3, 224, 224) and built.normalization is not None
    assert built.model(*built.example_inputs).shape == (1, 7)


def test_an_unknown_torchvision_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean resnet18" in fails(capsys, "groups", "torchvision:resnet81")


def test_a_plug_in_brings_its_models(plugged: None, capsys: pytest.CaptureFixture[str]) -> None:
    built = parse("mine:tiny", classes=4).build()
    assert built.model(*built.example_inputs).shape == (2, 4)
    assert "0 " in shown(capsys, "groups", "mine:tiny") and "mine:NAME" in shown(capsys, "models")
    assert shown(capsys, "models", "mine:t*") == "mine:tiny\n"
    assert "mine cannot build 'huge'" in fails(capsys, "groups", "mine:huge")


def test_models_are_listed_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torchvision:resnet18\n" in shown(capsys, "models", "torchvision:resnet*")
    assert "timm:resnet50\n" in shown(capsys, "models", "timm:resnet50*")
    assert "hf:NAME" in shown(capsys, "models")
    assert "no model matches" in fails(capsys, "models", "timm:nothing*")
    assert "names no library" in fails(capsys, "models", "resnet*")


def test_a_library_that_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(named, "installed", lambda package: False)
    assert "hf:bert needs transformers: pip install transformers" in fails(capsys, "groups", "hf:bert")
    assert "not installed: pip install transformers" in shown(capsys, "models")


def folder(place: Path, **more: Any) -> Path:
    place.mkdir()
    (place / "config.json").write_text(json.dumps({**TINY, **more}))
    return place


@needs_transformers
def test_a_folder_with_a_configuration_alone_has_random_weights(tmp_path: Path) -> None:
    built = parse(f"hf:{folder(tmp_path / 'tiny')}", classes=5).build()
    assert built.weights_origin == "random (only config.json lies in tiny)"
    assert type(built.model).__name__ == "BertForSequenceClassification"
    assert built.example_inputs[0].dtype == torch.long and built.model(*built.example_inputs).logits.shape == (1, 5)


@needs_transformers
def test_a_saved_model_comes_with_its_weights(tmp_path: Path) -> None:
    first: Any = parse(f"hf:{folder(tmp_path / 'tiny')}").build().model
    first.save_pretrained(tmp_path / "saved")
    source = parse(f"hf:{tmp_path / 'saved'}")
    again = Source.from_description(source.describe()).build()
    assert again.weights_origin == "folder saved"
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    other = source.without_weights().build()
    assert other.weights_origin.startswith("random")


@needs_transformers
def test_images_of_a_folder_are_prepared_as_it_says(tmp_path: Path) -> None:
    place = folder(
        tmp_path / "vit", model_type="vit", architectures=["ViTForImageClassification"], image_size=16, patch_size=4
    )
    (place / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.2] * 3}))
    built = parse(f"hf:{place}").build()
    assert built.example_inputs[0].shape == (1, 3, 16, 16) and built.normalization == ((0.5,) * 3, (0.2,) * 3)


@needs_transformers
def test_what_is_no_model_of_transformers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no model hf:no/such: it is no folder.*does not answer"):
        parse("hf:no/such").build()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="without config.json"):
        parse(f"hf:{tmp_path / 'empty'}")
    with pytest.raises(ModelError, match="hf cannot build"):
        parse(f"hf:{folder(tmp_path / 'odd', model_type='no such')}").build()


@needs_transformers
def test_groups_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(shown(capsys, "groups", f"hf:{folder(tmp_path / 'tiny')}", "--json"))
    assert told["prunable_share"] > 0.99 and any(group["size"] == 48 for group in told["groups"])
