"""What a step of fine-tuning costs on one CPU thread, and which ways make it cheaper: ResNet-56 in its CIFAR form.

    python benchmarks/training_speed.py --output benchmarks/results/training_speed.json

Seconds of the process for a forward and backward pass and an optimizer's step on 256 images of 32×32, the median of
`--rounds`, all ways in turn in every round; what torch.compile takes at first is told apart. Weights and images are
random, which does not change the time. Networks: unpruned; the published one at 45% of its MACs (any widths); the same
MACs with all widths multiples of 8, and of 16. Ways: PyTorch's own memory format and channels last, bf16 (autocast),
torch.compile, BatchNorm with frozen statistics. The images' augmentation and a bank's rows are timed beside them. Then
PyTorch's profiler says what a step of the published network consists of. At the end timm's networks train on 16 images
of 96 pixels (ViT: 8 of 224) in PyTorch's own format, in channels last, and so in bf16; and batch norm of 256 × 16 × 32
× 32 is compared to what it is in float64. A part that is in the output is not measured again.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from common import RESULTS, Row, Sheet, in_turn
from torch import Tensor, nn

import ekgfx
from ekgfx.data.augment import Augmentation
from ekgfx.execution.batch_norms import BatchNorms
from ekgfx.execution.channels_last import batch_norm_in_training
from ekgfx.models import resnet56_cifar_projection

BATCH = 256
PUBLISHED = "45% of the MACs, any widths"
TIMM = (
    "resnet18",
    "resnet50",
    "resnext26ts",
    "regnety_002",
    "densenet121",
    "mobilenetv2_050",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "convnext_atto",
    "poolformer_s12",
    "mobilevit_xxs",
    "vit_tiny_patch16_224",
)
FORMATS = {
    "own format": {"last": False},
    "channels last": {"last": True},
    "channels last, bf16": {"last": True, "bf16": True},
}


def networks() -> dict[str, nn.Module]:
    """Each by what it is called in the output."""
    dense = resnet56_cifar_projection().eval()
    traced = ekgfx.trace(dense, torch.randn(2, 3, 32, 32))
    found = {"unpruned": dense, PUBLISHED: ekgfx.load(RESULTS / "resnet56-cifar10-45").float()}
    for multiple in (8, 16):
        plan = ekgfx.search(traced, flops=0.45, strategy="global", importance="magnitude", align=multiple).plan
        share = traced.cost(plan).macs / traced.cost().macs
        found[f"{share:.0%} in multiples of {multiple}"] = ekgfx.prune(dense, plan, traced)
    return found


class Way:
    """One network trained in one way. step: seconds of the process for a step."""

    def __init__(
        self,
        network: nn.Module,
        *,
        last: bool = True,
        bf16: bool = False,
        compiled: bool = False,
        frozen: bool = False,
        count: int = BATCH,
        side: int = 32,
    ) -> None:
        layout = torch.channels_last if last else torch.contiguous_format
        self.network = copy.deepcopy(network).to(memory_format=layout).train()  # type: ignore[call-overload]
        if frozen:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        self.call: Callable[[Tensor], Tensor] = torch.compile(self.network) if compiled else self.network
        self.bf16 = bf16
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.images = torch.randn(count, 3, side, side).to(memory_format=layout)
        self.labels = torch.randint(0, 10, (count,))

    def step(self) -> float:
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.call(self.images)
        loss = nn.functional.cross_entropy(logits.float(), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.process_time() - start


def shares(network: nn.Module) -> dict[str, float]:
    """Of the time of a step, by kind of operator, as PyTorch's profiler sees it."""
    way = Way(network)
    way.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(2):
            way.step()
    kinds = {
        "convolution": "convolutions",
        "batch_norm": "BatchNorm",
        "clamp_min": "ReLU",
        "threshold": "ReLU",
        "add": "sums",
    }
    found: dict[str, float] = {}
    for event in seen.key_averages():
        kind = next(
            (kind for name, kind in kinds.items() if event.key.startswith("aten::") and name in event.key), "rest"
        )
        found[kind] = found.get(kind, 0.0) + event.self_cpu_time_total
    return {kind: round(time / sum(found.values()), 3) for kind, time in found.items()}


def augmentation() -> float:
    """Seconds for two views of 256 images."""
    images, draw = torch.rand(BATCH, 3, 32, 32), torch.Generator().manual_seed(0)
    start = time.process_time()
    for _ in range(2):
        Augmentation()(images, draw, colours=True)
    return time.process_time() - start


