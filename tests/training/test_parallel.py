"""Several processes train and build banks as one does on the whole batch; real processes, connected by gloo."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ekgfx import data as datasets
from ekgfx.bank import build_bank
from ekgfx.errors import RecipeError
from ekgfx.search import SearchResult, search
from ekgfx.training.finetune import finetune
from tests.search import nets
from tests.support.processes import ready, together
from tests.training.test_finetune import Fixed


class Net(nn.Module):
    """Norms of PyTorch and of timm (norm and activation in one), a parameter that is never used, two heads' dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6, momentum=None)
        self.next, self.act = nn.Conv2d(6, 5, 3), BatchNormAct2d(5, momentum=0.3)
        self.head, self.unused = nn.Linear(5, 4), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.next(self.norm(self.conv(x)).relu()))
        return self.head(x.mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def training(views: int, **options: Any) -> Any:
    """Weights, running averages and losses after a few updates; batches of 7 and 8 samples."""
    generator = torch.Generator().manual_seed(3)
    shape = (15, 1, 8, 8) if views == 1 else (views, 15, 1, 8, 8)
    images = torch.randn(shape, generator=generator, dtype=torch.float64) + 1
    labels, index = torch.arange(15) % 4, torch.arange(15)
    where = [(images[..., a:b, :, :, :], labels[a:b], index[a:b]) for a, b in ((0, 7), (7, 15))]
    model, bank = network(), None
    if views == 2:
        bank = Fixed()
        bank.values = bank.values.double()
    history = finetune(model, where, bank=bank, epochs=3, views=views, lr=0.1, parallel=True, **options)
    return model.state_dict(), [epoch.loss for epoch in history]


@pytest.mark.parametrize("views", [1, 2])
def test_training_is_that_of_one_process(views: int, tmp_path: Path) -> None:
    """In float64, where only rounding can differ, also through the choice of teachers, which sums over the batch."""
    (expected,) = together(1, tmp_path, training, views)
    assert not isinstance(expected, str), expected
    for size in (2, 3):
        for found in together(size, tmp_path, training, views):
            assert not isinstance(found, str), found
            torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-11)
            assert found[1] == pytest.approx(expected[1], rel=1e-6)  # losses are added up in float32


def from_data(batch_size: int) -> Any:
    """Weights after an epoch on a data set that is augmented: every process sees its part of the same images."""
    model, data = network().float(), datasets.load("digits")
    model.head = nn.Linear(5, 10)
    torch.nn.init.constant_(model.head.weight, 0.1)
    torch.nn.init.zeros_(model.head.bias)
    try:
        finetune(model, data, epochs=1, subset=range(50), batch_size=batch_size, parallel=True, lr=0.01)
    except RecipeError as error:
        return str(error)
    return model.state_dict()


def test_a_data_set_is_shared(tmp_path: Path) -> None:
    (expected,) = together(1, tmp_path, from_data, 16)
    for found in together(3, tmp_path, from_data, 16):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    (tmp_path / "few").mkdir()
    for found in together(3, tmp_path / "few", from_data, 2):
        assert found == "3 processes cannot share batches of 2 images; start fewer, or give a larger batch size"


@pytest.mark.parametrize("augment", [True, False])
def test_parts_make_the_whole(augment: bool) -> None:
    data = datasets.load("digits")
    options: dict[str, Any] = {"shuffle": True, "augment": augment, "views": 2, "seed": 3, "subset": range(21)}
    whole = list(data.loader("train", 8, **options))
    parts = [list(data.loader("train", 8, **options, part=(rank, 3))) for rank in range(3)]
    for number, batch in enumerate(whole):
        images, labels, index = zip(*(part[number] for part in parts), strict=True)
        assert torch.equal(torch.cat(images, 1), batch.images)
        assert torch.equal(torch.cat(labels), batch.labels) and torch.equal(torch.cat(index), batch.index)


def result_of(name: str) -> SearchResult:
    return search(ready(name), nets.batches(), flops=0.75)


def banks(folder: Path, size: int) -> Any:
    """Every file of a bank, from batches in a list and from a loader; the second was cut short and is gone on with."""
    traced, result = ready("cnn"), result_of("cnn")
    images = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    loader = datasets.load("digits").loader("train", 16, subset=range(50))
    found = {}
    for kind, batches in {"list": list(images.split(16)), "loader": loader}.items():
        path = folder / f"{kind}-{size}"
        if kind == "loader":
            interrupted(traced, result, batches, path)
        bank = build_bank(traced, result, batches, path, teachers=3, parallel=True)
        memory = build_bank(traced, result, batches, teachers=3, parallel=True)
        assert torch.equal(bank.logits(torch.arange(50)), memory.logits(torch.arange(50)))
        found[kind] = {file.name: file.read_bytes() for file in sorted(path.iterdir())}
    return found


def interrupted(traced: Any, result: SearchResult, batches: Any, path: Path) -> None:
    """A bank of two processes that was stopped after 32 samples, all of them at once."""

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.samples == 32:
            raise Stop

    from ekgfx.bank import build
    from ekgfx.distributed.team import team

    build.SAVE_EVERY = 0.0
    if team().first:
        try:
            build_bank(traced, result, batches, path, teachers=3, on_progress=stop)
        except Stop:
            assert list(path.glob("*.part"))
    team().all_gather_object("stopped")


def test_banks_are_the_same_bytes(tmp_path: Path) -> None:
    (expected,) = together(1, tmp_path, banks, tmp_path, 1)
    assert not isinstance(expected, str), expected
    for size in (2, 3, 5):  # more processes than batches
        for found in together(size, tmp_path, banks, tmp_path, size):
            assert found == expected


def test_teams_share_evenly() -> None:
    from ekgfx.distributed.team import Team

    parts = [Team(rank, 3).part(8) for rank in range(3)]
    assert [list(range(8))[part] for part in parts] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert replace(Team(), size=1).part(5) == slice(0, 5)


def the_pages_program(folder: Path) -> Any:
    """The program of docs/multi-gpu.md, as one of several processes that are connected already."""
    import os

    from tests.repository.test_docs import ROOT, blocks

    os.chdir(folder)
    (program,) = blocks(ROOT / "docs" / "multi-gpu.md", "python")
    names: dict[str, Any] = {}
    exec(program.replace("with joined() as mates:", "for mates in [team()]:").replace("joined", "team"), names)
    return names["pruned"].state_dict(), names["history"][0].loss


def test_the_pages_program_on_two_processes(tmp_path: Path) -> None:
    first, second = together(2, tmp_path, the_pages_program, tmp_path)
    assert not isinstance(first, str), first
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert (tmp_path / "pruned" / "model.safetensors").exists()
