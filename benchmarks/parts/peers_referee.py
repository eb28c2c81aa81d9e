"""One network, one budget, one set of images: ekgfx and its peers, each as its own documentation does it.

    pip install --no-deps torch-kirigami==0.2.1 onnxsim==0.8.1 && pip install datasets tqdm
    pip download --no-deps --no-binary :all: torch-kirigami==0.2.1 && tar xzf torch_kirigami-0.2.1.tar.gz
    python benchmarks/peers.py referee resnet56 --images cifar10:DIR --weights weights_pretrained.npz --keep 0.45 \
        --history benchmarks/results/repair_resnet56.history.jsonl --output benchmarks/results/referee.jsonl \
        --workflows torch_kirigami-0.2.1/examples/workflows
    python benchmarks/peers.py referee resnet50 --images folder:imagenet-sample \
        --weights resnet50-imagenet-keras-fp16.safetensors --history benchmarks/results/imagenet_sample.history.jsonl \
        --accept 4 --output benchmarks/results/referee.jsonl --workflows torch_kirigami-0.2.1/examples/workflows
    python benchmarks/peers.py referee table --output benchmarks/results/referee.jsonl

Every method starts from the same weights and may look at the same images (with labels where it uses gradients). A ratio
is the least, by bisection, that is within the budget; MACs are counted in one way for all, on what came out. EKG's plan
comes from the steps of a search (`--history`), random channels are drawn at its widths and at uniform ones. A second
search, in multiples of 8, is made here.

Which channels a peer kept is read off its network: those of BatchNorm's parameters that are still there. Pruned by that
plan, our own network must compute what the peer's does ("differs by"), and so the same repair can be given to each;
OSSCAR changes weights besides, and what our repair is given are the channels that it keeps.
Training: `--epochs` of the same on labels alone at `--lr`, from the network as it came (BatchNorm re-estimated) and
from the repaired one. Latency: onnxruntime on one CPU thread, all networks in turn. A line that is there is not
measured again.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from common import Lines, Row, chosen, environment
from ekgfx.export import measure_latency, to_onnx
from parts import repair_gain
from parts.peers_cuts import CUTS, smallest
from parts.peers_reading import kept_by, onnx_macs, right_of
from plans import at_random
from torch import Tensor, nn

import ekgfx
from ekgfx.base.files import append_line, read_lines
from ekgfx.graph.plan import Plan
from ekgfx.surgery.calibrate import calibrate
from ekgfx.tracing.traced import TracedModel

BATCHES = (1, 8)
EVEN = 8
"""Widths are multiples of this where they are even: what the CPU's convolutions compute at once, or half of it."""


@dataclass(frozen=True)
class Contest:
    """What all methods share."""

    asked: argparse.Namespace
    subject: repair_gain.Subject

    @property
    def seen(self) -> list[tuple[Tensor, Tensor]]:
        """The batches, with labels, that they may look at."""
        return self.subject.seen

    @property
    def traced(self) -> TracedModel:
        return self.subject.traced

    @property
    def model(self) -> nn.Module:
        return self.subject.traced.model

    @property
    def example(self) -> Tensor:
        return self.seen[0][0][:2]

    @property
    def budget(self) -> float:
        """MACs for one image."""
        return float(self.asked.keep * self.traced.cost().macs)

    def macs(self, network: nn.Module | onnx.ModelProto) -> int:
        """Multiply-accumulates for one image."""
        if isinstance(network, onnx.ModelProto):
            return onnx_macs(network)
        return ekgfx.trace(network, self.example).cost().macs

    @functools.cached_property
    def even(self) -> Plan:
        """The plan of EKG's search in even widths, which goes on after its last step."""
        history = Path(self.asked.output).with_suffix(f".{self.asked.network}.even.history.jsonl")
        return ekgfx.search(
            self.traced,
            self.seen,
            flops=self.asked.keep,
            align=EVEN,
            accept=self.asked.accept,
            seed=self.asked.seed,
            resume_from=read_lines(history),
            on_step=lambda step: append_line(history, step.to_json()),
        ).plan

    def least(self, cut: Callable[[float], Any], steps: int = 7) -> Any:
        """What the smallest ratio within the budget gives."""
        return smallest(cut, lambda made: self.macs(made) <= self.budget, steps)


