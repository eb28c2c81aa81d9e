"""A model whose forward depends on values is answered with those of its parts that do not."""

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import TraceError
from ekgfx.tracing import trace_errors
from ekgfx.tracing.parts import Part


class Detector(nn.Module):
    """Loops over what it finds in each image, as detectors do."""

    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))

        def forward(self, features: Tensor) -> list[Tensor]:
            found = [each.flatten(1).T[each.flatten(1).sum(0) > 0] for each in features]
            return [self.head(rows) for rows in found]

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
        self.boxes, self.scale = self.Boxes(), nn.Linear(1, 1)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        features = self.backbone(torch.stack(images))
        return [boxes[: int(boxes.sum() > 0) + 1] for boxes in self.boxes(features)]


def test_parts_that_can_be_traced_alone_are_named_with_their_shares() -> None:
    torch.manual_seed(0)
    model, images = Detector().eval(), [torch.rand(3, 12, 12), torch.rand(3, 12, 12)]
    with pytest.raises(TraceError, match=r"what can be traced alone: backbone \(9\d% of the parameters\)") as raised:
        ekgfx.trace(model, (images,))
    assert "scale" not in str(raised.value)  # too small to be worth a word
    first, second = str(raised.value).partition("type ")[2].split(", and, with a plan of that, ")
    known = {"ekgfx": ekgfx, "torch": torch, "model": model, "plan": ekgfx.Plan({"0": tuple(range(5))})}
    exec(first, known)  # what the message says
    exec(second, known)
    assert model.backbone[0].out_channels == 5
    assert len(model(images)) == 2 and not any(module._forward_pre_hooks for module in model.modules())


class Anchors(nn.Module):
    """Makes its anchors by a number that a graph does not have, anew for each size of images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.size, self.anchors = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), 0, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.size != x.shape[-1]:
            self.size, self.anchors = x.shape[-1], torch.arange(int(x.new_ones(x.shape[-1]).sum()))
        return self.b(self.a(x)) + self.anchors


def test_parts_are_not_looked_for_where_a_run_before_makes_a_graph_of_the_whole(monkeypatch) -> None:
    monkeypatch.setattr(trace_errors, "parts", lambda *_: pytest.fail("a part was exported"))
    assert ekgfx.trace(Anchors().eval(), torch.randn(2, 3, 4, 4)).groups["a"].size == 8


def test_an_example_of_a_part_is_spelled_as_python() -> None:
    given = ([torch.rand(2, 3), torch.rand(2, 3, 4)], torch.zeros(2, dtype=torch.long), None)
    text = Part(0.5, given, {"scale": 2}).example()
    assert text == (
        "([torch.randn(2, 3), torch.randn(2, 3, 4)], torch.zeros(2, dtype=torch.int64), None), {'scale': 2}"
    )
    assert Part(0.5, (given,) * 9, {}).example() == "its own inputs"
    assert Part(0.5, (object(),), {}).example() == "its own inputs"
