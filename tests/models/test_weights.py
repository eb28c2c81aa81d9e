"""Weight files and the hub: strict weights, one-line errors, no waiting; and what real weights say of real images."""

import logging
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
from safetensors.torch import save_file
from torch import Tensor, nn

from ekgfx import data, models
from ekgfx.errors import EkgfxError, ModelError
from ekgfx.models import weights as weights_module
from ekgfx.models.source import Built, parse
from ekgfx.models.weights import hub_offline, load_weights, unreachable
from tests.support import ROOT

EXAMPLE = ROOT / "examples" / "resnet50_keras.py"


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


def warnings_of(net: nn.Module, state: dict[str, Tensor], file: Path, caplog) -> list[str]:
    """What is said at the level of warnings while the file is loaded."""
    save_file(state, file)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ekgfx"):
        load_weights(net, file)
    return [record.getMessage() for record in caplog.records if record.name == "ekgfx"]


def test_values_that_are_not_finite_are_named(net: nn.Module, tmp_path: Path, caplog) -> None:
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert warnings_of(net, state, tmp_path / "good.safetensors", caplog) == []
    state["1.running_var"][2] = torch.inf
    state["0.weight"][0, 0, 0, :2] = torch.nan
    state["0.weight"][1, 0, 0, 0] = -torch.inf
    (said,) = warnings_of(net, state, tmp_path / "odd.safetensors", caplog)
    assert "odd.safetensors" in said and "\n" not in said
    assert "0.weight (2 NaN, 1 infinite of 108); 1.running_var (1 infinite of 4);" in said
    assert "1.running_mean" not in said and "0.bias" not in said
    assert torch.equal(net[1].running_var, state["1.running_var"])  # taken as they are


def test_values_that_the_models_type_cannot_hold_are_named(net: nn.Module, tmp_path: Path, caplog) -> None:
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state["1.running_var"][0] = 70000.0
    (said,) = warnings_of(net.half(), state, tmp_path / "large.safetensors", caplog)
    assert "1.running_var (1 infinite of 4);" in said


def test_a_mask_that_the_model_is_built_with_is_not_told_of(tmp_path: Path, caplog) -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert warnings_of(net, state, tmp_path / "masked.safetensors", caplog) == []
    state["mask"][2, 0] = -torch.inf  # another mask than the model's own
    (said,) = warnings_of(net, state, tmp_path / "other.safetensors", caplog)
    assert "mask (4 infinite of 9);" in said


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
        "weights.onnx": r"use auto, none, or a file that was written by torch\.save, safetensors or numpy\.savez",
    }
    for name, message in expected.items():
        with pytest.raises(ModelError, match=message):
            load_weights(net, tmp_path / name)


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def hub_not_ruled_out(monkeypatch) -> None:
    """Many people set HF_HUB_OFFLINE, which would answer before what is tested here."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


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


def test_resnet50_knows_real_images(data_dir: Path, monkeypatch, caplog) -> None:
    """Strides, fp16 weights, mean, std, crop and labels at once: the loss is 1.75 without the mean."""
    with caplog.at_level(logging.WARNING, "ekgfx"):
        logits, labels = outputs(*keras_resnet50(data_dir, monkeypatch), count=20)
    assert [text for text in caplog.messages if "not finite" in text and "bn1.running_var (1 infinite of 64);" in text]
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
