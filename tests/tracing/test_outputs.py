"""Models that return more than one tensor, in whatever: searched, banked, trained and judged by the logits in it."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.errors import DataError, TraceError
from ekgfx.surgery.check import perturb
from ekgfx.surgery.masked import check_masked
from ekgfx.training.evaluation import evaluate
from ekgfx.training.outputs import finder, logits_of
from tests.tracing.test_containers import Cache, Named

Pair = namedtuple("Pair", "logits aux")


@dataclass
class Output:
    """As a library's output class: PyTorch does not know it."""

    logits: Tensor
    aux: Tensor | None = None
    classes: int = 5


FORMS: dict[str, Any] = {
    "dict": lambda main, aux: {"logits": main, "aux": aux},
    "segmentation": lambda main, aux: {"out": main, "aux": aux},
    "namedtuple": Pair,
    "dataclass": Output,
    "mapping": lambda main, aux: Named(aux=aux, logits=main),
    "list": lambda main, aux: [main, aux.argmax(1)],
    "tensor": lambda main, aux: main + 0 * aux,
    "tuple": lambda main, aux: (aux, main),
}


class Heads(nn.Module):
    """Two heads, whose answers are returned in the form asked for."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.stem, self.norm, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3)
        self.main, self.aux = nn.Linear(12, 5), nn.Linear(8, 5)
        perturb(self)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.stem(x)).relu()
        return FORMS[self.form](self.main(self.body(x).relu().mean((2, 3))), self.aux(x.mean((2, 3))))


IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5
LABELLED = [(IMAGES, LABELS, torch.arange(12))]


def everything(form: str, batches: list[Any], **options: Any) -> tuple[Any, ...]:
    """The plan, the bank's answers, the loss of an epoch, and the accuracy after it."""
    traced = ekgfx.trace(Heads(form), IMAGES)
    result = ekgfx.search(traced, batches, flops=0.7, step=0.5, **options)
    pruned = ekgfx.prune(traced.model, result.plan, traced)
    assert type(pruned) is Heads and type(pruned(IMAGES)) is type(traced.model(IMAGES))
    bank = ekgfx.build_bank(traced, result, batches, teachers=2, **options)
    (epoch,) = ekgfx.finetune(pruned, batches, bank=bank, views=1, epochs=1, lr=1e-3, **options)
    said = bank.logits(torch.arange(12))
    return result.plan.kept, said, epoch.loss, evaluate(pruned, LABELLED, **options).accuracy


@pytest.mark.parametrize("labelled", [True, False])
def test_all_forms_of_one_answer_are_one(labelled: bool) -> None:
    batches = LABELLED if labelled else [(IMAGES, None, torch.arange(12))]
    expected = everything("dict", batches, logits=lambda output: output["logits"])
    for form in ("dict", "segmentation", "namedtuple", "dataclass", "mapping", "list"):
        kept, said, loss, accuracy = everything(form, batches)
        assert (kept, accuracy) == (expected[0], expected[3])
        assert torch.equal(said, expected[1]) and loss == pytest.approx(expected[2])
    assert everything("tuple", batches, logits=1)[0] == expected[0]
    assert everything("tuple", batches, logits="0")[0] != expected[0]


def test_what_is_not_clear_is_asked_for() -> None:
    traced = ekgfx.trace(Heads("tuple"), IMAGES)
    with pytest.raises(DataError, match=r"a tuple of 0 12×5, 1 12×5; pass logits=0 \(a key, a field"):
        ekgfx.search(traced, LABELLED, flops=0.7)
    with pytest.raises(DataError, match="logits=7 is not in what the model returns, a tuple of 0 12×5, 1 12×5"):
        ekgfx.search(traced, LABELLED, flops=0.7, logits=7)
    with pytest.raises(DataError, match=r"returns \(12,\), not logits"):
        logits_of(torch.zeros(12))
    with pytest.raises(DataError, match="a dict of no tensor"):
        logits_of({"loss": 1.0})


def test_a_place_is_no_place_in_a_bare_tensor() -> None:
    """Networks with deep supervision return their logits alone in evaluation, and first of several in training."""
    x = torch.randn(3, 4)
    assert finder(0)(x) is x and finder(0)((x, x + 1)) is x
    assert finder("deep.1")({"deep": [x + 1, x]}) is x


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (
            torch.zeros(12, 1, dtype=torch.long),
            r"labels of shape \(12, 1\) \(torch.int64\) do not fit logits of shape \(12, 5",
        ),
        (F.one_hot(LABELS, 5), r"labels of shape \(12, 5\) \(torch.int64\) do not fit"),
        (LABELS > 2, r"labels of shape \(12,\) \(torch.bool\)"),
        (["cat"] * 12, "labels as numbers, not as a list"),
    ],
)
def test_labels_that_are_none_are_refused_in_a_line(labels: Any, says: str) -> None:
    traced = ekgfx.trace(Heads("dict"), IMAGES)
    with pytest.raises(DataError, match=says):
        ekgfx.search(traced, [(IMAGES, labels)], flops=0.7)


