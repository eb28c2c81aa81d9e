"""ResNet-50 cut to a part of its MACs, without any fine-tuning: which method keeps most? On a few ImageNet images.

    python benchmarks/imagenet.py sample --images folder:imagenet-sample \
        --weights resnet50-imagenet-keras-fp16.safetensors --output benchmarks/results/imagenet_sample.json

The images are split at random into two halves. Searches and BatchNorm's running statistics see the first half only,
accuracy is measured on the second. The sample is small, one image per class, and was probably in the training set of
the weights: it compares methods on the same images, it is no ImageNet score. Differences come with a 95% interval by
bootstrap over the test images (10,000 resamples, paired).

Methods, all at the same budget of MACs: EKG's search (importance taylor or taylor-per-sample; several candidates a
step, no step 0); uniform widths with L1 magnitude, FPGM and BN scale; one global threshold on BN scale (as network
slimming). A method that is in the output is not measured again, and a search that was interrupted goes on after its
last step.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Sheet, chosen

import ekgfx
from ekgfx.base.files import append_line, read_lines
from ekgfx.data import Data
from ekgfx.models import source
from ekgfx.models.weights import load_weights
from ekgfx.pipeline import job
from ekgfx.search import SearchResult, Step
from ekgfx.surgery.calibrate import calibrate
from ekgfx.tracing.traced import TracedModel

RESAMPLES = 10_000
METHODS = {
    "EKG": {"strategy": "ekg", "importance": "taylor"},
    "EKG, per sample": {"strategy": "ekg", "importance": "taylor-per-sample"},
    "magnitude, uniform": {"strategy": "uniform", "importance": "magnitude"},
    "FPGM, uniform": {"strategy": "uniform", "importance": "fpgm"},
    "BN scale, uniform": {"strategy": "uniform", "importance": "bn-scale"},
    "BN scale, global": {"strategy": "global", "importance": "bn-scale"},
}


@dataclass(frozen=True)
class Setting:
    """What the methods share. seen and unseen: indices of the two halves."""

    asked: argparse.Namespace
    traced: TracedModel
    data: Data
    seen: torch.Tensor
    unseen: torch.Tensor

    def batches(self, indices: torch.Tensor) -> Iterator[Any]:
        return iter(self.data.loader("train", self.asked.batch, subset=indices))

    def score(self, network: torch.nn.Module) -> dict[str, Any]:
        """On the unseen half: accuracy, top 5, loss, and which images were right."""
        right, near, loss = [], 0, 0.0
        with torch.no_grad():
            for images, labels, _ in self.batches(self.unseen):
                logits = network(images)
                right += (logits.argmax(1) == labels).tolist()
                near += int((logits.topk(5, 1).indices == labels[:, None]).any(1).sum())
                loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count = len(right)
        return {
            "accuracy": sum(right) / count,
            "top_5": near / count,
            "loss": loss / count,
            "right": "".join("01"[hit] for hit in right),
        }

    def search(self, method: str, history: Path) -> SearchResult:
        """The method's plan; EKG's steps are kept in `history`."""
        options: dict[str, Any] = dict(METHODS[method])
        if options["strategy"] == "ekg":
            options |= {"resume_from": read_lines(history), "accept": self.asked.accept, "on_step": appending(history)}
            options["batches"] = list(self.batches(self.seen[: self.asked.search_images]))
        return ekgfx.search(self.traced, flops=self.asked.keep, **options)

    def measure(self, method: str, history: Path) -> dict[str, Any]:
        """One entry of the output."""
        result = self.search(method, history)
        pruned = ekgfx.prune(self.traced.model, result.plan, self.traced)
        calibrate(pruned, self.batches(self.seen))
        cost, full = self.traced.cost(result.plan), self.traced.cost()
        return {
            "macs_kept": cost.macs / full.macs,
            "params_kept": cost.params / full.params,
            "steps": len(result.steps),
            "search_seconds": round(sum(step.seconds for step in result.steps), 1),
            **self.score(pruned.eval()),
        }


def appending(path: Path) -> Callable[[Step], None]:
    def on_step(step: Step) -> None:
        append_line(path, step.to_json())
        print(
            f"step {step.number}: {step.kept_fraction:.3f} kept, loss {step.measure.loss:.4f}, {step.seconds:.0f} s",
            flush=True,
        )

    return on_step


SETTINGS = ("keep", "search_images", "accept", "batch", "test_images", "seed")


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    output = Path(asked.output)
    found, setting = Sheet(output, chosen(asked, *SETTINGS), methods={}), prepare(asked)
    found.keep(halves={"seen": len(setting.seen), "unseen": len(setting.unseen)})
    if "before" not in found:
        found.keep(before={"macs": setting.traced.cost().macs, **setting.score(setting.traced.model)})
    for method in asked.methods:
        if method not in found["methods"]:
            importance = METHODS[method]["importance"]
            beside = "" if importance == "taylor" else f".{importance}"
            entry = setting.measure(method, output.with_suffix(f"{beside}.history.jsonl"))
            found.keep(methods={**found["methods"], method: entry})
            print(method, {key: value for key, value in entry.items() if key != "right"}, flush=True)
    found.keep(differences=differences(found["methods"]))


def prepare(asked: argparse.Namespace) -> Setting:
    """Network and images."""
    example = Path(__file__).resolve().parents[2] / "examples" / "resnet50_keras.py"
    built = source.parse(f"{example}:resnet50", "none").build()
    load_weights(built.model, Path(asked.weights))
    folder = job.open_data(asked.images, built, asked.seed)
    data = whole(folder)
    order = torch.randperm(data.size("train"), generator=torch.Generator().manual_seed(asked.seed))
    half = len(order) // 2
    ekgfx.restore_statistics(built.model, data.loader("train", asked.batch, subset=order[:half]))
    traced = ekgfx.trace(built.model, built.example_inputs)
    return Setting(asked, traced, data, order[:half], order[half:][: asked.test_images])


def whole(data: Data) -> Data:
    """A folder without a split of its own, as one set under the name of its training split."""
    train, test = data.split("train"), data.split("test")
    files = [*train.source.files, *test.source.files]  # type: ignore[attr-defined]
    labels = [*train.source.file_labels, *test.source.file_labels]  # type: ignore[attr-defined]
    both = replace(train, source=type(train.source)(files, labels))  # type: ignore[attr-defined, type-var]
    return replace(data, _opened={"train": both, "test": test})


def differences(methods: dict[str, dict[str, Any]], one: str = "EKG") -> dict[str, Any]:
    """Accuracy of one method minus that of the others, with intervals."""
    if one not in methods:
        return {}
    draw = np.random.default_rng(0)
    ours = hits(methods[one]["right"])
    picks = draw.integers(0, len(ours), (RESAMPLES, len(ours)))
    found = {}
    for name, entry in methods.items():
        if name != one:
            gaps = ours - hits(entry["right"])
            low, high = np.percentile(gaps[picks].mean(1), [2.5, 97.5])
            found[name] = {"difference": float(gaps.mean()), "interval_95": [float(low), float(high)]}
    return found


def hits(text: str) -> np.ndarray:
    return np.array([int(character) for character in text], dtype=float)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, help="data SPEC")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True, help="JSON")
    parser.add_argument("--keep", type=float, default=0.55)
    parser.add_argument("--search-images", type=int, default=48)
    parser.add_argument("--accept", type=int, default=12)
    parser.add_argument("--test-images", type=int, default=250)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--methods", type=lambda text: text.split(";"), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
