"""How candidates are computed: memory format and half precision, and what they do to the result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.search import SearchResult, search
from ekgfx.tracing.traced import TracedModel
from tests.search import nets
from tests.search.test_race import batches, sure


@pytest.fixture
def images(monkeypatch) -> list[Tensor]:
    """The four-dimensional values of every operator that is computed."""
    seen: list[Tensor] = []
    compute = SubNetwork.compute

    def watching(self: SubNetwork, *arguments: Any) -> Any:
        value = compute(self, *arguments)
        if isinstance(value, Tensor) and value.dim() == 4:
            seen.append(value)
        return value

    monkeypatch.setattr(SubNetwork, "compute", watching)
    return seen


def rewards(result: SearchResult) -> list[float]:
    return [step.measure.reward or 0.0 for step in result.steps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [nets.cnn, nets.downsampling])
def test_channels_last_is_the_same_search(
    make: Callable[[], TracedModel], dtype: torch.dtype, images: list[Tensor]
) -> None:
    """Plan and history; and every image is really in that format (in float64 PyTorch's convolutions do not keep it)."""
    traced = sure(make, dtype)
    data = batches(traced)
    expected = search(traced, data, flops=0.6, channels_last=False)
    assert any(not value.is_contiguous(memory_format=torch.channels_last) for value in images)
    images.clear()
    found = search(traced, data, flops=0.6, channels_last=True)
    if dtype == torch.float32:
        assert all(value.is_contiguous(memory_format=torch.channels_last) for value in images)
    assert found.plan == expected.plan
    assert [step.removed for step in found.steps] == [step.removed for step in expected.steps]
    assert rewards(found) == pytest.approx(rewards(expected), rel=1e-10 if dtype == torch.float64 else 1e-5)
    assert (found.settings["channels_last"], expected.settings["channels_last"]) == (True, False)


def test_channels_last_is_the_default_for_convolutions_on_the_cpu() -> None:
    assert search(nets.cnn(), nets.batches(), flops=0.95).settings["channels_last"] is True
    assert search(nets.vit(), nets.batches(), flops=0.95).settings["channels_last"] is True  # patches are a convolution
    one = search(nets.cnn(), strategy="uniform", importance="magnitude", flops=0.95)
    assert one.settings["channels_last"] is True


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("make", [nets.cnn, nets.vit])
def test_bf16_on_the_cpu(make: Callable[[], TracedModel], channels_last: bool, images: list[Tensor]) -> None:
    """Convolutions and products are computed in bf16, losses and scores in full; the record says so, and what was
    measured is what full precision measures, within bf16's three digits."""
    traced = sure(make, torch.float32)
    data = batches(traced)
    found = search(traced, data, flops=0.6, amp="bf16", channels_last=channels_last)
    assert torch.bfloat16 in {value.dtype for value in images}
    assert found.settings["amp"] == "bf16"
    assert found.kept_fraction <= 0.6
    for step, plan in zip(found.steps, found.plans[1:], strict=True):
        network = traced.subnetwork(plan, batch_stats=True, rescale=plan.rescale)
        with torch.no_grad():
            loss = sum(
                float(torch.nn.functional.cross_entropy(network(x), y)) * len(x) for x, y in data
            ) / sum(len(x) for x, _ in data)  # fmt: skip
        assert step.measure.loss == pytest.approx(loss, rel=0.1, abs=0.05)
        assert step.measure.loss != pytest.approx(loss, rel=1e-7)
    again = search(traced, data, flops=0.6, amp="bf16", channels_last=channels_last)
    assert again.plan == found.plan  # it is deterministic all the same


def test_bf16_is_resumed_as_it_was() -> None:
    traced = sure(nets.cnn, torch.float32)
    data = batches(traced)
    whole = search(traced, data, flops=0.6, amp="bf16")
    rest = search(traced, data, flops=0.6, amp="bf16", resume_from=whole.steps[:2])
    assert rest.plan == whole.plan
