"""The paper's CIFAR-10 experiments: a network to 45% of its MACs, with and without knowledge. Wants a GPU.

    python benchmarks/gpu/cifar10.py --data cifar10:DIR --weights FILE --output OUT --graphs --amp bf16
    python benchmarks/gpu/cifar10.py --model mobilenetv2 --data cifar10:DIR --output OUT --graphs
    python benchmarks/gpu/cifar10.py … --device cpu --samples 512 --epochs 1 --keep 0.97 --test-images 500
    python benchmarks/gpu/cifar10.py … --plan "referee/Torch-Pruning, Taylor, global.plan.json"
    python benchmarks/gpu/cifar10.py … --repair 500 --val-fraction 0.1

The third is a dry run; the fourth trains, on labels alone, what another method cuts (benchmarks/peers.py referee
writes the plans); the last repairs the network on 500 training images before its fine-tuning, holds a tenth out, and
keeps the best epoch. For resnet56, FILE is one with option-A shortcuts (safetensors), or the EKG authors' (.npz):
that takes projection shortcuts. mobilenetv2 may do without: no weights of its CIFAR form were published, so that it
is first trained (`--pretrain` epochs, the rest as in the recipe cifar10-mobilenetv2), once for each seed.

Every line of the output is one network: search and fine-tuning knowledge, seed, accuracy before, after the search,
the repair and fine-tuning, kept MACs, minutes of each part, the history of losses, the environment. A line that is
there is not measured again, and what was cut short goes on at its last search step or epoch: the same command again,
as often as need be (`--work` holds what that takes). Data and augmentation lie on the GPU; the network trains in
channels-last, with --amp bf16 in half precision, with --graphs as CUDA graphs. Minutes of fine-tuning are without
evaluations.
"""

import argparse
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ekgfx.export.environment import processor
from torch import nn

import ekgfx
from ekgfx import data as datasets
from ekgfx.base.files import append_line, read_json, read_lines, write_json
from ekgfx.graph.plan import Plan
from ekgfx.models import mobilenetv2_cifar, resnet56_cifar, resnet56_cifar_projection
from ekgfx.models.weights import read_weights
from ekgfx.runs.checkpoint import load_tensors, save_tensors
from ekgfx.search import SearchResult, Step
from ekgfx.settings import recipe
from ekgfx.surgery.calibrate import calibrate
from ekgfx.training.evaluation import evaluate
from ekgfx.training.step_zero import prepare

EVALUATED = 1000
"""Images per batch of an evaluation."""
BANKED = 256
"""Images per batch of validation and memory bank, as the authors take them."""


def main() -> None:
    asked = arguments()
    device = torch.device(asked.device)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    output = Path(asked.output)
    done = [{"schedule": "multistep", **line["experiment"]} for line in read_lines(output)]
    for seed in asked.seeds:
        for guide in dict.fromkeys(pair.split("/")[0] for pair in asked.knowledge):
            tunings = [pair.split("/")[1] for pair in asked.knowledge if pair.split("/")[0] == guide]
            wanted = [tune for tune in tunings if experiment(asked, seed, guide, tune) not in done]
            if not wanted:
                continue
            search = Searched(asked, seed, guide, device)
            for tune in wanted:
                row = {"experiment": experiment(asked, seed, guide, tune), **tuned(asked, search, tune)}
                append_line(output, row)
                print(json.dumps({key: row[key] for key in ("experiment", "accuracy", "minutes")}), flush=True)


def experiment(asked: argparse.Namespace, seed: int, guide: str, tune: str) -> dict[str, Any]:
    """What makes a line of the output the one it is."""
    kept = ("keep", "epochs", "schedule", "lr", "samples", "test_images", "accept", "amp", "graphs")
    return {
        "model": asked.model,
        "weights": Path(asked.weights).name if asked.weights else f"{asked.pretrain} epochs of pre-training",
        "search_knowledge": guide,
        "tuning_knowledge": tune,
        "seed": seed,
        **{key: getattr(asked, key) for key in kept},
        **({"repair": asked.repair} if asked.repair else {}),
        **({"val_fraction": asked.val_fraction} if asked.val_fraction else {}),
        **({"plan": Path(asked.plan).name.removesuffix(".plan.json")} if asked.plan else {}),
    }


def folder(work: Path, identity: dict[str, Any]) -> Path:
    """Where unfinished work lies that is the same for equal `identity`."""
    found = work / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    found.mkdir(parents=True, exist_ok=True)
    return found