OURS: dict[str, Callable[[Contest], Plan]] = {
    "ekgfx, EKG": lambda contest: contest.subject.plan("EKG"),
    "ekgfx, L1, uniform": lambda contest: contest.subject.plan("L1, uniform"),
    "random channels, EKG's widths": lambda contest: contest.subject.plan("random, EKG's widths"),
    "random channels, uniform": lambda contest: contest.subject.plan("random, uniform"),
    f"ekgfx, EKG, multiples of {EVEN}": lambda contest: contest.even,
    f"random channels, multiples of {EVEN}": lambda contest: at_random(
        contest.traced, contest.even, contest.asked.seed
    ),
}
_LONG = f"multiples of {EVEN}"
METHODS = sorted((*OURS, *CUTS), key=lambda name: _LONG in name)
"""In the order in which they are measured: what takes another search comes last."""


def measure(contest: Contest, name: str, work: Path) -> Row:
    """One method: what it costs, what it keeps, with and without the repair, before and after training."""
    started = time.process_time()
    if name in OURS:
        plan = OURS[name](contest)
        network = ekgfx.prune(contest.model, plan, contest.traced).eval()
    else:
        network = CUTS[name](contest)
    row: Row = {"macs": contest.macs(network), "cut_seconds": round(time.process_time() - started, 1)}
    if isinstance(network, onnx.ModelProto):
        onnx.save(network, work / f"{name}.onnx")
        session = onnxruntime.InferenceSession(work / f"{name}.onnx", providers=["CPUExecutionProvider"])
        return row | {"cut": right_of(session, contest.subject.test())}
    network.eval()
    row["class_kept"] = type(network) is type(contest.model)
    row["params"] = sum(parameter.numel() for parameter in network.parameters())
    row["cut"] = right_of(network, contest.subject.test())
    if name not in OURS:
        try:
            plan = kept_by(contest.traced, network)
        except ValueError as reason:
            return row | {"not repaired": str(reason)}
    repaired = ekgfx.prune(contest.model, plan, contest.traced).eval()
    with torch.no_grad():
        ours, theirs = repaired(contest.example), network(contest.example)
    row["differs_by"] = float((ours - theirs).norm() / ours.norm())
    calibrate(network, contest.subject.images)
    row["reestimated"] = right_of(network, contest.subject.test())
    started = time.process_time()
    asked = contest.asked
    ekgfx.repair(repaired, contest.traced, plan, contest.subject.images, most=asked.count, seed=asked.seed)
    row["repair_seconds"] = round(time.process_time() - started, 1)
    row["repaired"] = right_of(repaired, contest.subject.test())
    to_onnx(network, contest.example[:1], work / f"{name}.onnx")
    torch.save({"as it comes": network, "repaired": repaired}, work / f"{name}.pt")
    (work / f"{name}.plan.json").write_text(plan.to_json())
    return row


def trained(contest: Contest, network: nn.Module) -> float:
    """Accuracy after a short training on labels alone."""
    asked = contest.asked
    ekgfx.finetune(
        network,
        contest.subject.data,
        subset=range(asked.samples),
        epochs=asked.epochs,
        lr=asked.lr,
        schedule="constant",
        channels_last=True,
        seed=asked.seed,
        val_fraction=0,
    )
    return right_of(network.eval(), contest.subject.test())


def latency(contest: Contest, names: list[str], work: Path) -> Row:
    """How many times faster each is than the unpruned network, in turn, on one CPU thread."""
    files = {"dense": to_onnx(contest.model, contest.example[:1], work / "dense.onnx")}
    files |= {name: work / f"{name}.onnx" for name in names}
    seconds = contest.asked.latency_seconds
    measured = measure_latency(files, contest.example, batches=BATCHES, threads=1, seconds=seconds)
    faster: dict[str, Row] = {}
    for speedup in measured.speedups:
        faster.setdefault(speedup.network, {})[str(speedup.batch)] = asdict(speedup.ratio)
    return {"faster": faster}


