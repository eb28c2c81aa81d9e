"""Classes that keep the arguments they are built from, as `huggingface_hub.PyTorchModelHubMixin` lets them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import EkgfxWarning


class Held(nn.Module):
    """Two layers, of which an argument says the width; building it reads a value, which the meta device has none of."""

    can_be_built = True

    def __init__(self, width: int = 12, rate_weights: str | None = None) -> None:
        super().__init__()
        if not self.can_be_built or rate_weights is not None:
            raise RuntimeError("no network at hand")
        self._hub_mixin_config = {"width": width, "rate_weights": rate_weights}
        self.rate = torch.linspace(0, 1, 3)[1].item()
        self.a, self.b = nn.Linear(5, width), nn.Linear(width, 3)

    @property
    def config(self) -> dict[str, Any]:
        return self._hub_mixin_config

    @classmethod
    def from_pretrained(cls, path: str) -> "Held":
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) * self.rate


def test_arguments_say_the_cut_and_name_no_weights() -> None:
    torch.manual_seed(0)
    model, x = Held().eval(), torch.randn(4, 5)
    model._hub_mixin_config["rate_weights"] = "a name of weights, which building is not to fetch"
    traced = ekgfx.trace(model, x)
    pruned: Any = ekgfx.prune(model, ekgfx.Plan({"a": (1, 2, 5, 7, 9, 10, 11)}), traced)
    assert pruned.config["width"] == 7 and model.config["width"] == 12
    again = Held(pruned.config["width"])
    again.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(again(x), pruned(x))
    assert not any(parameter.is_meta for parameter in Held().parameters()), "what was patched is put back"


def test_a_class_that_cannot_be_built_here_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Held().eval()
    monkeypatch.setattr(Held, "can_be_built", False)
    with pytest.warns(EkgfxWarning, match="no configuration of Held describes this cut: Held could not be built"):
        ekgfx.prune(model, ekgfx.Plan({"a": (1, 2)}), example_inputs=torch.randn(4, 5))
