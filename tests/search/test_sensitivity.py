"""What each group costs when it alone is cut: figures by hand, and the uniform search and the user's own steps as
oracles."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.errors import BudgetError, DataError, PlanError, RecipeError
from tests.search.nets import batches, cnn


class Sum(nn.Module):
    """10·x as 4x + 3x + 2x + x, a channel each."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.sum = nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False)
        self.parts.weight.data = torch.tensor([[2.0], [4.0], [1.0], [3.0]])
        self.sum.weight.data.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.parts(x))


class Votes(nn.Module):
    """Channel i of `deciding` finds class i, and what `idle` finds is not heard. Of nothing found, class 1 is said."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.deciding, self.heard, self.head = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.deciding.weight.data = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.heard.weight.data.zero_()
        self.head.weight.data = torch.eye(4)
        self.bias = nn.Parameter(torch.tensor([-0.5, 0.0, -0.5, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.heard(self.idle(x)) + self.head(self.deciding(x)) + self.bias


def votes() -> tuple[ekgfx.TracedModel, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    return ekgfx.trace(Votes(), torch.zeros(2, 4)), [(torch.eye(4), torch.arange(4))] * 2


def test_a_sum_by_hand():
    """Without one, two and three of its parts, smallest first, 9, 7 and 4 tenths of the sum are left."""
    images = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    found = ekgfx.sensitivity(ekgfx.trace(Sum(), images[:2]), [images], importance="magnitude")
    (group,) = found.groups
    assert (group.name, group.size, found.measure) == ("parts", 4, "error")
    assert [(cut.share, cut.kept, cut.macs) for cut in group.cuts] == [(0.75, 3, 6), (0.5, 2, 4), (0.25, 1, 2)]
    assert [cut.worth.error for cut in group.cuts] == pytest.approx([0.01, 0.09, 0.36])
    assert group.lost == pytest.approx((0.01 + 0.09 + 0.36) / 3)
    assert found.unpruned.error == 0


def test_what_decides_comes_first_and_what_nobody_hears_costs_nothing():
    traced, given = votes()
    found = ekgfx.sensitivity(traced, given, importance="magnitude")
    assert [group.name for group in found.groups] == ["deciding", "idle"]
    deciding, idle = found.groups
    assert found.unpruned.accuracy == 1.0
    # Classes 0, then 1, then 2 are not found any more; 1 is said all the same where nothing is.
    assert [cut.worth.accuracy for cut in deciding.cuts] == [0.75, 0.75, 0.5]
    assert [cut.worth.agreement for cut in deciding.cuts] == [0.75, 0.75, 0.5]
    assert deciding.lost == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    assert [cut.worth for cut in idle.cuts] == [found.unpruned] * 3
    assert idle.lost == 0.0


def test_without_labels_the_unpruned_network_is_agreed_with():
    traced, given = votes()
    found = ekgfx.sensitivity(traced, [images for images, _ in given], importance="magnitude")
    assert found.measure == "disagreement"
    assert [cut.worth.agreement for cut in found.groups[0].cuts] == [0.75, 0.75, 0.5]
    assert found.unpruned.accuracy is found.unpruned.loss is None


def test_other_images_are_judged_on():
    traced, given = votes()
    images, labels = given[0]
    found = ekgfx.sensitivity(traced, given, [(images[3:], labels[3:])], importance="magnitude")
    assert [cut.worth.accuracy for cut in found.groups[0].cuts] == [1.0, 1.0, 1.0]
    assert (found.images, found.judged) == (8, 1)


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_channels_are_those_of_a_uniform_search(importance):
    """Each group is cut as the uniform search cuts it, and the network computed without this module."""
    traced, given = cnn(), batches()
    plan = ekgfx.search(traced, given, strategy="uniform", importance=importance, flops=0.5).plan
    share = len(plan.kept["stem.0"]) / traced.groups["stem.0"].size
    found = {
        group.name: group for group in ekgfx.sensitivity(traced, given, importance=importance, shares=[share]).groups
    }
    assert found.keys() == traced.groups.keys()
    for name in ("stem.0", "block.inner.0", "fuse.0"):
        (cut,) = found[name].cuts
        alone = ekgfx.Plan({name: plan.kept[name][: cut.kept]}, rescale=True)
        assert cut.kept == len(plan.kept[name])
        network = traced.subnetwork(alone, batch_stats=True, rescale=True)
        with torch.no_grad():
            logits = [network(images) for images, _ in given]
        right = sum(int((answer.argmax(1) == labels).sum()) for answer, (_, labels) in zip(logits, given, strict=True))
        labels = torch.cat([labels for _, labels in given])
        assert cut.worth.accuracy == right / len(labels)
        assert cut.worth.loss == pytest.approx(float(F.cross_entropy(torch.cat(logits), labels)), abs=1e-5)
        assert (cut.macs, cut.params) == (traced.cost(alone).macs, traced.cost(alone).params)


class Twice(nn.Module):
    """Every hidden channel is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)
        self.up.weight.data[3:], self.up.bias.data[3:] = self.up.weight.data[:3], self.up.bias.data[:3]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_a_repair_gives_back_what_is_there_twice():
    torch.manual_seed(0)
    model, images = Twice().double(), torch.randn(64, 3, dtype=torch.float64)
    model.down.weight.data[:, 3:] += 10  # so that the second ones are those that stay
    traced = ekgfx.trace(model, images[:2])
    cut, repaired = (
        ekgfx.sensitivity(traced, [images[:32]], [images[32:]], importance="magnitude", shares=["50%"], repair=repair)
        for repair in (False, True)
    )
    assert cut.groups[0].cuts[0].worth.error > 1e-3
    assert repaired.groups[0].cuts[0].worth.error < 1e-9
    assert (cut.repaired, repaired.repaired) == (False, True)


