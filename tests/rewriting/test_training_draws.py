"""Training that leaves layers out by chance, and puts one vector where a mask says: speech models do."""

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import EkgfxWarning
from tests.support.zeroed import distance, zeroed


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.masked = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:
            places = torch.zeros(x.shape[:2], dtype=torch.bool)
            places[:, 1:3] = True
            x[places] = self.masked
        for layer in self.layers:
            drawn = torch.rand([])
            if not (self.training and drawn < 0.1):
                x = x + layer(x).relu()
        return self.head(x)


def test_training_that_leaves_layers_out_is_traced_with_all_of_them() -> None:
    torch.manual_seed(0)
    model = Speech().double().eval()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with (
        pytest.warns(EkgfxWarning, match=r"every layer that is left out by chance .*`drawn = torch.rand\(\[\]\)`"),
        pytest.warns(EkgfxWarning, match="only training mode uses masked: cut where the rest of the model is"),
    ):
        traced = ekgfx.trace(model, x)
    assert [str(graph.way) for graph in traced.graphs] == ["evaluation mode", "training mode"]
    (group,) = (group for group in traced.groups.values() if group.size == 6)
    assert {"stem.weight", "masked", "head.weight"} <= {place.parameter for place in group.places}
    assert not traced.unknown_ops
    plan = ekgfx.Plan({group.name: (0, 2, 3)})
    pruned = ekgfx.prune(model, plan, traced, graphs="forbid")
    assert tuple(pruned.masked.shape) == (3,)
    for training in (False, True):
        assert distance(pruned, zeroed(traced, plan), (x,), training=training) < 1e-12
