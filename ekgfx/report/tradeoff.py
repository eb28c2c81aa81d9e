"""The networks of several budgets side by side: what each keeps, and what it costs."""

from xml.etree.ElementTree import Element

from ekgfx.base.units import human, percent
from ekgfx.report import charts
from ekgfx.report.charts import Spot
from ekgfx.report.facts import Facts
from ekgfx.report.markup import element
from ekgfx.report.parts import figure, section, share, table


def tradeoff(facts: Facts) -> Element | None:
    """Accuracy over MACs and over milliseconds, with the knee marked."""
    found = facts.frontier
    if found is None:
        return None
    full, knee = found.networks[0], found.knee
    shown = [
        (network, f"{network.label} (knee)" if number == knee else network.label, number == knee)
        for number, network in enumerate(found.networks)
        if network.quality is not None
    ]
    by_macs = [Spot(name, n.macs / full.macs, n.quality or 0.0, n.interval, marked) for n, name, marked in shown]
    by_time = [
        Spot(name, n.milliseconds, n.quality or 0.0, n.interval, marked)
        for n, name, marked in shown
        if n.milliseconds is not None
    ]
    figures = []
    for over, axis, form, drawn in (
        ("MACs", "MACs kept", lambda value: f"{100 * value:.0f}%", by_macs),
        (found.target, "milliseconds", "{:.3g}".format, by_time),
    ):
        if drawn:
            chart = charts.spots(f"{found.measures} over {axis}", drawn, x=axis, form=percent, across_form=form)
            figures.append(figure(f"{found.measures.capitalize()} over {over}", chart))
    rows = []
    for network in found.networks:
        reach = f"{percent(network.interval[0])} – {percent(network.interval[1])}" if network.interval else "–"
        time = "–" if network.milliseconds is None else f"{network.milliseconds:.3g} ms"
        macs, params = (human(network.macs), share(network.macs, full.macs)), (human(network.params),)
        rows.append([network.label, percent(network.quality), reach, *macs, *params, time, "yes" * network.finetuned])
    said = "One search, a network for each budget."
    if shown:
        said += f" Bars are 95% intervals, from {found.samples} test images."
    if knee is not None:
        said += f" The curve bends at {found.networks[knee].label}: below it, every saving costs more."
    header = ["", found.measures, "95%", "MACs", "kept", "parameters", found.target, "fine-tuned"]
    return section("Every budget", element("p", said), element("div", *figures, class_="grid2"), table(header, rows))
