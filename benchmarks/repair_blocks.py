"""Does a label-free distillation, block by block, find more right answers after the repair? On small networks.

    python benchmarks/repair_blocks.py resnet20 --images cifar10:DIR --weights resnet20-cifar10.safetensors \
        --output benchmarks/results/repair_blocks.jsonl

After the repair, the weights of each residual block are trained in turn (Adam, statistics frozen) to give what the
unpruned network has behind the block, from what the pruned network has before it, on the images of the repair; the last
part, with the head, is trained on the KL divergence. Every fifth image is held out: of each block's epochs, and of the
untrained block, the one is kept whose error is smallest on these. Labels are not looked at.

Plans are L1 magnitude at uniform widths. Accuracy is that of the test images. A line of the output is one network; one
that is there is not measured again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import ranking
import torch
from common import Lines, chosen, environment
from torch import Tensor, fx, nn

import ekgfx
from ekgfx import data as datasets
from ekgfx.execution.subnetwork import SubNetwork, slice_tensor
from ekgfx.graph.plan import Plan
from ekgfx.models import resnet20_cifar, resnet56_cifar_projection
from ekgfx.models.weights import load_weights
from ekgfx.repair.judge import divergence
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.evaluation import evaluate

NETWORKS = {"resnet20": resnet20_cifar, "resnet56": resnet56_cifar_projection}
Values = dict[str, Any]


def sums(traced: TracedModel) -> list[fx.Node]:
    """What ends a block: residual sums, with the activation that alone reads them."""
    found = []
    for operation in traced.operations:
        node = operation.node
        if str(operation.target) == "aten.add.Tensor" and len(node.all_input_nodes) == 2:
            (user,) = node.users if len(node.users) == 1 else (node,)
            found.append(user if "relu" in str(user.target) else node)
    return found


class Blocks:
    """Both networks on all images, block by block. images: to train on, and held out."""

    def __init__(self, traced: TracedModel, plan: Plan, pruned: nn.Module, images: Tensor, asked: argparse.Namespace):
        self.traced, self.asked, self.kept = traced, asked, traced.groups.kept(plan)
        self.own = dict(pruned.named_parameters())
        tensors = {**self.own, **dict(pruned.named_buffers())}
        self.weights = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.network = SubNetwork(traced, self.kept, weights=self.weights)
        *nodes, output = traced.graph.nodes
        ends = [*sums(traced), *output.all_input_nodes]
        given = [node for node in nodes if node.op == "placeholder"]
        self.nodes = [node for node in nodes if node.op != "placeholder"]
        self.stops = [(end, self.nodes.index(end) + 1) for end in ends]
        every = torch.arange(len(images)) % 5 == 4
        with torch.no_grad():
            parts = [self.network.inputs((part,), {}) for part in (images[~every], images[every])]
            self.values: list[Values] = [self.network.follow(given, inputs, {}, {}) for inputs in parts]
            names = [end.name for end in ends]
            self.truth = [SubNetwork(traced, {}).run((x,), capture=names)[1] for x in (images[~every], images[every])]

    def train(self) -> list[tuple[str, float, float]]:
        """Block after block; held-out errors before and after. The pruned network has the weights then."""
        start, found = 0, []
        for end, stop in self.stops:
            nodes = self.nodes[start:stop]
            found.append((end.name, *self.block(nodes, end, last=stop == len(self.nodes))))
            print(found[-1], flush=True)
            with torch.no_grad():
                for values in self.values:
                    self.network.follow(nodes, {}, values, {})
            start = stop
        with torch.no_grad():
            for name, parameter in self.own.items():
                parameter.copy_(self.weights[name])
        return found

    def block(self, nodes: list[fx.Node], end: fx.Node, last: bool) -> tuple[float, float]:
        """Trains the weights that these nodes read; leaves the best ones by held-out images."""
        read = {source.name for node in nodes for source in node.all_input_nodes}
        names = sorted(name for node, name in self.traced.weights.items() if node in read and name in self.own)
        weights = [self.weights[name].requires_grad_() for name in names]
        truth = [slice_tensor(part[end.name], self.traced.dims[end.name], self.kept) for part in self.truth]

        def error(part: int, picks: Tensor) -> Tensor:
            values = {
                name: value[picks] if name in self.streams(nodes) else value
                for name, value in self.values[part].items()
            }
            y, t = self.network.follow(nodes, {}, values, {})[end.name], truth[part][picks]
            return divergence(t, y) / len(t) if last else (y - t).square().sum() / (t - t.mean(0)).square().sum()

        optimizer = torch.optim.Adam(weights, lr=self.asked.lr)
        steps = self.asked.epochs * -(-len(truth[0]) // self.asked.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(self.asked.seed)
        everything, best = torch.arange(len(truth[1])), [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            first = least = float(error(1, everything))
        for _ in range(self.asked.epochs):
            for picks in torch.randperm(len(truth[0]), generator=generator).split(self.asked.batch):
                optimizer.zero_grad()
                error(0, picks).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                now = float(error(1, everything))
                if now < least:
                    least, best = now, [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, value in zip(weights, best, strict=True):
                weight.requires_grad_(False).copy_(value)
        return first, least

    def streams(self, nodes: list[fx.Node]) -> set[str]:
        """What the nodes read that has a row for each image."""
        return {source.name for node in nodes for source in node.all_input_nodes} - self.traced.weights.keys()


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    model = NETWORKS[asked.network]().eval()
    load_weights(model, Path(asked.weights))
    normal: Any = getattr(model, "pretrained_cfg", None)
    mean, std = (normal["mean"], normal["std"]) if asked.network == "resnet56" else ranking.NORMAL["resnet20"]
    data = datasets.load(asked.images, mean=mean, std=std, seed=asked.seed)
    traced = ekgfx.trace(model, torch.zeros(2, 3, 32, 32))
    plan = ekgfx.search(traced, flops=asked.keep, strategy="uniform", importance="magnitude").plan
    order = torch.randperm(data.size("train"), generator=torch.Generator().manual_seed(asked.seed))[: asked.count]
    images = torch.cat([batch.images for batch in data.loader("train", 500, subset=order)])
    pruned = ekgfx.prune(model, plan, traced).eval()

    def score() -> dict[str, float | None]:
        test = data.loader("test", 500, subset=torch.arange(asked.test_images))
        found = evaluate(pruned, test)
        return {"accuracy": found.accuracy, "loss": found.loss}

    ekgfx.repair(pruned, traced, plan, images, most=asked.count, seed=asked.seed)
    repaired, clock = score(), time.process_time()
    blocks = Blocks(traced, plan, pruned, images, asked).train()
    seconds = time.process_time() - clock
    return {"repaired": repaired, "distilled": score(), "blocks": blocks, "cpu_seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("network", choices=[*NETWORKS])
    parser.add_argument("--images", required=True, help="data SPEC")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--count", type=int, default=300, help="images to repair and to distil on")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20, help="of each block")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines(asked.output)
    for seed in asked.seeds:
        asked.seed = seed
        row = chosen(asked, "network", "keep", "count", "test_images", "epochs", "lr", "batch", "seed")
        if row not in lines:
            lines.add({**row, **measure(asked), **environment()})


if __name__ == "__main__":
    main()
