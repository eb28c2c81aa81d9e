"""The page: sections in the order in which a reader asks. How good is it, how was it found, what was cut, what did
training bring, is it faster, how do I get the same."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from xml.etree.ElementTree import Element

import yaml

from ekgfx.export.tables import speedup_text
from ekgfx.job import Score
from ekgfx.report import charts
from ekgfx.report.charts import Line
from ekgfx.report.facts import STAGES, Facts
from ekgfx.report.markup import Child, document, element
from ekgfx.units import change, duration, human, percent

FEW = 16
"""Groups of which the table stands open."""


def page(facts: Facts) -> str:
    """The whole page as text."""
    style = resources.files("ekgfx.report").joinpath("style.css").read_text(encoding="utf-8")
    sections = (_results, _search, _widths, _layers, _training, _knowledge, _latency, _reproduce)
    body = element("main", _head(facts), *(section(facts) for section in sections))
    return document(f"{facts.path.resolve().name} · ekgfx", style, body)


def _head(facts: Facts) -> Element:
    settings, results = facts.settings, facts.results
    status = str(facts.manifest.get("status", "unknown"))
    created = str(facts.manifest.get("created", ""))[:16].replace("T", " ")
    notes = []
    if facts.random:
        weights = f"Weights: {facts.manifest.get('weights')}."
        notes.append(f"{weights} Structure, cost and latency don't depend on them; accuracy does, so none is shown.")
    if status != "done":
        why = f": {facts.manifest['error']}" if facts.manifest.get("error") else ""
        notes.append(f"This run is not done ({status}{why}); what it has so far is shown.")
    return element(
        "header",
        element("p", "ekgfx report", class_="eyebrow"),
        element("h1", settings.model or facts.path.resolve().name),
        element("p", settings.description, class_="lead") if settings.description else None,
        element(
            "p",
            element("span", status, class_=f"chip {'good' if status == 'done' else 'warn'}"),
            f" run {facts.path.resolve().name} · {created} UTC · data {settings.data or 'photos (no labels)'} · "
            f"{facts.manifest.get('device', settings.device)} · seed {settings.seed}",
            class_="facts",
        ),
        element("div", *_tiles(facts), class_="tiles") if "before" in results else None,
        *(element("p", note, class_="note") for note in notes),
    )


def _tiles(facts: Facts) -> list[Element]:
    """The figures that matter most, before → after."""
    first, last = facts.results["before"], _last(facts)
    tiles = []
    quality = _quality(facts)
    if quality:
        was, now = getattr(first, quality), getattr(last, quality)
        points = f"{100 * (now - was):+.2f} points".replace("-", "−") if was is not None and now is not None else ""
        tiles.append(_tile(quality, percent(now), f"before {percent(was)}", points))
    for name, was, now in (("MACs", first.macs, last.macs), ("parameters", first.params, last.params)):
        tiles.append(_tile(name, human(now), f"before {human(was)}", f"{100 * now / was:.1f}% kept" if was else ""))
    speedups = () if facts.latency is None else facts.latency.speedups
    if speedups:
        best = max(speedups, key=lambda speedup: speedup.batch)
        where = f"{best.provider} {best.precision}, batch {best.batch}"
        value = "no difference" if best.ratio.verdict == "no difference" else f"{best.ratio.value:.2f}×"
        tiles.append(_tile("latency", value, where, f"95%: {best.ratio.low:.2f}–{best.ratio.high:.2f}"))
    return tiles


def _tile(name: str, value: str, before: str, change: str) -> Element:
    return element(
        "div",
        element("span", name, class_="name"),
        element("span", value, class_="big"),
        element("span", before),
        element("span", change, class_="change"),
        class_="tile",
    )


def _results(facts: Facts) -> Element | None:
    if "before" not in facts.results:
        return None
    quality, first = _quality(facts), facts.results["before"]
    names = [stage for stage in STAGES if stage in facts.results]
    header = ["", *([quality, "loss"] if quality else []), "MACs", "kept", "parameters", "kept"]
    rows = []
    for stage in names:
        score = facts.results[stage]
        loss = "–" if score.loss is None else f"{score.loss:.4f}"
        told = [percent(getattr(score, quality)), loss] if quality else []
        shares = (_share(score.macs, first.macs), _share(score.params, first.params))
        rows.append([STAGES[stage], *told, human(score.macs), shares[0], human(score.params), shares[1]])
    last = _last(facts)
    said = f"MACs {change(first.macs, last.macs)}; parameters {change(first.params, last.params)}."
    if quality == "agreement":
        said += " Agreement: test images for which the network says what the unpruned one says; there are no labels."
    return _section("Result", element("p", said), _table(header, rows))


def _search(facts: Facts) -> Element | None:
    if not facts.steps:
        return None
    asked, base = facts.settings.search, facts.search.baseline if facts.search else None
    steps = facts.steps
    kept = [(0.0, 1.0), *((float(step.number), step.kept_fraction) for step in steps)]
    unit, budget = _budget(facts)
    shown = [
        _figure(
            f"{unit} kept",
            charts.lines(
                f"{unit} kept after each step",
                [Line(f"{unit} kept", kept)],
                x="step",
                marks=[] if budget is None else [(f"budget {budget:.1%}", budget)],
                form=lambda value: f"{100 * value:.0f}%",
            ),
        )
    ]
    start = [] if base is None else [(0.0, base)]
    measured = [*start, *((float(step.number), step.measure) for step in steps)]
    losses = [(x, measure.loss) for x, measure in measured if measure.loss is not None]
    if losses:
        chart = charts.lines("loss after each step", [Line("loss", losses)], x="step", form="{:.3g}".format)
        shown.append(_figure("Loss on the search's images", chart))
    rewards = [(x, measure.reward) for x, measure in measured if measure.reward is not None]
    if rewards:
        others = [
            (float(step.number), candidate.measure.reward)
            for step in steps
            for candidate in step.candidates
            if candidate.measure.reward is not None
        ]
        chart = charts.lines("reward", [Line("reward", rewards, others)], x="step", form="{:.3g}".format)
        shown.append(_figure("Reward (faint: other candidates)", chart))
    count = sum(len(step.candidates) for step in steps)
    said = (
        f"{asked.strategy} search by {asked.importance} importance: {len(steps)} steps, {count} candidates weighed, "
        f"{duration(sum(step.seconds for step in steps))}."
    )
    if losses:
        said += f" The reward compares each candidate with {_TEACHERS[asked.knowledge]}."
    return _section("Search", element("p", said), element("div", *shown, class_="grid3"))


def _budget(facts: Facts) -> tuple[str, float | None]:
    """What the budget was on, and the fraction to keep."""
    asked = facts.settings.search
    told = facts.search.settings.get("budget") if facts.search else None
    if isinstance(told, Mapping) and isinstance(told.get("unit"), str) and type(told.get("keep")) is float:
        return told["unit"], told["keep"]
    return ("MACs", asked.flops) if asked.flops else ("parameters", asked.params)


_TEACHERS = {
    "ensemble": "the ensemble of the sub-networks met so far",
    "single": "the unpruned network",
    "none": "the labels alone",
}


def _widths(facts: Facts) -> Element | None:
    widths = facts.widths
    if not widths:
        return None
    rows = [[name, str(before), str(after), _share(after, before)] for name, before, after in widths]
    table = _table(["group", "channels before", "after", "kept"], rows)
    details = element("details", element("summary", f"All {len(rows)} groups"), table)
    if len(rows) <= FEW:
        details.set("open", "open")
    uncut = sum(before == after for _, before, after in widths)
    said = f"One column for each group of coupled channels, from input to output; {uncut} of {len(widths)} kept all."
    chart = charts.columns("share of channels kept in each group, along the network", widths, "channels")
    return _section("Widths", element("p", said), element("div", chart, class_="card wide"), details)


def _layers(facts: Facts) -> Element | None:
    layers = [(layer.name or "(the model itself)", layer.before, layer.after) for layer in facts.layers]
    if not layers:
        return None
    saved = sorted(layers, key=lambda layer: layer[2] - layer[1])
    total = sum(before - after for _, before, after in layers) or 1
    rows = [
        [name, human(before), human(after), _share(after, before), f"{100 * (before - after) / total:.1f}%"]
        for name, before, after in saved
    ]
    table = _table(["layer", "MACs before", "after", "kept", "of all savings"], rows)
    details = element("details", element("summary", f"All {len(rows)} layers, the largest saving first"), table)
    first = sum(before - after for _, before, after in saved[: max(1, len(saved) // 4)]) / total
    said = (
        "MACs of each layer, from input to output, and what is left of them. "
        f"A quarter of the layers brings {100 * first:.0f}% of the saving. What it is worth in time, the latency says."
    )
    chart = charts.columns("MACs of each layer, before and after", layers, "MACs", human)
    return _section("Where the MACs went", element("p", said), element("div", chart, class_="card wide"), details)


def _training(facts: Facts) -> Element | None:
    epochs = facts.epochs
    if not epochs:
        return None
    shown = []
    tested = [(float(epoch.number), epoch.test_accuracy) for epoch in epochs if epoch.test_accuracy is not None]
    if tested:
        marks = [
            (f"{STAGES[stage]} {percent(facts.results[stage].accuracy)}", facts.results[stage].accuracy)
            for stage in ("before", "searched")
            if stage in facts.results and facts.results[stage].accuracy is not None
        ]
        chart = charts.lines(
            "test accuracy after each epoch",
            [Line("test accuracy", tested)],
            x="epoch",
            marks=[(name, value) for name, value in marks if value is not None],
            form=lambda value: f"{100 * value:.4g}%",
        )
        shown.append(_figure("Test accuracy", chart))
    losses = [(float(epoch.number), epoch.loss) for epoch in epochs]
    chart = charts.lines(
        "training loss of each epoch", [Line("training loss", losses)], x="epoch", form="{:.3g}".format
    )
    shown.append(_figure("Training loss", chart))
    asked = facts.settings.finetune
    said = (
        f"{len(epochs)} epochs of {asked.optimizer}, batches of {asked.batch_size}, learning rate {asked.lr:g} "
        f"({asked.schedule}), {duration(sum(epoch.seconds for epoch in epochs))} of training."
    )
    return _section("Fine-tuning", element("p", said), element("div", *shown, class_="grid2"))


def _knowledge(facts: Facts) -> Element | None:
    known = facts.knowledge
    if known is None or not known.teachers:
        return None
    names = [_teacher(teacher) for teacher in known.teachers]
    rows = [
        [name, f"{teacher['loss']:.4f}", _lost(teacher["infidelity"])]
        for name, teacher in zip(names, known.teachers, strict=True)
    ]
    chart = charts.square("share of images on which two teachers agree", names, known.agreement)
    said = (
        "The memory bank: what interim sub-networks say about the training images guides the fine-tuning. The square "
        f"shows for how many of {known.samples} images, in percent, two teachers name the same class."
    )
    table = _table(["teacher", "loss when found", "lost in storage (KL)"], rows)
    parts = [_figure("Agreement of the teachers", chart)] if known.agreement else []
    return _section("Knowledge", element("p", said), element("div", *parts, element("div", table), class_="grid2"))


def _lost(infidelity: float | None) -> str:
    return "–" if infidelity is None else f"{infidelity:.1e}"


def _teacher(teacher: Mapping[str, object]) -> str:
    return "unpruned" if teacher["step"] == 0 else f"step {teacher['step']}"


def _latency(facts: Facts) -> Element | None:
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
    table = _table(["where", "network", "median", "95th percentile", "runs", "speed-up (95% range)"], rows, texts=2)
    facts_said = measured.environment
    places = [facts_said.get("gpu"), f"{facts_said.get('cpu', 'CPU')}, {facts_said.get('threads', '?')} threads"]
    said = (
        f"ONNX Runtime {facts_said.get('onnxruntime', '')} on {', '.join(filter(None, places))}; both networks "
        "in turn, run by run."
    )
    figure = _figure("Median", chart)
    figure.set("class", "card lone")
    note = element("p", f"{measured.note}.", class_="note") if measured.note else None
    return _section("Latency", element("p", said), note, figure, table)


def _reproduce(facts: Facts) -> Element:
    versions = facts.manifest.get("versions")
    versions = versions if isinstance(versions, Mapping) else {}
    command = facts.manifest.get("command")
    typed = list(map(str, command[1:])) if isinstance(command, Sequence) and not isinstance(command, str) else []
    packages = [f"{name}=={version}" for name, version in versions.items() if name not in ("python", "platform")]
    settings = yaml.safe_dump(_plain(facts.settings.to_json()), sort_keys=False, allow_unicode=True)
    shown: dict[str, object] = dict(versions)
    if facts.latency is not None:
        shown |= facts.latency.environment
    return _section(
        "Get the same",
        element(
            "pre", element("code", shlex.join(["pip", "install", *packages]) + "\n" + shlex.join(["ekgfx", *typed]))
        ),
        element(
            "div",
            element(
                "div", element("h3", "Environment"), _table(["", ""], [[k, str(v)] for k, v in shown.items()], texts=2)
            ),
            element("div", element("h3", "Settings"), element("pre", element("code", settings), class_="tall")),
            class_="grid2",
        ),
        element("p", f"Weights: {facts.manifest.get('weights', 'not recorded')}.", class_="facts"),
    )


def _section(title: str, *children: Child) -> Element:
    return element("section", element("h2", title), *children)


def _figure(title: str, chart: Element) -> Element:
    return element("figure", element("figcaption", title), chart, class_="card")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> Element:
    """texts: how many columns at the left are words; the others are figures."""
    place: Callable[[int], str | None] = lambda column: None if column < texts else "number"  # noqa: E731
    head = element("tr", *(element("th", name, class_=place(column)) for column, name in enumerate(header)))
    body = [element("tr", *(element("td", text, class_=place(n)) for n, text in enumerate(row))) for row in rows]
    parts = [element("thead", head)] if any(header) else []
    return element("div", element("table", *parts, element("tbody", *body)), class_="scroll")


def _quality(facts: Facts) -> str | None:
    """Which of a score's figures says how good the networks are."""
    return next(
        (
            name
            for name in ("accuracy", "agreement")
            for score in facts.results.values()
            if getattr(score, name) is not None
        ),
        None,
    )


def _last(facts: Facts) -> Score:
    return next(facts.results[stage] for stage in reversed(STAGES) if stage in facts.results)


def _share(now: float, before: float) -> str:
    return f"{100 * now / before:.1f}%" if before else "–"


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
