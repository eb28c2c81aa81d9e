"""Inputs without a batch beside those that have one: positions of the image tokens (Flux), a set of texts, a number."""

from pathlib import Path

import pytest
import torch
from ekgfx.export import check_parity, to_onnx
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import ExportError
from ekgfx.verify import check_masked, check_pruned


class Placed(nn.Module):
    """Tokens (B, N, 5) at places (N, 3), and one number; heads of a fixed width, which no cut of them keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.out = nn.Linear(5, 12), nn.Linear(3, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor, places: Tensor, strength: Tensor) -> Tensor:
        y = (self.tokens(x) + strength * self.places(places)).relu()
        heads = y.view(*y.shape[:2], -1, 4).softmax(-1).flatten(2)
        return self.out(heads)


def inputs(batch: int, kind: torch.dtype = torch.float64, length: int = 6) -> tuple[Tensor, ...]:
    torch.manual_seed(batch)
    tensors = torch.randn(batch, length, 5), torch.randn(length, 3), torch.tensor(0.7)
    return tuple(tensor.to(kind) for tensor in tensors)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_batch_is_what_every_output_begins_with(order: tuple[int, ...]) -> None:
    """Whichever input comes first."""
    names = "x", "places", "strength"

    def given(batch: int) -> dict[str, Tensor]:
        return {names[i]: inputs(batch)[i] for i in order}

    model = Placed().double().eval()
    traced = ekgfx.trace(model, (), given(2))
    assert traced.batch.size == 2 and list(traced.groups) == ["tokens"]
    plan = ekgfx.Plan({"tokens": (0, 2)})
    pruned = ekgfx.prune(model, plan, traced)
    for batch in (1, 3, 6):
        assert check_masked(traced, plan, (), given(batch)) < 1e-12
        assert check_pruned(traced, plan, pruned, (), given(batch)) < 1e-12


def test_a_batch_of_one_beside_a_table_is_told_by_a_run() -> None:
    traced = ekgfx.trace(Placed().double().eval(), inputs(1))
    assert traced.batch.size == 2
    assert check_masked(traced, ekgfx.Plan({"tokens": (0, 2)}), inputs(3)) < 1e-12

    class OfOne(nn.Module):
        """Refuses two."""

        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.out(self.inside(x).relu().view(1, -1)) + table.sum()

    assert ekgfx.trace(OfOne().eval(), (torch.randn(1, 5), torch.randn(3, 2))).example[0][0].shape == (1, 5)


def test_no_size_is_the_batch_where_an_output_begins_otherwise() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images, self.texts = nn.Linear(5, 8), nn.Linear(4, 8)

        def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.images(images) @ self.texts(texts).T
            return scores, scores.T

    traced = ekgfx.trace(Scores().eval(), (torch.randn(2, 5), torch.randn(3, 4)))
    assert traced.batch.size == 0 and next(iter(traced.groups.values())).size == 8


def test_a_file_takes_any_batch_and_the_table_as_it_is(tmp_path: Path) -> None:
    model, path = Placed().eval(), tmp_path / "net.onnx"
    to_onnx(model, inputs(2, torch.float32), path)
    assert check_parity(model, path, inputs(5, torch.float32)).batches == (1, 5)


class Drawing(nn.Module):
    """Draws in evaluation mode, as an autoencoder that samples its code."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.inside(x).relu())
        return y + torch.randn_like(y)


def test_a_model_that_draws_is_cut_and_compared_with_the_same_numbers() -> None:
    model, x = Drawing().double().eval(), torch.randn(4, 5, dtype=torch.float64)
    traced, plan = ekgfx.trace(model, x), ekgfx.Plan({"inside": (0, 3, 4)})
    pruned = ekgfx.prune(model, plan, traced)
    assert check_masked(traced, plan, (x,)) < 1e-12 and check_pruned(traced, plan, pruned, (x,)) < 1e-12
    state = torch.get_rng_state()
    ekgfx.prune(model, plan, traced)
    assert torch.equal(state, torch.get_rng_state())


def test_a_check_says_that_the_model_draws(tmp_path: Path) -> None:
    model, x, path = Drawing().eval(), torch.randn(4, 5), tmp_path / "net.onnx"
    to_onnx(model, x, path)
    with pytest.raises(ExportError, match="the model itself draws random numbers"):
        check_parity(model, path, x)
