"""Pruned timm models through timm's own files: saved as timm saves, made by `timm.create_model`, the same outputs."""

import json
from pathlib import Path

import pytest
import timm
import torch

import ekgfx
import ekgfx.hub
from ekgfx.errors import ModelError, PlanError
from ekgfx.models import source


def pruned_run(path: Path, name: str, **options: object) -> torch.nn.Module:
    """A run of a timm model with random weights, every group cut to about two thirds."""
    asked = source.parse(f"timm:{name}", weights="none", **options)
    torch.manual_seed(0)
    built = asked.build()
    traced = ekgfx.trace(built.model, built.example_inputs)
    kept = {group.name: tuple(range(-(-2 * group.size // 3))) for group in traced.groups.values()}
    plan = ekgfx.Plan(kept, traced.groups.digest)
    pruned = ekgfx.prune(built.model, plan, traced)
    ekgfx.save(pruned, path, plan=plan, source=asked)
    return pruned.eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [("test_resnet", {}), ("test_vit", {}), ("test_resnet", {"classes": 7, "input": "1x1x64x64"})],
    ids=["resnet", "vit", "other classes and channels"],
)
def test_timm_makes_the_pruned_model_again(tmp_path, name, options):
    pruned = pruned_run(tmp_path / "run", name, **options)
    ekgfx.hub.save(tmp_path / "run", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert type(again) is type(pruned)
    channels = 1 if options else 3
    images = torch.randn(2, channels, *again.pretrained_cfg["input_size"][1:])
    torch.testing.assert_close(again(images), pruned(images))
    data = timm.data.resolve_model_data_config(again)
    assert data["input_size"][0] == channels


def test_another_task_gets_a_new_classifier(tmp_path):
    pruned_run(tmp_path / "run", "test_resnet")
    ekgfx.hub.save(tmp_path / "run", tmp_path / "out")
    made = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=3)
    assert made(torch.zeros(1, 3, 160, 160)).shape == (1, 3)


def test_timm_could_push_it(tmp_path):
    """What `push_to_hf_hub` uploads is what `save_for_hf` writes with the same arguments."""
    pruned_run(tmp_path / "run", "test_resnet")
    arguments = ekgfx.hub.arguments(tmp_path / "run")
    timm.models.save_for_hf(ekgfx.load(tmp_path / "run"), str(tmp_path / "out"), safe_serialization=True, **arguments)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "ekgfx_pruned"
    assert config["model_args"]["dense"] == "test_resnet"


def test_what_is_no_timm_model_is_refused(tmp_path):
    from ekgfx.models import digits_cnn

    model, images = digits_cnn().eval(), torch.zeros(2, 1, 8, 8)
    plan = ekgfx.Plan({"fuse.0": (0, 1)})
    ekgfx.save(ekgfx.prune(model, plan, example_inputs=images), tmp_path / "run", plan=plan)
    with pytest.raises(ModelError, match="is no run of a timm model"):
        ekgfx.hub.save(tmp_path / "run", tmp_path / "out")


def test_a_damaged_config_is_refused():
    with pytest.raises(ModelError, match="this timm has no model 'os:system'"):
        ekgfx.hub.ekgfx_pruned(dense="os:system")
    with pytest.raises(PlanError):
        ekgfx.hub.ekgfx_pruned(dense="test_resnet", plans=["{}"])