def bank_rows() -> float:
    """Seconds to read 77 teachers' rows of ten logits for 256 images, in half precision, out of 50,000."""
    rows = torch.zeros(50_000, 77, 10, dtype=torch.float16)
    chosen = torch.randint(0, len(rows), (BATCH,))
    start = time.process_time()
    rows[chosen].float().mean()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", required=True, help="JSON")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Every way is a compilation of the same forward, of which PyTorch would run the ninth uncompiled.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    sheet = Sheet(Path(asked.output), {"rounds": asked.rounds, "batch": BATCH})
    if "steps" not in sheet:
        sheet.keep(**timed(asked.rounds))
    if "shares" not in sheet:
        sheet.keep(shares=shares(networks()[PUBLISHED]))
    if "norms" not in sheet:
        sheet.keep(norms=norms())
    for name in TIMM:
        if name not in sheet.get("formats", {}):
            sheet.keep(formats={**sheet.get("formats", {}), name: in_formats(name, asked.rounds)})
            print(name, sheet["formats"][name], flush=True)


def norms() -> dict[str, dict[str, float]]:
    """How far batch norm in float32 is from float64, relative to its size: the variance, the gradient of the bias."""
    images = torch.randn(BATCH, 16, 32, 32) * 0.3 + 0.1

    def found(images: Tensor, way: AbstractContextManager[Any]) -> tuple[Tensor, Tensor]:
        norm = nn.BatchNorm2d(16, momentum=1.0, dtype=images.dtype).train()
        with way:
            y = norm(images)
        (y * y.sin()).sum().backward()
        assert norm.running_var is not None and norm.bias.grad is not None
        return norm.running_var.double(), norm.bias.grad.double()

    exact, last = found(images.double(), nullcontext()), images.to(memory_format=torch.channels_last)
    return {
        name: {
            part: float(f"{(value - right).norm() / right.norm():.1e}")
            for part, value, right in zip(("variance", "gradient of the bias"), found(given, way), exact, strict=True)
        }
        for name, given, way in (
            ("PyTorch, own format", images, nullcontext()),
            ("PyTorch, channels last", last, nullcontext()),
            ("ekgfx, channels last", last, BatchNorms(batch_norm_in_training)),
        )
    }


def in_formats(name: str, rounds: int) -> dict[str, float]:
    """Seconds of a step of one of timm's networks, in turn."""
    network = timm.create_model(name)
    shown = {"count": 8, "side": 224} if name.startswith("vit") else {"count": 16, "side": 96}
    ways = {way: Way(network, **options, **shown) for way, options in FORMATS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways.values():
        way.step()
    for _, way in in_turn(list(ways), rounds):
        seconds[way].append(ways[way].step())
    return {way: round(statistics.median(found), 4) for way, found in seconds.items()}


def timed(rounds: int) -> Row:
    """All ways in turn, and what is timed beside them."""
    ways: dict[tuple[str, str], Way] = {}
    for name, network in networks().items():
        ways[name, "channels last"] = Way(network)
        ways[name, "compiled"] = Way(network, compiled=True)
        ways[name, "compiled, frozen statistics"] = Way(network, compiled=True, frozen=True)
        if name == PUBLISHED:
            ways[name, "PyTorch's own format"] = Way(network, last=False)
            ways[name, "frozen statistics"] = Way(network, frozen=True)
            ways[name, "bf16"] = Way(network, bf16=True)
            ways[name, "compiled, bf16"] = Way(network, compiled=True, bf16=True)
    first = {key: way.step() for key, way in ways.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
    index = {str(number): key for number, key in enumerate(ways)}
    beside: dict[str, list[float]] = {"two views of the images": [], "rows of 77 teachers": []}
    for turn, number in in_turn(list(index), rounds):
        seconds[index[number]].append(ways[index[number]].step())
        print(turn, *index[number], round(seconds[index[number]][-1], 3), flush=True)
        if number == "0":
            beside["two views of the images"].append(augmentation())
            beside["rows of 77 teachers"].append(bank_rows())
    rows = [
        {
            "network": network,
            "way": way,
            "seconds": round(statistics.median(seconds[network, way]), 4),
            "first_seconds": round(first[network, way], 2),
        }
        for network, way in ways
    ]
    return {"steps": rows, "beside": {name: round(statistics.median(found), 4) for name, found in beside.items()}}


if __name__ == "__main__":
    main()