def network(asked: argparse.Namespace) -> nn.Module:
    """The network with the weights asked for, or with random ones."""
    if asked.model == "mobilenetv2":
        factory = mobilenetv2_cifar
    else:
        factory = resnet56_cifar_projection if Path(asked.weights).suffix == ".npz" else resnet56_cifar
    model: nn.Module = factory()
    if asked.weights:
        missing = model.load_state_dict(read_weights(Path(asked.weights)), strict=False).missing_keys
        assert all(name.endswith("num_batches_tracked") for name in missing), missing
    return model


def pretrained(asked: argparse.Namespace, model: nn.Module, data: datasets.Data, place: Path) -> None:
    """Train the unpruned network as the recipe does, or take it as it was trained before."""
    changes = {"epochs": asked.pretrain, "amp": asked.amp, "channels_last": True}
    ekgfx.finetune(
        compiled(asked, model),
        data,
        subset=shown(asked),
        checkpoint=place / "dense.safetensors",
        on_epoch=lambda epoch: print("pre-training", asdict(epoch), flush=True),
        **{**asdict(recipe.load("cifar10-mobilenetv2").pretrain), **changes},
    )


def shown(asked: argparse.Namespace) -> range | None:
    """The training images to use; None for all."""
    return None if asked.samples is None else range(asked.samples)


def compiled(asked: argparse.Namespace, model: nn.Module) -> nn.Module:
    """The model as it trains fastest; it shares its weights with what is returned."""
    return torch.compile(model, mode="reduce-overhead") if asked.graphs else model  # type: ignore[return-value]


class Searched:
    """Step 0 and the search, or what is left of them to do. accuracy: of the network before; minutes: of the parts;
    result: None where the plan is another method's."""

    def __init__(self, asked: argparse.Namespace, seed: int, guide: Any, device: torch.device) -> None:
        torch.manual_seed(seed)
        model = network(asked).to(device)
        normal: Any = model.pretrained_cfg
        self.seed, self.device = seed, device
        self.data = datasets.load(asked.data, mean=normal["mean"], std=normal["std"], seed=seed).to(device)
        images = None if asked.test_images is None else range(asked.test_images)
        self.test = self.data.loader("test", EVALUATED, subset=images)
        identity = {**experiment(asked, seed, guide, ""), "epochs": 0, "schedule": "", "lr": 0, "graphs": False}
        for later in ("repair", "val_fraction"):
            identity.pop(later, None)
        if asked.weights:  # then the precision of training does not matter before fine-tuning
            identity["amp"] = None
        work = Path(asked.work or Path(asked.output).with_suffix(""))
        self.folder = folder(work, identity)
        if not asked.weights:
            training = {key: getattr(asked, key) for key in ("model", "pretrain", "amp", "samples")}
            pretrained(asked, model, self.data, folder(work, {**training, "seed": seed}))
        step0 = folder(
            work, {key: identity[key] for key in ("model", "weights", "seed", "amp", "samples", "test_images")}
        )
        dense, facts = step0 / "prepared.safetensors", step0 / "facts.json"
        if not facts.exists():
            before, start = evaluate(model.eval(), self.test).accuracy, time.monotonic()
            prepare(model, self.data, batch_size=BANKED, seed=seed)
            save_tensors(model, dense)
            write_json(facts, {"before": before, "seconds": time.monotonic() - start})
        load_tensors(model, dense)
        self.accuracy = {"before": read_json(facts)["before"]}
        _, val = self.data.search_subset(seed=seed)
        batches = [(batch.images, batch.labels) for batch in self.data.loader("train", BANKED, subset=val)]
        self.traced = ekgfx.trace(model.eval(), batches[0][0][:2])
        self.result = None if asked.plan else self.found(asked, guide, batches)
        self.plan = self.result.plan if self.result else Plan.from_json(Path(asked.plan).read_text())
        self.losses = self.result.losses if self.result else []
        searched = sum(step.seconds for step in self.result.steps) if self.result else 0.0
        self.minutes = {"step 0": read_json(facts)["seconds"] / 60, "search": searched / 60}

    def found(self, asked: argparse.Namespace, guide: Any, batches: Any) -> SearchResult:
        """What the search finds on these batches."""
        history = self.folder / "history.jsonl"
        return ekgfx.search(
            self.traced,
            batches,
            flops=asked.keep,
            knowledge=guide,
            accept=asked.accept,
            seed=self.seed,
            resume_from=read_lines(history),
            on_step=lambda step: self.note(history, step),
        )

    def note(self, history: Path, step: Step) -> None:
        """Keep a step of the search."""
        append_line(history, step.to_json())
        print(
            f"step {step.number}: {step.kept_fraction:.3f} of the MACs, loss {step.measure.loss:.5f}, "
            f"{len(step.candidates)} candidates, {step.seconds:.1f} s",
            flush=True,
        )


