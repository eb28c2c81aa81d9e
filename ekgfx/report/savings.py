"""What was cut, along the network, and what that brings in milliseconds."""

from xml.etree.ElementTree import Element

from ekgfx.base.units import human, percent, several
from ekgfx.export.tables import places, speedup_text
from ekgfx.report import charts
from ekgfx.report.facts import Facts
from ekgfx.report.markup import element
from ekgfx.report.parts import figure, section, share, table

FEW = 16
"""Groups of which the table stands open."""


def widths(facts: Facts) -> Element | None:
    """Channels of each group before and after."""
    shown = facts.widths
    if not shown:
        return None
    rows = [[name, str(before), str(after), share(after, before)] for name, before, after in shown]
    listed = table(["group", "channels before", "after", "kept"], rows)
    details = element("details", element("summary", f"All {len(rows)} groups"), listed)
    if len(rows) <= FEW:
        details.set("open", "open")
    uncut = sum(before == after for _, before, after in shown)
    said = f"One column for each group of coupled channels, from input to output; {uncut} of {len(shown)} kept all."
    if facts.dropped:
        said += f" Residual blocks that became identities: {', '.join(facts.dropped)}."
    chart = charts.columns("share of channels kept in each group, along the network", shown, "channels")
    return section("Widths", element("p", said), element("div", chart, class_="card wide"), details)


def layers(facts: Facts) -> Element | None:
    """MACs of each layer before and after."""
    shown = [(layer.name or "(the model itself)", layer.before, layer.after) for layer in facts.layers]
    if not shown:
        return None
    saved = sorted(shown, key=lambda layer: layer[2] - layer[1])
    total = sum(before - after for _, before, after in shown) or 1
    rows = [
        [name, human(before), human(after), share(after, before), f"{100 * (before - after) / total:.1f}%"]
        for name, before, after in saved
    ]
    listed = table(["layer", "MACs before", "after", "kept", "of all savings"], rows)
    details = element("details", element("summary", f"All {len(rows)} layers, the largest saving first"), listed)
    first = sum(before - after for _, before, after in saved[: max(1, len(saved) // 4)]) / total
    said = (
        "MACs of each layer, from input to output, and what is left of them. "
        f"A quarter of the layers brings {100 * first:.0f}% of the saving. What it is worth in time, the latency says."
    )
    chart = charts.columns("MACs of each layer, before and after", shown, "MACs", human)
    return section("Where the MACs went", element("p", said), element("div", chart, class_="card wide"), details)


def latency(facts: Facts) -> Element | None:
    """Measured latency of both networks, and the speed-up with its range."""
    measured = facts.latency
    if measured is None or not measured.timings:
        return None
    ratios = {(s.provider, s.precision, s.batch, s.network): s for s in measured.speedups}
    rows, cases = [], dict[str, list[tuple[str, float]]]()
    for timing in measured.timings:
        case = f"{timing.provider} {timing.precision}, batch {timing.batch}"
        cases.setdefault(case, []).append((timing.network, timing.median_ms))
        ratio = ratios.get((timing.provider, timing.precision, timing.batch, timing.network))
        figures = [f"{timing.median_ms:.3g} ms", f"{timing.p95_ms:.3g} ms", str(timing.runs), speedup_text(ratio)]
        rows.append([case, timing.network, *figures])
    chart = charts.bars("median latency", list(cases.items()), lambda value: f"{value:.3g} ms")
    listed = table(["where", "network", "median", "95th percentile", "runs", "speed-up (95% range)"], rows, texts=2)
    runtime, where = measured.environment.get("onnxruntime", ""), ", ".join(places(measured))
    said = f"ONNX Runtime {runtime} on {where}; both networks in turn, run by run."
    card = figure("Median", chart)
    card.set("class", "card lone")
    note = element("p", f"{measured.note}.", class_="note") if measured.note else None
    return section("Latency", element("p", said), note, card, listed)


def precisions(facts: Facts) -> Element | None:
    """Both networks in every precision: right answers, size and latency side by side."""
    found = facts.precisions
    if found is None:
        return None
    measured = facts.latency
    timings = {} if measured is None else {(t.network, t.batch): t for t in measured.timings}
    ratios = {} if measured is None else {(s.network, s.batch): s for s in measured.speedups}
    batches = sorted({batch for _, batch in timings})
    header = ["network", "precision", found.quality or "score", "file"]
    header += [text for batch in batches for text in (f"batch {batch}", "speed-up (95% range)")]
    rows = []
    for variant in found.variants:
        cells = [variant.network, variant.precision, percent(variant.score), f"{human(variant.bytes)}B"]
        for batch in batches:
            timing = timings.get((variant.name, batch))
            cells.append("–" if timing is None else f"{timing.median_ms:.3g} ms")
            cells.append(speedup_text(ratios.get((variant.name, batch))))
        rows.append(cells)
    judged = f", judged on {several(found.images, 'image')}" if found.images else ""
    said = f"The networks in every precision{judged}. Speed-ups are against the unpruned network in fp32."
    notes = [f"{network}: {quantized}." for network, quantized in found.int8.items()]
    notes += [f"{note[:1].upper()}{note[1:]}." for note in found.notes]
    return section(
        "Precisions",
        element("p", said),
        table(header, rows, texts=2),
        *(element("p", note, class_="note") for note in notes),
    )


def times(facts: Facts) -> Element | None:
    """Milliseconds of each layer before and after, what bounds it, and what aligned widths would give."""
    found = facts.breakdown
    if found is None or not found.layers:
        return None
    shown = [
        (layer.name or "(before the first layer)", round(1e3 * layer.ms_before), round(1e3 * layer.ms_after))
        for layer in found.layers
    ]
    total = sum(layer.ms_before - layer.ms_after for layer in found.layers)
    aligned = any(layer.ms_aligned is not None for layer in found.layers)
    rows = []
    for layer in sorted(found.layers, key=lambda layer: layer.ms_after - layer.ms_before):
        saved = layer.ms_before - layer.ms_after
        row = [
            layer.name or "(before the first layer)",
            layer.bound,
            share(layer.macs_after, layer.macs_before),
            f"{layer.ms_before:.3g} ms",
            f"{layer.ms_after:.3g} ms",
            share(layer.ms_after, layer.ms_before),
            f"{100 * saved / total:.1f}%" if total > 0 else "–",
        ]
        rows.append(row + ([f"{layer.ms_aligned:.3g} ms"] if layer.ms_aligned is not None else ["–"] * aligned))
    header = ["layer", "bound by", "MACs kept", "before", "after", "time kept", "of all time saved"]
    listed = table(header + [f"aligned to {found.tile}"] * aligned, rows, texts=2)
    summary = element("summary", f"All {len(rows)} layers, the largest saving of time first")
    said = (
        f"{found.summary[0].upper()}{found.summary[1:]}. A layer is compute-, memory- or launch-bound by the best "
        "rates that any layer of these two networks reaches here: launch-bound ones keep their time whatever is cut, "
        "memory-bound ones lose it with the activations and weights that they move, not with their MACs."
    )
    chart = charts.columns("time of each layer, before and after", shown, "µs", human)
    doubt = found.doubt(facts.latency.timings if facts.latency is not None else ())
    return section(
        "Where the time went",
        element("p", said),
        element("p", f"{doubt[:1].upper()}{doubt[1:]}.", class_="note") if doubt else None,
        element("div", chart, class_="card wide"),
        element("details", summary, listed),
    )
