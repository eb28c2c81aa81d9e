"""What a search found, for people: a line, a table of widths, a picture."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ekgfx.base.markup import html_table
from ekgfx.base.units import human, percent, several

if TYPE_CHECKING:
    from ekgfx.search.result import SearchResult


class Widths(Mapping[str, tuple[int, int]]):
    """Channels before and after, per group, in the order of the network. Prints as a table, in notebooks too."""

    def __init__(self, widths: Mapping[str, tuple[int, int]]) -> None:
        self._widths = dict(widths)

    def __getitem__(self, group: str) -> tuple[int, int]:
        return self._widths[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def __repr__(self) -> str:
        longest = max(map(len, self), default=0)
        return "\n".join(
            f"{name:{longest}}  {before:5} → {after:5}  {after / before:4.0%}" for name, (before, after) in self.items()
        )

    def _repr_html_(self) -> str:
        rows = [(name, before, after, f"{after / before:.0%}") for name, (before, after) in self.items()]
        return html_table(("group", "channels", "kept", ""), rows)


def line_of(result: "SearchResult") -> str:
    """A result in one line."""
    unit, final = _unit(result), result.final
    facts = [f"{result.kept_fraction:.1%} of the {unit} kept in {several(len(result.steps), 'step')}"]
    facts.append(f"{human(final.macs)} MACs, {human(final.params)} parameters")
    if final.accuracy is not None:
        facts.append(f"accuracy {percent(final.accuracy)} on the search's images, untrained")
    strategy = result.settings.get("strategy", "search")
    return f"SearchResult({strategy}: {'; '.join(facts)})"


def html_of(result: "SearchResult") -> str:
    """A result as a table: the unpruned network beside the one that was found."""
    rows = [
        (name, human(m.macs), human(m.params), "–" if m.loss is None else f"{m.loss:.4f}", percent(m.accuracy))
        for name, m in (("unpruned", result.baseline), ("found", result.final))
    ]
    columns = ("", "MACs", "parameters", "loss", "accuracy")
    return html_table(columns, rows, caption=line_of(result)) + result.widths._repr_html_()


def plot(result: "SearchResult", axes: Any = None) -> Any:
    """Draws the search's way: the loss over the kept fraction, step by step; and the widths along the network."""
    if axes is None:
        from matplotlib import pyplot

        _, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    way, widths = axes
    kept = [1.0, *(step.kept_fraction for step in result.steps)]
    measures = [result.baseline, *(step.measure for step in result.steps)]
    if any(measure.loss is not None for measure in measures):
        way.plot(kept, [float("nan") if m.loss is None else m.loss for m in measures], marker=".")
        way.set_ylabel("loss on the search's images, untrained")
    else:
        way.plot(kept, [m.params for m in measures], marker=".")
        way.set_ylabel("parameters")
    way.set_xlabel(f"kept fraction of the {_unit(result)}")
    way.invert_xaxis()
    names = list(result.widths)
    widths.bar(range(len(names)), [result.widths[name][0] for name in names], color="0.85", label="unpruned")
    widths.bar(range(len(names)), [result.widths[name][1] for name in names], label="kept")
    widths.set_xlabel("groups, in the order of the network")
    widths.set_ylabel("channels")
    if len(names) <= 30:
        widths.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    widths.legend()
    return way.figure


def _unit(result: "SearchResult") -> str:
    budget = result.settings.get("budget")
    return str(budget.get("unit", "cost")) if isinstance(budget, Mapping) else "cost"