def tuned(asked: argparse.Namespace, search: Searched, tune: Any) -> dict[str, Any]:
    """Cut, fill the bank, fine-tune: accuracy on the test set after each, and what a figure needs beside it."""
    traced, plan, data, device = search.traced, search.plan, search.data, search.device
    pruned = ekgfx.prune(traced.model, plan, traced)
    calibrate(pruned, data.loader("train", BANKED, shuffle=True, seed=search.seed), limit=20)
    accuracy = {**search.accuracy, "searched": evaluate(pruned, search.test).accuracy}
    minutes = dict(search.minutes)
    if asked.repair:
        images = data.loader("train", BANKED, subset=shown(asked))
        repaired = ekgfx.repair(pruned, traced, plan, images, most=asked.repair, seed=search.seed)
        minutes["repair"] = repaired.seconds / 60
        accuracy["repaired"] = evaluate(pruned, search.test).accuracy
    tuning = experiment(asked, search.seed, "", tune)
    place = folder(search.folder, tuning)
    bank, banked = None, 0.0
    if tune != "none":
        rows, clock = data.loader("train", BANKED, subset=shown(asked)), place / "bank-seconds.json"
        before = read_json(clock) if clock.exists() else 0.0
        bank = ekgfx.build_bank(
            traced,
            search.result,
            rows,
            place / "bank",
            knowledge=tune,
            on_progress=lambda progress: write_json(clock, before + progress.seconds),
        ).resident(device)
        banked = read_json(clock)
    epochs = ekgfx.finetune(
        compiled(asked, pruned),
        data,
        bank=bank,
        subset=shown(asked),
        test=search.test,
        checkpoint=place / "finetune.safetensors",
        on_epoch=lambda epoch: print(asdict(epoch), flush=True),
        epochs=asked.epochs,
        lr=asked.lr,
        schedule=asked.schedule,
        amp=asked.amp,
        channels_last=True,
        seed=search.seed,
        val_fraction=asked.val_fraction,
    )
    if epochs.before is not None:
        judged = [epoch.val_accuracy for epoch in epochs]
        accuracy["held out"] = {"before": epochs.before.accuracy, "epochs": judged, "kept": epochs.kept}
    trained = sum(epoch.seconds for epoch in epochs) / 60
    final = evaluate(pruned, search.test).accuracy
    cuda = device.type == "cuda"
    return {
        "accuracy": {
            **accuracy,
            "finetuned": final,
            "epochs": [epoch.test_accuracy for epoch in epochs],
        },
        "macs": [traced.cost().macs, traced.cost(plan).macs],
        "params": [traced.cost().params, traced.cost(plan).params],
        "widths": traced.groups.widths(plan),
        "losses": search.losses,
        "minutes": {
            part: round(taken, 3) for part, taken in {**minutes, "bank": banked / 60, "fine-tuning": trained}.items()
        },
        "hardware": torch.cuda.get_device_name(device) if cuda else processor(),
        "threads": None if cuda else torch.get_num_threads(),
        "versions": {"ekgfx": ekgfx.__version__, "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--model", choices=["resnet56", "mobilenetv2"], default="resnet56")
    parser.add_argument("--weights", help="file; mobilenetv2 is trained first where there is none")
    parser.add_argument("--pretrain", type=int, default=200, help="epochs of that training")
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--work", help="folder for unfinished work  [default: OUTPUT without its ending]")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
    parser.add_argument(
        "--knowledge",
        type=lambda text: text.split(","),
        default=["ensemble/ensemble", "ensemble/none", "none/none"],
        help="search/fine-tuning knowledge, such as ensemble/single; comma between several",
    )
    parser.add_argument("--plan", help="a plan's JSON file to train instead of searching for one")
    parser.add_argument("--keep", type=float, default=0.45)
    parser.add_argument("--repair", type=int, help="training images to repair on; none by default, as in the paper")
    parser.add_argument("--val-fraction", type=float, default=0.0, help="held out; keeps the best epoch  [default: 0]")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--schedule", choices=["multistep", "cosine"], default="multistep")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--accept", type=int, default=1)
    parser.add_argument("--samples", type=int, help="training images; all by default")
    parser.add_argument("--test-images", type=int, help="images to measure accuracy on; all by default")
    parser.add_argument("--amp", choices=["bf16", "fp16"], default=None)
    parser.add_argument("--graphs", action="store_true", help="torch.compile with CUDA graphs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    if asked.model == "resnet56" and not asked.weights:
        parser.error("resnet56 needs --weights FILE")
    if asked.plan:
        asked.knowledge = ["none/none"]
    return asked


if __name__ == "__main__":
    main()
