"""The page: sections in the order in which a reader asks. How good is it, how was it found, what was cut, what did
training bring, is it faster, how do I get the same."""

import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from xml.etree.ElementTree import Element

import yaml

from ekgfx.base.units import change, human, percent
from ekgfx.pipeline.job import Score
from ekgfx.report.facts import Facts
from ekgfx.report.journey import knowledge, repair, search, training
from ekgfx.report.markup import document, element
from ekgfx.report.parts import section, share, table
from ekgfx.report.savings import latency, layers, precisions, times, widths
from ekgfx.report.tradeoff import tradeoff
from ekgfx.runs.directory import STAGES


def page(facts: Facts) -> str:
    """The whole page as text."""
    style = resources.files("ekgfx.report").joinpath("style.css").read_text(encoding="utf-8")
    sections = (
        _results,
        tradeoff,
        search,
        widths,
        layers,
        repair,
        training,
        knowledge,
        latency,
        precisions,
        times,
        _reproduce,
    )
    body = element("main", _head(facts), *(made(facts) for made in sections))
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
        shares = (share(score.macs, first.macs), share(score.params, first.params))
        rows.append([STAGES[stage], *told, human(score.macs), shares[0], human(score.params), shares[1]])
    last = _last(facts)
    said = f"MACs {change(first.macs, last.macs)}; parameters {change(first.params, last.params)}."
    if quality == "agreement":
        said += " Agreement: test images for which the network says what the unpruned one says; there are no labels."
    found = facts.manifest.get("notes")
    notes = (
        [element("p", note, class_="facts") for note in found if isinstance(note, str)]
        if isinstance(found, list)
        else []
    )
    return section("Result", element("p", said), table(header, rows), _replaced(facts), *notes)


def _replaced(facts: Facts) -> Element | None:
    """The modules that got another forward, and why."""
    told = facts.manifest.get("replaced")
    rows = [[str(each.get(key, "")) for key in ("module", "kind", "sizes", "reason")] for each in told or ()]
    if not rows:
        return None
    said = "Modules with another forward than their class's, which cannot express the cut:"
    return element(
        "div", element("p", said), table(["module", "class", "sizes of the inputs", "reason"], rows, texts=4)
    )


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
    return section(
        "Get the same",
        element(
            "pre", element("code", shlex.join(["pip", "install", *packages]) + "\n" + shlex.join(["ekgfx", *typed]))
        ),
        element(
            "div",
            element(
                "div", element("h3", "Environment"), table(["", ""], [[k, str(v)] for k, v in shown.items()], texts=2)
            ),
            element("div", element("h3", "Settings"), element("pre", element("code", settings), class_="tall")),
            class_="grid2",
        ),
        element("p", f"Weights: {facts.manifest.get('weights', 'not recorded')}.", class_="facts"),
    )


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


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
