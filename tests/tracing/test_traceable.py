"""What holds no Python to trace, or no weights to cut, is refused at once by a line that says what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import TraceError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, and still what people have
IMAGES = torch.ones(2, 3, 6, 6)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return network()


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return network()


def with_a_script() -> nn.Module:
    model = network()
    model[1] = torch.jit.script(nn.Sequential(nn.ReLU()))
    return model


CASES: dict[Callable[[], Any], str] = {
    lambda: "network": "trace takes a torch.nn.Module, not a str",
    lambda: torch.jit.script(network()): "TorchScript holds no Python to trace: pass the torch.nn",
    lambda: torch.export.export(network(), (IMAGES,)): "pass the torch.nn.Module that it was exported from",
    lambda: torch.export.export(network(), (IMAGES,)).module(): "pass the torch.nn.Module that it was exported from",
    lambda: nn.Sequential(nn.LazyConv2d(8, 3)): "0.weight has no shape before the first call: call the model once",
    on_meta: "0.weight is on the meta device, where no values are: build the model on another",
    made_in_inference_mode: "0.weight was made under torch.inference_mode(), and can neither be traced nor trained",
    lambda: nn.Sequential(
        torch.jit.script(network())
    ): "0 is TorchScript with weights, for which nothing else can stand",
    with_a_script: "put the Python module that Sequential was made of in its place, or run it as",
}


@pytest.mark.parametrize(("build", "line"), CASES.items(), ids=range(len(CASES)))
def test_a_line_says_what_to_pass(build: Callable[[], Any], line: str) -> None:
    with pytest.raises(TraceError) as raised:
        ekgfx.trace(build(), IMAGES)
    assert line in str(raised.value)


def test_a_part_is_spelled_as_python_reads_and_sets_it() -> None:
    model = nn.ModuleDict({"a b": nn.Sequential(network(), torch.jit.script(nn.Sequential(nn.ReLU())))})["a b"]
    with pytest.raises(TraceError) as raised:
        ekgfx.trace(model, IMAGES)
    first, second = str(raised.value).partition("type ")[2].split(", and, with a plan of that, ")
    known = {"ekgfx": ekgfx, "torch": torch, "model": model, "plan": ekgfx.Plan({"0": range(5)})}
    exec(first, known)
    exec(second, known)
    assert model[0][0].out_channels == 5


def test_a_script_as_leaf_runs_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(network(), torch.jit.script(nn.Sequential(nn.ReLU())), nn.Conv2d(4, 2, 1)).eval()
    traced = ekgfx.trace(model, IMAGES, leaf=["1"])
    assert {name: group.size for name, group in traced.groups.items()} == {"0.0": 8}
    pruned = ekgfx.prune(model, ekgfx.Plan({"0.0": range(5)}), traced)
    with torch.no_grad():
        model[0][0].weight[5:], model[0][0].bias[5:] = 0, 0
        assert torch.allclose(pruned(IMAGES), model(IMAGES), atol=1e-6)


class Graph:
    """A batch as libraries for graphs have it, of which PyTorch knows nothing."""

    def __init__(self, nodes: Tensor) -> None:
        self.nodes = nodes


class OnGraphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, graph: Graph) -> Tensor:
        return self.layers(graph.nodes)


class OnTensors(nn.Module):
    """What the message asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, nodes: Tensor) -> Tensor:
        return self.model(Graph(nodes))


def test_an_object_of_tensors_is_made_inside_the_traced_module() -> None:
    model, nodes = OnGraphs().eval(), torch.ones(3, 4)
    with pytest.raises(TraceError, match="trace a module around it whose forward takes tensors and makes the Graph"):
        ekgfx.trace(model, (Graph(nodes),))
    around = OnTensors(model).eval()
    pruned = ekgfx.prune(around, ekgfx.Plan({"model.layers.0": range(5)}), ekgfx.trace(around, nodes))
    assert pruned.model(Graph(nodes)).shape == (3, 2)


def test_what_is_cut_in_inference_mode_can_be_trained() -> None:
    model = network()
    traced = ekgfx.trace(model, IMAGES)
    with torch.inference_mode():
        pruned = ekgfx.prune(model, ekgfx.Plan({"0": range(5)}), traced)
    pruned.train()(IMAGES).sum().backward()
    assert pruned[0].weight.grad is not None


class Packed(nn.Module):
    """Sequences of several lengths, packed outside of what runs them, or inside."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 6, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.rnn(packed)[1][-1]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encoder, self.hidden, self.head = (
            nn.Linear(4, 8),
            self.Encoder(),
            nn.Linear(6, 9),
            nn.Linear(9, 2),
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.hidden(self.encoder(self.first(x), lengths)).relu())


def test_packed_sequences_run_in_a_leaf_as_the_message_says() -> None:
    torch.manual_seed(0)
    model, given = Packed().double().eval(), (torch.randn(3, 5, 4).double(), torch.tensor([5, 2, 4]))
    with pytest.raises(TraceError, match="move this GRU and the packing of its sequences into a sub-module, and name"):
        ekgfx.trace(model, given)
    traced = ekgfx.trace(model, given, leaf=["encoder"])
    pruned = ekgfx.prune(model, ekgfx.Plan({"hidden": range(5)}), traced)
    with torch.no_grad():
        model.head.weight[:, 5:] = 0
        # sums of five products and of nine, of which four are zero, may be taken in another order
        assert torch.allclose(pruned(*given), model(*given), rtol=1e-12, atol=1e-12)
