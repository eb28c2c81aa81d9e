"""MODEL arguments, weight files and the hub: right models, strict weights, one-line errors, no waiting."""

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ekgfx import data, models
from ekgfx import weights as weights_module
from ekgfx.errors import DataError, EkgfxError, ModelError
from ekgfx.source import Built, Source, parse
from ekgfx.weights import hub_offline, load_weights, unreachable

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "resnet50_keras.py"


@pytest.fixture
def model_file(tmp_path: Path):
    """Writes a user's file with factories."""

    def write(body: str) -> Path:
        path = tmp_path / "mine.py"
        path.write_text(f"import torch\nfrom torch import nn\n\n{body}\n")
        return path

    return write


# --- forms of MODEL ---------------------------------------------------------------------------------------------------


def test_timm_models_say_their_input_and_normalization() -> None:
    built = parse("timm:test_efficientnet", weights="none").build()
    config = built.model.pretrained_cfg
    assert built.weights_origin == "random (--weights none)"
    assert built.example_inputs[0].shape == (1, *config["input_size"])
    assert built.data_options == {
        "image_size": config["input_size"][1:],
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
        ("resnet57", "use timm:NAME, package.module:factory, path/file.py:factory or a run directory"),
        ("timm:resnt50", "timm has no model 'resnt50': did you mean timm:resnet50 or"),
        ("timm:qqqqqq", "see timm.list_models()"),
        ("timm:resnet50.a9_in1k", "timm has no weights 'a9_in1k' for resnet50: use one of a1_in1k, "),
        ("nowhere/net.py:net", "no such file: 'nowhere/net.py'"),
        ("net.py", "'net.py' names no factory: use net.py:FACTORY"),
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


# --- weight files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_every_kind_of_file_gives_the_same_weights(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    torch.save(state, tmp_path / "c.pt")
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "d.th")
    del state["1.num_batches_tracked"]  # older files have no batch counters
    save_file(state, tmp_path / "e.safetensors")
    for file in sorted(tmp_path.iterdir()):
        other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        load_weights(other, file)
        for name, tensor in state.items():
            assert torch.equal(other.state_dict()[name], tensor), (file.name, name)


