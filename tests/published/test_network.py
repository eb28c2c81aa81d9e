"""The pruned ResNet-56 in benchmarks/results is what docs/results.md says."""

from pathlib import Path

import torch

import ekgfx
from ekgfx import data as datasets
from ekgfx.runs import checkpoint
from ekgfx.training.evaluation import evaluate
from tests.support import ROOT

NETWORK = ROOT / "benchmarks" / "results" / "resnet56-cifar10-45"


def test_it_loads_in_half_precision_and_has_the_size_that_is_told() -> None:
    network = ekgfx.load(NETWORK)
    assert sum(parameter.numel() for parameter in network.parameters()) == 561410
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}


def test_it_is_right_on_unseen_images(data_dir: Path) -> None:
    built = checkpoint.load_run(NETWORK)
    normal = built.model.pretrained_cfg
    data = datasets.load(f"cifar10:{data_dir / 'cifar10'}", mean=normal["mean"], std=normal["std"])
    batches = data.loader("test", 250, subset=range(500))
    found = evaluate(built.model.float(), batches).accuracy  # float32 is quicker on a CPU
    assert found is not None and found > 0.91