def test_a_repaired_cut_is_what_the_steps_by_hand_give():
    traced, given = cnn(), batches(40)
    others = [name for name in traced.groups if name != "fuse.0"]
    found = ekgfx.sensitivity(traced, given, importance="magnitude", ignore=others, shares=[0.5], repair=True)
    (cut,) = found.groups[0].cuts
    kept = ekgfx.plan(traced, {"fuse.0": 0.5}).kept["fuse.0"]
    plan = ekgfx.Plan({"fuse.0": kept}, rescale=True)
    pruned = ekgfx.prune(traced.model, plan, traced)
    ekgfx.repair(pruned, traced, plan, given)
    with torch.no_grad():
        logits = torch.cat([pruned.eval()(images) for images, _ in given])
        before = torch.cat([traced.model(images) for images, _ in given])
    labels = torch.cat([labels for _, labels in given])
    assert cut.worth.accuracy == float((logits.argmax(1) == labels).double().mean())
    assert found.unpruned.accuracy == float((before.argmax(1) == labels).double().mean())
    assert cut.worth.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_the_model_stays_as_it_was_and_cuts_are_counted():
    traced, given, told = cnn(), batches(), []
    before = {name: value.clone() for name, value in traced.model.state_dict().items()}
    found = ekgfx.sensitivity(traced, given, on_cut=lambda done, total: told.append((done, total)))
    assert all(torch.equal(value, before[name]) for name, value in traced.model.state_dict().items())
    cuts = sum(cut.kept < group.size for group in found.groups for cut in group.cuts)
    assert told == [(done, cuts * len(given)) for done in range(1, cuts * len(given) + 1)]


def test_it_prints_as_a_table_and_is_plain_data():
    traced, given = votes()
    found = ekgfx.sensitivity(traced, given, importance="magnitude", shares=(0.25, "50%"))
    assert str(found).splitlines() == [
        "group     channels  50% kept  25% kept",
        "deciding         4    75.00%    50.00%",
        "idle             4   100.00%   100.00%",
    ]
    assert "<td>deciding</td>" in found._repr_html_()
    told = json.loads(json.dumps(found.to_json()))
    assert told["groups"][0]["cuts"][0]["worth"]["accuracy"] == 0.75


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"shares": (0.5, 1.5)}, RecipeError, "share 1.5: use fractions"),
        ({"shares": ()}, RecipeError, "no shares"),
        ({"importance": "tailor"}, RecipeError, "unknown importance 'tailor'"),
        ({"ignore": "nothing"}, PlanError, "nothing"),
        ({"ignore": "*"}, BudgetError, "ignore leaves nothing"),
        ({"test": []}, DataError, "test holds no batch"),
    ],
)
def test_what_cannot_be_is_refused(options, error, says):
    traced, given = votes()
    with pytest.raises(error, match=says) as caught:
        ekgfx.sensitivity(traced, given, **options)
    assert "\n" not in str(caught.value)