def test_half_precision_becomes_the_models_type(net: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    save_file({name: t.half() if t.is_floating_point() else t for name, t in net.state_dict().items()}, file)
    expected = net[0].weight.detach().half().float()
    load_weights(net, file)
    assert net[0].weight.dtype == torch.float32 and torch.equal(net[0].weight, expected)


def test_weights_of_another_model_are_refused(tmp_path: Path, data_dir: Path) -> None:
    file = data_dir / "weights" / "resnet20-cifar10.safetensors"
    with pytest.raises(ModelError, match=r"not those of this CifarResNet: 180 missing: layer1\.3\.conv1\.weight"):
        parse("ekgfx.models:resnet56_cifar", str(file)).build()
    with pytest.raises(ModelError, match=r"2 of another shape: linear\.weight is \(10, 64\), the model's \(100, 64\)"):
        parse("ekgfx.models:resnet20_cifar", str(file), classes=100).build()
    model = models.resnet20_cifar()
    save_file(model.state_dict() | {"extra": torch.zeros(1)}, tmp_path / "extra.safetensors")
    with pytest.raises(ModelError, match="1 unknown: extra"):
        load_weights(model, tmp_path / "extra.safetensors")


class Opaque:
    pass


def test_unusable_weight_files_are_explained(net: nn.Module, data_dir: Path, tmp_path: Path) -> None:
    whole = (data_dir / "weights" / "resnet20-cifar10.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    (tmp_path / "cut.npz").write_bytes((data_dir / "cifar10" / "test.npz").read_bytes()[:1000])
    torch.save({"model": net.state_dict()}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-500])
    torch.save({"net": Opaque()}, tmp_path / "object.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    np.savez(tmp_path / "object.npz", a=np.array([{}], dtype=object))
    (tmp_path / "weights.onnx").touch()
    expected = {
        "cut.safetensors": "cut short or damaged",
        "cut.npz": "cut short or damaged",
        "cut.pth": "cut short or damaged",
        "object.pth": "hold more than tensors, which is refused",
        "object.npz": "cannot be read",
        "list.pth": "hold no state dict",
        "missing.pth": "no such file",
        "weights.onnx": r"use auto, none, or a file that ends in \.safetensors, \.npz, \.pth",
    }
    for name, message in expected.items():
        with pytest.raises(ModelError, match=message):
            load_weights(net, tmp_path / name)


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never says anything, as a firewall does that drops packets."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_silent_hub_is_noticed_in_time(silent_server: str) -> None:
    start = time.monotonic()
    reason = unreachable(silent_server, seconds=0.5)
    assert reason is not None and "127.0.0.1" in reason
    assert time.monotonic() - start < 3


def test_a_name_server_that_hangs_is_noticed_in_time(monkeypatch) -> None:
    stop = threading.Event()

    def look_up(*_: object, **__: object) -> None:  # takes no time limit in reality either
        stop.wait(20)
        raise socket.gaierror("gone")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    start = time.monotonic()
    assert unreachable("http://hub.invalid", seconds=0.2) == "no answer from hub.invalid in 0.2 s"
    assert time.monotonic() - start < 2
    stop.set()


def test_a_hub_that_refuses_is_still_reachable() -> None:
    class Refuse(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert unreachable(f"http://127.0.0.1:{server.server_port}", seconds=5) is None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "refused" in unreachable(f"http://127.0.0.1:{port}", seconds=5)


def test_without_a_hub_a_model_is_random_and_says_so_once(
    silent_server: str, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", silent_server)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights_module, "PROBE_SECONDS", 0.5)
    start = time.monotonic()
    with caplog.at_level(logging.INFO, "ekgfx"):
        built = parse("timm:test_resnet").build()
    assert time.monotonic() - start < 10
    assert built.weights_origin.startswith("random (hub unreachable: ") and "127.0.0.1" in built.weights_origin
    (record,) = [record for record in caplog.records if record.name == "ekgfx"]
    assert "RANDOM" in record.getMessage() and "\n" not in record.getMessage()
    assert constants.HF_HUB_OFFLINE is False  # put back as it was


def test_weights_in_the_local_cache_need_no_hub(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(5)
    cached = timm.create_model("test_resnet")
    snapshot = tmp_path / "models--timm--test_resnet.r160_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    save_file(cached.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    built = parse("timm:test_resnet").build()
    assert built.weights_origin == "timm test_resnet.r160_in1k"
    assert torch.equal(built.model.state_dict()["conv1.0.weight"], cached.state_dict()["conv1.0.weight"])


def test_a_model_that_has_no_published_weights_needs_no_hub(monkeypatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(weights_module, "unreachable", never)
    built = parse("timm:mobilenetv2_075").build()
    assert built.weights_origin == "random (none are published)"


def test_the_hub_is_offline_only_inside() -> None:
    before = constants.HF_HUB_OFFLINE
    with suppress(EkgfxError), hub_offline(True):
        inside = constants.HF_HUB_OFFLINE
        raise EkgfxError
    assert inside is True and constants.HF_HUB_OFFLINE is before


# --- real weights, real images ----------------------------------------------------------------------------------------


@torch.inference_mode()
def outputs(built: Built, images: data.Data, count: int) -> tuple[Tensor, Tensor]:
    """Logits and labels of the first images of the test split."""
    loader = images.loader("test", 20, subset=range(count))
    logits, labels = zip(*((built.model(batch.images), batch.labels) for batch in loader), strict=True)
    return torch.cat(logits), torch.cat(labels)


def ranks(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """Top-1 and top-5 hits."""
    hit = logits.topk(5).indices == labels[:, None]
    return int(hit[:, 0].sum()), int(hit.any(1).sum())


def keras_resnet50(data_dir: Path, monkeypatch) -> tuple[Built, data.Data]:
    monkeypatch.delenv("EKGFX_DATA", raising=False)
    weights = data_dir / "weights" / "resnet50-imagenet-keras-fp16.safetensors"
    built = parse(f"{EXAMPLE}:resnet50", str(weights)).build()
    return built, data.load(f"folder:{data_dir / 'imagenet-sample'}", classes=1000, **built.data_options)


def test_resnet50_knows_real_images(data_dir: Path, monkeypatch) -> None:
    """Strides, fp16 weights, mean, std, crop and labels at once: the loss is 1.75 without the mean."""
    logits, labels = outputs(*keras_resnet50(data_dir, monkeypatch), count=20)
    assert ranks(logits, labels) == (15, 18)
    assert float(nn.functional.cross_entropy(logits, labels)) == pytest.approx(0.7258, abs=0.01)


@pytest.mark.sweep
def test_resnet50_on_all_test_images(data_dir: Path, monkeypatch) -> None:
    first, five = ranks(*outputs(*keras_resnet50(data_dir, monkeypatch), count=100))
    assert (first, five) == (pytest.approx(85, abs=1), pytest.approx(93, abs=1))


def test_the_example_finds_its_weights_by_environment(data_dir: Path, monkeypatch) -> None:
    monkeypatch.setenv("EKGFX_DATA", str(data_dir))
    by_environment = parse(f"{EXAMPLE}:resnet50").build().model
    given, _ = keras_resnet50(data_dir, monkeypatch)
    assert torch.equal(by_environment.fc.weight, given.model.fc.weight)
