"""Plans from the user's own ratios, and what plans, results and traced models look like."""

import pytest
import torch
from torch import nn

import ekgfx
from ekgfx.errors import PlanError, RecipeError


class Net(nn.Module):
    """Two stages, each with a convolution of its own and a residual of the stage before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.stage = nn.ModuleDict({name: nn.Conv2d(8, size, 3, padding=1) for name, size in (("a", 12), ("b", 20))})
        self.next = nn.ModuleDict({"a": nn.Conv2d(12, 8, 1), "b": nn.Conv2d(20, 8, 1)})
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for name in ("a", "b"):
            x = x + self.next[name](self.stage[name](x).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def traced() -> ekgfx.TracedModel:
    torch.manual_seed(0)
    return ekgfx.trace(Net().eval(), torch.zeros(2, 1, 6, 6))


def widths(traced: ekgfx.TracedModel, plan: ekgfx.Plan) -> dict[str, int]:
    return traced.groups.widths(plan)


def test_every_layer_gets_the_ratio_that_it_is_given(traced: ekgfx.TracedModel) -> None:
    """Fractions round up, as in a search; whole numbers are channels; the last pattern that means a group counts."""
    assert widths(traced, ekgfx.plan(traced, {"stage.a": 0.5})) == {"stem": 8, "stage.a": 6, "stage.b": 20}
    assert widths(traced, ekgfx.plan(traced, {"stage.*": "30%"})) == {"stem": 8, "stage.a": 4, "stage.b": 6}
    assert widths(traced, ekgfx.plan(traced, {"*": 0.5, "stage.b": 3})) == {"stem": 4, "stage.a": 6, "stage.b": 3}
    found = widths(traced, ekgfx.plan(traced, {"*": 0.5}, align=8, ignore=nn.Linear))
    assert found == {"stem": 8, "stage.a": 8, "stage.b": 16}


def test_the_channels_of_the_least_magnitude_go(traced: ekgfx.TracedModel) -> None:
    net = traced.model
    incoming = net.stage["b"].weight.abs().sum((1, 2, 3)) + net.stage["b"].bias.abs()
    outgoing = net.next["b"].weight.abs().sum((0, 2, 3))
    plan = ekgfx.plan(traced, {"stage.b": 7})
    assert set(plan.kept) == {"stage.b"}
    one, other = (set(scores.argsort(descending=True)[:7].tolist()) for scores in (incoming, incoming + outgoing))
    assert set(plan.kept["stage.b"]) in (one, other)
    pruned = ekgfx.prune(net, plan, traced)
    assert pruned.stage["b"].out_channels == 7 and pruned(torch.zeros(2, 1, 6, 6)).shape == (2, 3)
    assert ekgfx.plan(traced, {"*": 0.5}, importance="random", seed=1) != ekgfx.plan(
        traced, {"*": 0.5}, importance="random", seed=2
    )


def test_wrong_ratios_are_refused_in_a_line(traced: ekgfx.TracedModel) -> None:
    with pytest.raises(PlanError, match="'stage.c' is no layer whose channels can be pruned; did you mean"):
        ekgfx.plan(traced, {"stage.c": 0.5})
    for ratio in (0.0, 1.5, 21, 0, -1):
        with pytest.raises(RecipeError, match=r"of stage.b \(20 channels\): use the fraction to keep"):
            ekgfx.plan(traced, {"stage.b": ratio})
    with pytest.raises(RecipeError, match="ratios are a mapping of names to what is kept.*and no float"):
        ekgfx.plan(traced, 0.5)
    with pytest.raises(
        RecipeError, match=r"importance .* takes \(rows\), and is called with \(problem, plan, knowledge\)"
    ):
        ekgfx.plan(traced, {"*": 0.5}, importance=lambda rows: rows)
    with pytest.raises(RecipeError, match="'taylor': a plan from ratios takes magnitude"):
        ekgfx.plan(traced, {"*": 0.5}, importance="taylor")


def test_what_is_shown_fits_a_line_and_a_notebook(traced: ekgfx.TracedModel) -> None:
    cost = traced.cost()
    assert (
        repr(traced)
        == f"TracedModel(Net: 3 groups, {cost.macs / 1000:.1f} k MACs, {cost.params / 1000:.2f} k parameters)"
    )
    assert repr(traced.groups).startswith("Groups(3 groups, ")
    plan = ekgfx.plan(traced, {"*": 0.5})
    assert repr(plan) == "Plan(stem: 4, stage.a: 6, stage.b: 10 channels kept)"
    assert repr(ekgfx.Plan({str(i): (0,) for i in range(9)})).endswith("3: 1, … 5 more groups channels kept)")
    result = ekgfx.search(traced, flops=0.5, strategy="uniform", importance="magnitude")
    assert len(repr(result)) < 160 and "of the MACs kept in 1 step" in repr(result)
    assert result.widths["stage.b"] == (20, len(result.plan.kept["stage.b"]))
    assert repr(result.widths).splitlines()[2].split()[:2] == ["stage.b", "20"]
    for shown in (traced, traced.groups, result, result.widths):
        html = shown._repr_html_()
        assert "<td>stage.b</td>" in html and html.count("<table>") == html.count("</table>")
    figure = result.plot()
    assert figure.axes[0].get_xlabel() == "kept fraction of the MACs"
    import matplotlib.pyplot

    matplotlib.pyplot.close(figure)
