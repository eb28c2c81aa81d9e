"""ResNet-56 cut to the same MACs by Torch-Pruning and by ekgfx: accuracy, then the same short training, and latency.

    python benchmarks/peers.py training --data cifar10:DIR --weights weights_pretrained.npz --output peer_accuracy.jsonl
    python benchmarks/peers.py training --table peer_accuracy.jsonl

Every method starts from the same weights and may look at the same 320 training images. Torch-Pruning is used as its
own ResNet example does, the classifier ignored, its ratio the least (by bisection) that is within the budget. MACs are
counted in one way for all, on the cut networks. Then, for each: BatchNorm's running statistics are estimated again on
the same 5,120 images; `--epochs` of the same training on labels alone. ekgfx's last row is its own way of training, by
the search's memory bank, on the same images for as many epochs (it sees two views of each). At the end the latency of
all networks in onnxruntime on the CPU, in turn. A line that is there is not measured again.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import Lines
from ekgfx.export import measure_latency, to_onnx
from parts.peers_cuts import by_torch_pruning, magnitude, smallest, taylor
from torch import nn

import ekgfx
from ekgfx import data as datasets
from ekgfx.data import Data
from ekgfx.models import resnet56_cifar, resnet56_cifar_projection
from ekgfx.models.weights import read_weights
from ekgfx.surgery.calibrate import calibrate
from ekgfx.training.evaluation import evaluate

BATCH = 256
NOTED = 20
"""Batches that BatchNorm's statistics are estimated on."""


@dataclass(frozen=True)
class Setting:
    """What the methods share. seen: the batches that they may look at."""

    asked: argparse.Namespace
    model: nn.Module
    data: Data
    seen: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def example(self) -> torch.Tensor:
        return self.seen[0][0][:2]

    def macs(self, model: nn.Module) -> int:
        """Multiply-accumulates for one image, of a model with classifier."""
        return ekgfx.trace(model, self.example).cost().macs

    def test(self, model: nn.Module) -> float:
        """Accuracy on the test set."""
        images = range(self.asked.test_images) if self.asked.test_images else None
        return float(evaluate(model, self.data.loader("test", 1000, subset=images)).accuracy)

    def least(self, cut: Callable[[float], nn.Module], steps: int = 8) -> nn.Module:
        """What the smallest ratio within the budget gives."""
        return smallest(cut, lambda model: self.macs(model) <= self.asked.keep * self.macs(self.model), steps)


Cut = tuple[nn.Module, Callable[..., Any] | None]
"""A cut network, and what makes its memory bank."""


def torch_pruning_of(importance: Callable[[], Any], *, overall: bool) -> Callable[[Setting], Cut]:
    """Torch-Pruning with one ratio for all layers, or with one for all of their channels together."""
    cut = by_torch_pruning(importance, overall=overall)
    return lambda setting: (cut(setting), None)


def ekgfx_by(**options: Any) -> Callable[[Setting], Cut]:
    """A search of ekgfx."""

    def cut(setting: Setting) -> Cut:
        traced = ekgfx.trace(setting.model, setting.example)
        result = ekgfx.search(traced, setting.seen, flops=setting.asked.keep, **options)
        pruned = ekgfx.prune(setting.model, result.plan, traced)
        return pruned, lambda rows, place: ekgfx.build_bank(traced, result, rows, place)

    return cut


METHODS = {
    "Torch-Pruning, L2 magnitude, uniform": torch_pruning_of(magnitude, overall=False),
    "Torch-Pruning, Taylor, uniform": torch_pruning_of(taylor, overall=False),
    "Torch-Pruning, Taylor, global": torch_pruning_of(taylor, overall=True),
    "ekgfx, L1 magnitude, uniform": ekgfx_by(strategy="uniform", importance="magnitude"),
    "ekgfx, EKG": ekgfx_by(accept=4),
}
TAUGHT = "ekgfx, EKG, taught by its bank"