class Stream(nn.Module):
    """Returns its last hidden state besides the logits, in a dict or hidden in an object."""

    def __init__(self, cache: bool = False) -> None:
        super().__init__()
        self.cache, self.encoder, self.norm, self.head = cache, nn.Linear(5, 32), nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.norm(self.encoder(x))
        return {"logits": self.head(hidden), "past": Cache(hidden) if self.cache else hidden}


@pytest.mark.parametrize("cache", [False, True])
def test_outputs_that_do_not_matter_freeze_nothing(cache: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = Stream(cache).double().eval(), torch.randn(2, 6, 5, dtype=torch.float64)
    assert not ekgfx.trace(model, x).groups  # the hidden state is an output: all of it stays
    traced = ekgfx.trace(model, x, outputs="logits")
    assert list(traced.groups) == ["encoder"]
    plan = ekgfx.Plan({"encoder": tuple(range(0, 32, 3))})
    pruned = ekgfx.prune(model, plan, traced)
    assert type(pruned) is Stream
    found, wanted = pruned(x), traced.subnetwork(plan)(x)
    assert type(found["past"]) is type(wanted["past"]) is (Cache if cache else Tensor)
    state = found["past"].tensors[0] if cache else found["past"]
    assert state.shape == (2, 6, 11)
    hidden = model.encoder(x)[..., ::3]
    hidden = F.layer_norm(hidden, (11,), model.norm.weight[::3], model.norm.bias[::3])
    assert torch.allclose(found["logits"], F.linear(hidden, model.head.weight[:, ::3], model.head.bias), atol=1e-12)
    assert torch.allclose(state, hidden, atol=1e-12)
    ekgfx.save(pruned, tmp_path / "run")
    again = ekgfx.load(tmp_path / "run", model, x)  # the plan says which outputs matter
    assert torch.equal(again(x)["logits"], found["logits"])


def test_an_output_that_is_not_there_is_named() -> None:
    with pytest.raises(TraceError, match=r"outputs='logit' is not in what Stream returns: logits, past$"):
        ekgfx.trace(Stream(), torch.randn(2, 6, 5), outputs="logit")


class Body(nn.Module):
    """Cannot express that `mix` is cut alone, and returns and takes no plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, features: list[Tensor], scale: float = 2.0) -> Named:
        first, second = (layer(x).reshape(x.shape) * scale for layer, x in zip(self.mix, features, strict=True))
        return Named(hidden=first.relu() + second.relu(), order=first.sum(-1).argsort(1))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.body, self.head = nn.Linear(5, 12), nn.Linear(12, 12), Body(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x).relu()
        found = self.body([first, self.b(first).relu()])
        return self.head(found.hidden) + found.order[..., None]

    def my_method(self) -> int:
        return 1


def test_a_module_that_takes_a_list_and_returns_its_own_class_is_replaced_alone() -> None:
    torch.manual_seed(0)
    model = Listed().double().eval()
    perturb(model)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    kept = {name: tuple(range(i, group.size, 2)) for i, (name, group) in enumerate(traced.groups.items())}
    plan = ekgfx.Plan(kept)
    pruned = ekgfx.prune(model, plan, traced)
    assert type(pruned) is Listed and pruned.my_method() == 1 and type(pruned.body) is not Body
    assert check_masked(traced, plan, (x,)) < 1e-12
    for batch in (2, 5):
        inputs = torch.randn(batch, 6, 5, dtype=torch.float64)
        assert torch.allclose(pruned(inputs), traced.subnetwork(plan)(inputs), atol=1e-12)


def test_a_root_that_becomes_a_graph_returns_its_own_class_and_can_be_pruned_again() -> None:
    torch.manual_seed(0)

    class Root(Body):
        def forward(self, x: Tensor) -> Named:  # type: ignore[override]
            return Named(logits=self.mix[1](self.mix[0](x).reshape(x.shape).relu()), n=3)

    model, x = Root().double().eval(), torch.randn(2, 4, 12, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    plan = ekgfx.Plan({"mix.0": (0, 2, 5, 7)})
    pruned = ekgfx.prune(model, plan, traced)
    assert type(pruned(x)) is Named and pruned(x).n == 3
    again = ekgfx.trace(pruned, x)
    smaller = ekgfx.prune(pruned, ekgfx.Plan({"mix.0": (1, 3)}), again)
    hidden = F.linear(x, model.mix[0].weight[[2, 7]], model.mix[0].bias[[2, 7]]).relu()
    expected = F.linear(hidden, model.mix[1].weight[:, [2, 7]], model.mix[1].bias)
    assert type(smaller(x)) is Named and torch.allclose(smaller(x).logits, expected, atol=1e-12)
