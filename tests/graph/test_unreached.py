"""Positions that the example does not reach stay: a longer one reads them."""

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from tests.support.zeroed import distance, zeroed


class Sentence(nn.Module):
    """Adds as many rows of a table as there are tokens. made: the table is computed, by a layer, from another one.
    parts: it is split rather than sliced."""

    def __init__(self, made: bool, parts: bool) -> None:
        super().__init__()
        self.parts = parts
        self.embed, self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 10), nn.Linear(10, 3)
        self.position = nn.Parameter(torch.randn(1, 12, 6 if made else 8))
        self.table = nn.Linear(6, 8) if made else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens = self.table(self.position), x.shape[1]
        rows = rows.split([tokens, 12 - tokens], 1)[0] if self.parts else rows[:, :tokens]
        x = self.embed(x) + rows
        return self.down(self.up(x).relu())


@pytest.mark.parametrize(("made", "parts"), [(False, False), (True, False), (False, True), (True, True)])
def test_rows_of_a_table_that_a_longer_sentence_reads_stay(made: bool, parts: bool) -> None:
    torch.manual_seed(0)
    model = Sentence(made, parts).double().eval()
    traced = ekgfx.trace(model, torch.randn(2, 4, 5, dtype=torch.float64))
    assert {group.size for group in traced.groups.values()} - {6} == {8, 10}
    plan = ekgfx.Plan({name: tuple(range(1, group.size, 2)) for name, group in traced.groups.items()})
    pruned = ekgfx.prune(model, plan, traced)
    assert pruned.position.shape[1] == 12
    for tokens in (4, 7, 12):
        x = torch.randn(3, tokens, 5, dtype=torch.float64)
        assert distance(pruned, zeroed(traced, plan), (x,)) < 1e-12


def test_parts_between_numbers_are_free_though_one_of_them_ends_in_the_output() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 9), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.stem(x)
            return y[:, :3], self.head(y[:, 3:])

    traced = ekgfx.trace(Parts().eval(), torch.randn(2, 5))
    assert [group.size for group in traced.groups.values()] == [6]
