"""The paper's main experiment: ResNet-56 on CIFAR-10 to 45% of its MACs, with and without knowledge. Wants a GPU.

    python benchmarks/gpu/cifar10_resnet56.py --data cifar10:DIR --weights FILE --output docs/cifar10.jsonl
    python benchmarks/gpu/cifar10_resnet56.py … --device cpu --samples 512 --epochs 1 --keep 0.95   # a dry run

FILE is a ResNet-56 with option-A shortcuts (safetensors), or the EKG authors' (.npz): that takes projection shortcuts.
Every line of the output is one network: search and fine-tuning knowledge, seed, accuracy before, after the search and
after fine-tuning, kept MACs, minutes of each part, the history of losses, the environment. A line that is there is not
measured again. Data and augmentation lie on the GPU; the network runs in channels-last and bfloat16, as CUDA graphs.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import ekgfx
from ekgfx import data as datasets
from ekgfx.data import Data
from ekgfx.evaluation import evaluate, reestimate_batch_norm
from ekgfx.finetune import Epoch
from ekgfx.models import resnet56_cifar, resnet56_cifar_projection
from ekgfx.prepare import prepare
from ekgfx.search import SearchResult
from ekgfx.trace import TracedModel
from ekgfx.weights import read_weights

EVALUATED = 1000
"""Images per batch of an evaluation."""
BANKED = 256
"""Images per batch of validation and memory bank, as the authors take them."""


@dataclass
class Clock:
    """Seconds of each part of the work, the device's included."""

    device: torch.device
    seconds: dict[str, float]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = time.monotonic() - start


def main() -> None:
    asked = arguments()
    device = torch.device(asked.device)
    output = Path(asked.output)
    done = [json.loads(line)["experiment"] for line in output.read_text().splitlines()] if output.exists() else []
    for seed in asked.seeds:
        for guide in dict.fromkeys(pair.split("/")[0] for pair in asked.knowledge):
            tunings = [pair.split("/")[1] for pair in asked.knowledge if pair.split("/")[0] == guide]
            wanted = [tune for tune in tunings if experiment(asked, seed, guide, tune) not in done]
            if not wanted:
                continue
            clock = Clock(device, {})
            data, traced, before, result = searched(asked, seed, guide, device, clock)
            for tune in wanted:
                row = {"experiment": experiment(asked, seed, guide, tune), "accuracy": {"before": before}}
                row["accuracy"] |= tuned(asked, seed, tune, data, traced, result, clock)
                row |= facts(traced, result, clock, device)
                with output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps({key: row[key] for key in ("experiment", "accuracy", "minutes")}), flush=True)


def experiment(asked: argparse.Namespace, seed: int, guide: str, tune: str) -> dict[str, Any]:
    """What makes a line of the output the one it is."""
    kept = ("keep", "epochs", "lr", "samples", "accept", "amp", "graphs")
    return {
        "weights": Path(asked.weights).name,
        "search_knowledge": guide,
        "tuning_knowledge": tune,
        "seed": seed,
        **{key: getattr(asked, key) for key in kept},
    }


def searched(
    asked: argparse.Namespace, seed: int, guide: Any, device: torch.device, clock: Clock
) -> tuple[Data, TracedModel, float | None, SearchResult]:
    """Step 0 and the search; the data, the traced model, its test accuracy before, and the search's result."""
    authors = asked.weights.endswith(".npz")
    model = (resnet56_cifar_projection if authors else resnet56_cifar)()
    missing = model.load_state_dict(read_weights(Path(asked.weights)), strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    model.to(device)
    normal = model.pretrained_cfg
    data = datasets.load(asked.data, mean=normal["mean"], std=normal["std"], seed=seed).to(device)
    test = data.loader("test", EVALUATED)
    before = evaluate(model.eval(), test).accuracy
    with clock.part("step 0"):
        prepared = prepare(model, data, batch_size=BANKED, seed=seed)
    traced = ekgfx.trace(model, prepared.batches[0][0][:2])
    with clock.part("search"):
        result = ekgfx.search(
            traced,
            prepared.batches,
            flops=asked.keep,
            knowledge=guide,
            accept=asked.accept,
            seed=seed,
            on_step=lambda step: print(
                f"step {step.number}: {step.kept_fraction:.3f} of the MACs, loss {step.measure.loss:.5f}, "
                f"{len(step.candidates)} candidates, {step.seconds:.1f} s",
                flush=True,
            ),
        )
    return data, traced, before, result


def tuned(
    asked: argparse.Namespace,
    seed: int,
    tune: Any,
    data: Data,
    traced: TracedModel,
    result: SearchResult,
    clock: Clock,
) -> dict[str, Any]:
    """Cut, fill the bank, fine-tune: test accuracy after each."""
    device = clock.device
    test = data.loader("test", EVALUATED)
    subset = None if asked.samples is None else range(asked.samples)
    pruned = ekgfx.prune(traced.model, result.plan, traced)
    reestimate_batch_norm(pruned, data.loader("train", BANKED, shuffle=True, seed=seed), limit=20)
    after_search = evaluate(pruned, test).accuracy
    bank = None
    with clock.part("bank"):
        if tune != "none":
            built = ekgfx.build_bank(traced, result, data.loader("train", BANKED, subset=subset), knowledge=tune)
            bank = built.resident(device)
    epochs: list[Epoch] = []
    with clock.part("fine-tuning"):
        ekgfx.finetune(
            torch.compile(pruned, mode="reduce-overhead") if asked.graphs else pruned,
            data,
            bank=bank,
            subset=subset,
            test=test,
            on_epoch=lambda epoch: epochs.append(epoch) or print(asdict(epoch), flush=True),  # type: ignore[func-returns-value]
            epochs=asked.epochs,
            lr=asked.lr,
            amp=asked.amp,
            channels_last=True,
            seed=seed,
        )
    final = evaluate(pruned, test).accuracy
    return {"searched": after_search, "finetuned": final, "epochs": [epoch.test_accuracy for epoch in epochs]}


def facts(traced: TracedModel, result: SearchResult, clock: Clock, device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it."""
    cuda = device.type == "cuda"
    return {
        "macs": [traced.cost().macs, traced.cost(result.plan).macs],
        "params": [traced.cost().params, traced.cost(result.plan).params],
        "widths": traced.groups.widths(result.plan),
        "losses": result.losses,
        "minutes": {name: round(seconds / 60, 3) for name, seconds in clock.seconds.items()},
        "hardware": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "versions": {"ekgfx": ekgfx.__version__, "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
    parser.add_argument(
        "--knowledge",
        type=lambda text: text.split(","),
        default=["ensemble/ensemble", "ensemble/none", "none/none"],
        help="search/fine-tuning knowledge, such as ensemble/single; comma between several",
    )
    parser.add_argument("--keep", type=float, default=0.45)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--accept", type=int, default=1)
    parser.add_argument("--samples", type=int, help="training images; all by default")
    parser.add_argument("--amp", choices=["bf16", "fp16"], default=None)
    parser.add_argument("--graphs", action="store_true", help="torch.compile with CUDA graphs")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
