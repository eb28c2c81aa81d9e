"""The examples are run, small."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.loss import LabelSmoothingCrossEntropy

import ekgfx
from ekgfx import source
from ekgfx.bank import Bank

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_lightning():
    pytest.importorskip("pytorch_lightning")
    assert example("lightning_ekg").main(epochs=2) > 0.9


SCRIPT = """
# The places where timm's train.py touches what the example replaces.
import sys
import torch
from timm import create_model
from timm.data import create_dataset, create_loader

model_name, folder = sys.argv[sys.argv.index("--model") + 1], sys.argv[sys.argv.index("--data-dir") + 1]
model = create_model(model_name, pretrained="--pretrained" in sys.argv)
dataset = create_dataset("", root=folder, split="train", is_training=True)
loader = create_loader(dataset, (3, 32, 32), 4, is_training=True, use_prefetcher=False, num_workers=0, device="cpu",
                       persistent_workers=False)
LOSS
targets, losses = [], []
for images, target in loader:
    targets += target.tolist()
    losses.append(loss(model(images), target))
    losses[-1].backward()
open(sys.argv[-1], "w").write(repr((sorted(targets), len(create_dataset("", root=folder, split="train")))))
"""

# How the script makes its loss, by timm's version.
NAMED = "from timm.loss import LabelSmoothingCrossEntropy; loss = LabelSmoothingCrossEntropy(smoothing=0.1)"
TASK = """
from timm.task import ClassificationTask
loss = ClassificationTask(model, criterion_kwargs={"smoothing": 0.1}).criterion
"""


@pytest.mark.parametrize("loss", [NAMED, TASK], ids=["named", "task"])
def test_timms_training_script(tmp_path, monkeypatch, loss):
    """Labels and indices arrive at the bank's loss through a loader of timm."""
    if loss == TASK and not hasattr(timm.loss, "create_classification_loss"):
        pytest.skip(f"timm {timm.__version__} has its script name the loss")
    draw = np.random.default_rng(0)
    for label in (0, 1, 2):
        (tmp_path / "images" / "train" / f"class{label}").mkdir(parents=True)
        for number in range(4):
            pixels = draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / "train" / f"class{label}" / f"{number}.png")
    asked = source.parse("timm:test_resnet", weights="none", input="1x3x32x32", classes=3)
    built = asked.build()
    traced = ekgfx.trace(built.model, built.example_inputs)
    batches = [(torch.randn(12, 3, 32, 32), torch.arange(12) % 3)]
    result = ekgfx.search(traced, batches, flops=0.9)
    ekgfx.save(ekgfx.prune(built.model, result.plan, traced), tmp_path / "run", plan=result.plan, source=asked)
    ekgfx.build_bank(traced, result, batches, tmp_path / "run" / "bank", teachers=2)

    asked_for: list[int] = []
    logits = Bank.logits
    monkeypatch.setattr(Bank, "logits", lambda bank, index: asked_for.extend(index.tolist()) or logits(bank, index))
    monkeypatch.setattr(sys, "argv", [])
    module = example("timm_train_ekg")
    monkeypatch.setattr(module.timm.data, "create_dataset", module.timm.data.create_dataset)
    monkeypatch.setattr(LabelSmoothingCrossEntropy, "forward", LabelSmoothingCrossEntropy.forward)
    (tmp_path / "train.py").write_text(SCRIPT.replace("LOSS", loss))
    out = tmp_path / "out"
    module.main(tmp_path / "run", tmp_path / "train.py", ["--data-dir", str(tmp_path / "images"), str(out)])
    assert sorted(asked_for) == list(range(12))
    assert eval(out.read_text()) == ([index // 4 + 3 * index for index in range(12)], 12)
