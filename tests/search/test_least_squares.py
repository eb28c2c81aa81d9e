"""The least-squares importance against refits by hand and by torch.linalg.lstsq."""

import logging

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.graph.plan import Plan
from ekgfx.search.least_squares import AT_ONCE, Reader, least_squares, removal_errors
from tests.search import nets
from tests.search.test_importance import problem_of


def error_without(x: Tensor, weight: Tensor, kept: list[int]) -> float:
    """What the best refit of a linear layer to the kept inputs lacks of its output, relative to what that varies."""
    x = x - x.mean(0)
    y = x @ weight.T
    best = torch.linalg.lstsq(x[:, kept], y).solution
    return float((x[:, kept] @ best - y).square().sum() / y.square().sum())


def reader_of(x: Tensor, weight: Tensor) -> Reader:
    centered = x - x.mean(0)
    gram = centered.T @ centered / len(x)
    ridge = torch.eye(len(gram), dtype=gram.dtype) * 1e-13
    return Reader((gram + ridge)[None], weight[None], torch.arange(x.shape[1])[None])


def test_two_channels_by_hand() -> None:
    """Inputs of variance 1 and 1 with covariance 1/2, and the weight (1, 2): the output varies by 1 + 4 + 2 = 7. Of one
    channel the other says all but 3/4 of the variance, so removing the first costs 3/4, and the second 4 · 3/4. Then
    nothing is left to refit to, and the other costs all that the output varies."""
    gram = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]], dtype=torch.float64)
    reader = Reader(gram, torch.tensor([[[1.0, 2.0]]], dtype=torch.float64), torch.tensor([[0, 1]]))
    weight_left = 2 + 0.5  # the second takes over half of the first
    expected = torch.tensor([0.75 / 7, weight_left**2 / 7], dtype=torch.float64)
    torch.testing.assert_close(removal_errors([reader], 2), expected, rtol=1e-12, atol=0)


def test_the_first_to_go_costs_what_a_refit_lacks() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64, generator=generator) @ torch.randn(
        6, 6, dtype=torch.float64, generator=generator
    )
    weight = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    scores = removal_errors([reader_of(x, weight)], 6)
    first = int(scores.argmin())
    alone = [error_without(x, weight, [i for i in range(6) if i != gone]) for gone in range(6)]
    assert first == min(range(6), key=alone.__getitem__)
    assert scores[first] == pytest.approx(alone[first], rel=1e-6)
    second = int(scores.argsort()[1])
    kept = [i for i in range(6) if i not in (first, second)]
    assert scores[[first, second]].sum() == pytest.approx(error_without(x, weight, kept), rel=1e-6)


class Copies(nn.Module):
    """An inverted residual, of which channel 5 is a copy of channel 2, and channel 0 the sum of 1 and 4: whatever they
    are worth, one of each need not stay."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth, self.project = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=6), nn.Conv2d(6, 8, 1)
        with torch.no_grad():
            for layer in (self.expand, self.depth):
                layer.bias.zero_()
            self.depth.weight.fill_(1.0)
            self.expand.weight[5] = self.expand.weight[2]
            self.expand.weight[0] = self.expand.weight[1] + self.expand.weight[4]

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.depth(self.expand(x))).mean((2, 3))


def test_copies_and_combinations_go_first() -> None:
    """Three channels of six span the images' three colours: any three others go for nothing, the rest do not."""
    torch.manual_seed(0)
    traced = ekgfx.trace(Copies().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64))
    images = torch.randn(200, 3, 4, 4, dtype=torch.float64)
    scores = least_squares(problem_of(traced, [(images, torch.arange(200) % 8)]), Plan(), None)["expand"].sort().values
    assert scores[2] < 0.01 < 0.05 < scores[3]


def test_removed_channels_score_zero_and_batches_do_not_matter() -> None:
    traced = nets.cnn()
    (images, labels), *_ = nets.batches(24, 24)
    plan = Plan({name: tuple(range(1, group.size)) for name, group in traced.groups.items() if group.size > 2})
    problem = problem_of(traced, [(images, labels)])
    scores = least_squares(problem, plan, None)
    assert set(scores) == set(problem.rules)
    for name, found in scores.items():
        kept = plan.kept.get(name, tuple(range(traced.groups[name].size)))
        assert bool((found[list(kept)] > 0).all()) and found.count_nonzero() == len(kept)
        assert bool(torch.isfinite(found).all())


def test_heads_and_widths_of_a_transformer_are_scored() -> None:
    """Heads are read by the projection, the MLP by its second layer, the stream by both."""
    traced = nets.vit()
    scores = least_squares(problem_of(traced, nets.batches()), Plan(), None)
    assert all(bool((found > 0).all()) for found in scores.values())


def test_what_no_linear_operator_reads_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Gated(nn.Module):
        """Queries and keys meet in a product: no weight reads them."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) @ self.key(x).mT

    traced = ekgfx.trace(Gated(), torch.randn(2, 5, 3))
    problem = problem_of(traced, [(torch.randn(6, 5, 3), torch.zeros(6, 5, dtype=torch.long))])
    with caplog.at_level(logging.WARNING, logger="ekgfx"):
        scores = least_squares(problem, Plan(), None)
    weights = [traced.tensor(f"{name}.weight") for name in ("query", "key")]
    norms = sum(weight.detach().double().abs().sum(1) for weight in weights)
    assert scores["query"].argsort().tolist() == norms.argsort().tolist()
    assert "reads query" in caplog.text


def test_many_channels_go_together() -> None:
    """The order is that of removal, whatever is removed at once."""
    generator = torch.Generator().manual_seed(1)
    size = int(4 / AT_ONCE)
    x = torch.randn(5000, size, dtype=torch.float64, generator=generator) * torch.linspace(0.1, 3, size)
    scores = removal_errors([reader_of(x, torch.ones(2, size, dtype=torch.float64))], size)
    assert (
        float(torch.corrcoef(torch.stack([scores.argsort().argsort().double(), torch.arange(size).double()]))[0, 1])
        > 0.95
    )


def test_uniform_search_takes_it() -> None:
    traced = nets.cnn()
    result = ekgfx.search(traced, nets.batches(), flops=0.6, strategy="uniform", importance="least-squares")
    assert 0 < traced.cost(result.plan).macs <= 0.6 * traced.cost().macs