def main(asked: argparse.Namespace) -> None:
    if asked.table:
        table(list(Lines(asked.table)))
        return
    if not (asked.data and asked.weights and asked.output):
        raise SystemExit("give --data, --weights and --output, or --table")
    torch.set_num_threads(1)
    lines, work = Lines(asked.output), Path(asked.output).with_suffix("")
    work.mkdir(exist_ok=True)
    setting = prepare(asked)
    for seed in asked.seeds:
        for method, cut in METHODS.items():
            names = [method, TAUGHT] if method == "ekgfx, EKG" else [method]
            if all({"method": name, "seed": seed} in lines for name in names):
                continue
            start = time.process_time()
            pruned, bank_of = cut(setting)
            spent = time.process_time() - start
            calibrate(pruned, setting.data.loader("train", BATCH, shuffle=True, seed=0), limit=NOTED)
            torch.save(pruned, work / f"{method}.pt")
            found = {"macs": setting.macs(pruned), "params": count(pruned), "cut": setting.test(pruned)}
            for name in names:
                if {"method": name, "seed": seed} not in lines:
                    bank = taught(setting, bank_of, work) if name == TAUGHT and bank_of else None
                    trained = train(setting, copy.deepcopy(pruned), seed, bank)
                    line = {"method": name, "seed": seed, **found, "trained": trained, "cut_seconds": round(spent, 1)}
                    lines.add(line)
    if not any("faster" in line for line in lines):
        lines.add(latency(setting, work))
    table(list(lines))


def prepare(asked: argparse.Namespace) -> Setting:
    """The network with its weights, and the images."""
    model = (resnet56_cifar_projection if Path(asked.weights).suffix == ".npz" else resnet56_cifar)()
    model.load_state_dict(read_weights(Path(asked.weights)), strict=False)
    normal: Any = model.pretrained_cfg
    data = datasets.load(asked.data, mean=normal["mean"], std=normal["std"], seed=0)
    _, seen = data.search_subset(seed=0)
    batches = [(batch.images, batch.labels) for batch in data.loader("train", BATCH, subset=seen)]
    return Setting(asked, model.eval(), data, batches)


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def taught(setting: Setting, bank_of: Callable[..., Any], work: Path) -> Any:
    """The memory bank over the images to train on."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        rows = setting.data.loader("train", BATCH, subset=range(setting.asked.samples))
        return bank_of(rows, Path(place) / "bank").resident(torch.device("cpu"))


def train(setting: Setting, model: nn.Module, seed: int, bank: Any) -> float:
    """Accuracy on the test set after a short training."""
    asked = setting.asked
    ekgfx.finetune(
        model,
        setting.data,
        bank=bank,
        subset=range(asked.samples),
        epochs=asked.epochs,
        lr=0.01,
        channels_last=True,
        seed=seed,
        val_fraction=0,
    )
    return setting.test(model)


def latency(setting: Setting, work: Path) -> dict[str, Any]:
    """Medians over all networks in turn, in onnxruntime on one CPU thread."""
    networks = {"dense": setting.model}
    for method in METHODS:
        networks[method] = torch.load(work / f"{method}.pt", weights_only=False)
    files = {name: to_onnx(network, setting.example, work / f"{name}.onnx") for name, network in networks.items()}
    measured = measure_latency(files, setting.example, batches=(64,), threads=1, seconds=60.0)
    faster = {row.network: asdict(row.ratio) for row in measured.speedups}
    return {"faster": faster, "macs": setting.macs(setting.model), "before": setting.test(setting.model)}


def table(lines: list[dict[str, Any]]) -> None:
    """Means over the seeds as Markdown."""
    head = next(line for line in lines if "faster" in line)
    print("| | MACs | parameters | after the cut | after training | faster, batch 64 |\n|---|---|---|---|---|---|")
    for name in dict.fromkeys(line["method"] for line in lines if "method" in line):
        rows = [line for line in lines if line.get("method") == name]
        ends = [100 * row["trained"] for row in rows]
        spread = f" ({min(ends):.1f} … {max(ends):.1f})" if len(ends) > 1 else ""
        first, ratio = rows[0], head["faster"].get(name)
        faster = f"{ratio['value']:.2f}× ({ratio['low']:.2f} … {ratio['high']:.2f})" if ratio else ""
        print(
            f"| {name} | {first['macs'] / head['macs']:.1%} | {first['params'] / 1e3:.0f} k | {first['cut']:.1%} | "
            f"{sum(ends) / len(ends):.1f}%{spread} | {faster} |"
        )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="cifar10:DIR")
    parser.add_argument("--weights", help="of ResNet-56")
    parser.add_argument("--output", help="JSON lines")
    parser.add_argument("--table", help="print what is in this file, and measure nothing")
    parser.add_argument("--keep", type=float, default=0.45)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=10_000, help="training images")
    parser.add_argument("--test-images", type=int, help="all by default")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