def main(asked: argparse.Namespace) -> None:
    lines = Lines(asked.output)
    if asked.network == "table":
        print(table(list(lines)))
        return
    if not (asked.images and asked.weights and asked.history):
        raise SystemExit("give --images, --weights and --history")
    asked.count = asked.count or {"resnet50": 250, "resnet56": 500}[asked.network]
    asked.epochs = {"resnet56": 1}.get(asked.network, 0) if asked.epochs is None else asked.epochs
    torch.set_num_threads(1)
    work = Path(asked.work or Path(asked.output).with_suffix(""))
    work.mkdir(parents=True, exist_ok=True)
    subject = {"resnet50": repair_gain.resnet50, "resnet56": repair_gain.resnet56}[asked.network](asked)
    contest = Contest(asked, subject)
    same = chosen(asked, "network", "keep", "count", "seed")
    for name in METHODS:
        if {"method": name, **same} in lines:
            continue
        try:
            found = measure(contest, name, work)
        except Exception as error:
            if name in OURS:
                raise
            found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        lines.add({"method": name, **same, **found, **environment()})
    if {"method": "dense", **same} not in lines:
        ran = [row["method"] for row in lines if same.items() <= row.items() and "differs_by" in row]
        full = {"macs": contest.traced.cost().macs, "cut": right_of(contest.model, contest.subject.test())}
        lines.add({"method": "dense", **same, **full, **latency(contest, ran, work), **environment()})
    for name in [row["method"] for row in lines if same.items() <= row.items() and "differs_by" in row]:
        for start in ("as it comes", "repaired") if asked.epochs else ():
            key = {"trained": name, "from": start, **same, **chosen(asked, "epochs", "samples", "lr")}
            if key not in lines:
                network = torch.load(work / f"{name}.pt", weights_only=False)[start]
                lines.add({**key, "accuracy": trained(contest, network), **environment()})
    print(table(lines))


def table(lines: Iterable[Row]) -> str:
    """The contests as Markdown, one table each."""
    lines, told = list(lines), []
    for network, keep in dict.fromkeys((line["network"], line["keep"]) for line in lines):
        rows = [line for line in lines if (line["network"], line["keep"]) == (network, keep)]
        dense = next(line for line in rows if line.get("method") == "dense")
        ends = {(line["trained"], line["from"], line["lr"]): line["accuracy"] for line in rows if "trained" in line}
        rates = list(dict.fromkeys(rate for _, _, rate in ends))
        head = ["", "MACs", "as it comes", "BatchNorm re-estimated", "with our repair"]
        for rate in rates:
            head += [f"trained at {rate:g}", f"repaired, trained at {rate:g}"]
        head += [*(f"× faster, batch {batch}" for batch in BATCHES), "CPU s"]
        told.append("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for line in rows:
            name = line.get("method", "dense")
            if name == "dense":
                continue
            if "failed" in line:
                told.append(f"| {name} | fails: {line['failed']} |" + " |" * (len(head) - 2))
                continue
            found = [line.get(column) for column in ("cut", "reestimated", "repaired")]
            found += [ends.get((name, start, rate)) for rate in rates for start in ("as it comes", "repaired")]
            faster = dense["faster"].get(name, {})
            cells = [name, f"{line['macs'] / dense['macs']:.1%}"]
            cells += ["–" if share is None else f"{100 * share:.1f}" for share in found]
            cells += [f"{faster[str(batch)]['value']:.2f}" if str(batch) in faster else "–" for batch in BATCHES]
            told.append("| " + " | ".join([*cells, f"{line['cut_seconds']:.0f}"]) + " |")
        told.append("")
    return "\n".join(told)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", choices=["resnet50", "resnet56", "table"])
    parser.add_argument("--images", help="data SPEC")
    parser.add_argument("--weights")
    parser.add_argument("--history", help="steps of EKG's search, as JSON lines")
    parser.add_argument("--workflows", help="examples/workflows of torch-kirigami's source distribution, for OSSCAR")
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--work", help="folder for ONNX files  [default: OUTPUT without its ending]")
    parser.add_argument("--keep", type=float, default=0.55)
    parser.add_argument("--count", type=int, help="images that all may look at")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--test-images", type=int, default=250)
    parser.add_argument("--samples", type=int, default=10_000, help="images to train on")
    parser.add_argument("--epochs", type=int, help="of training  [default: 1 for resnet56, 0 for resnet50]")
    parser.add_argument("--lr", type=float, default=0.002, help="of the training, constant")
    parser.add_argument("--accept", type=int, default=1, help="groups cut in a step of the search in multiples of 8")
    parser.add_argument("--latency-seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
