"""Several processes find bit for bit what one finds; real processes, connected by gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ekgfx.distributed import ALONE, Team, apart, team
from ekgfx.search import search
from tests.processes import ready, together
from tests.search.test_race import batches, sure, untimed


def test_work_is_shared_evenly_and_by_all_alike() -> None:
    assert Team(0, 2).owners([1, 5, 3, 1]) == [1, 0, 1, 1]
    assert Team(1, 3).owners([2, 2]) == [0, 1]
    assert Team().owners([3, 1]) == [0, 0]
    assert team() == ALONE


def telling() -> Any:
    mates = team()
    table = torch.zeros(2, 2, dtype=torch.float64)
    table[mates.rank] = 0.1 + mates.rank
    torch.manual_seed(mates.rank)
    model = nn.BatchNorm1d(3)
    model.weight.data.normal_()
    mates.same(model)
    with apart():
        alone = team()
    sent = mates.sent(torch.full((2,), float(mates.rank)), 1)
    told, heard = mates.told(mates.rank), mates.heard(mates.rank)
    return mates.gathered(table).tolist(), sent.tolist(), told, heard, alone, model.weight.tolist()


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    first, second = together(2, tmp_path, telling)
    assert first == second
    assert first[:5] == ([[0.1, 0.1], [1.1, 1.1]], [1.0, 1.0], 0, [0, 1], ALONE)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"early_stop": False},
    "early": {},
    "cacheless": {"cache": 0, "accept": 2},
    "magnitude": {"importance": "magnitude", "knowledge": "none"},
}


def searches(name: str) -> Any:
    """Plan and history of every case."""
    traced = sure(lambda: ready(name), torch.float32)
    data = batches(traced)
    found = {case: search(traced, data, flops=0.85, **options) for case, options in CASES.items()}
    return {case: (result.plan, untimed(result)) for case, result in found.items()}


SIZES = {"cnn": [2, 3], "vit": [3], "downsampling": [4]}
"""The last has three groups: there are more processes than candidates, and they share their batches."""


@pytest.mark.parametrize("name", SIZES)
def test_searches_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    """Plan and history, with what was left early."""
    check_sizes(name, SIZES[name], tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("name", SIZES)
def test_many_processes(name: str, tmp_path: Path) -> None:
    check_sizes(name, [5, 7, 20], tmp_path)


def check_sizes(name: str, sizes: list[int], folder: Path) -> None:
    (expected,) = together(1, folder, searches, name)
    assert expected["early"][1] != expected["plain"][1]
    for size in sizes:
        for found in together(size, folder, searches, name):
            assert found == expected
