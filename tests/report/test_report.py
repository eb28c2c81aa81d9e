"""The page of a run: figures derived by hand, nothing that a run says becomes markup, nothing is loaded or run."""

import json
import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from ekgfx.export import Breakdown, LayerTime

from ekgfx import report
from ekgfx.bank.rows import RowFormat
from ekgfx.base.files import checksum
from ekgfx.errors import EkgfxError, PlanError, RunError
from ekgfx.graph.plan import Plan
from ekgfx.report import Facts, charts, markup
from ekgfx.runs.directory import Run
from ekgfx.search import Measure, SearchResult, Step
from ekgfx.settings.recipe import Recipe, override

HOSTILE = """</title></style><script>alert(1)</script><img src=x onerror=alert(2)>" onload='alert(3)' \x00\ud800"""


def score(accuracy: float, macs: int) -> dict:
    return {"accuracy": accuracy, "loss": 0.5, "agreement": None, "macs": macs, "params": macs // 10}


def step(number: int, kept: float, group: str, removed: tuple[int, ...], reward: float | None) -> Step:
    measure = Measure(0.1 * number, reward, 0.9, int(1000 * kept), int(100 * kept))
    return Step(number, {group: removed}, {group: 0.5}, measure, kept)


@pytest.fixture
def run(tmp_path) -> Path:
    """Two groups: `first` loses 2 of its 4 channels, `second` 1 of 8."""
    steps = (step(1, 0.8, "first", (0, 3), -0.1), step(2, 0.5, "second", (7,), -0.3))
    base = Measure(0.05, -0.01, 1.0, 1000, 100)
    result = SearchResult(Plan(), {"first": 4, "second": 8}, base, steps, {})
    settings = override(Recipe(), {"model": "timm:some", "search.flops": 0.55, "description": "two groups"})
    path = tmp_path / "a run"
    results = {"before": score(0.9, 1000), "searched": score(0.5, 500), "finetuned": score(0.875, 500)}
    with Run.create(path, settings=settings.to_json(), results=results) as made:
        made.update(status="done", command=["/usr/bin/ekgfx", "prune", "timm:some", "-o", "a run"])
        for line in steps:
            made.append("history.jsonl", line.to_json())
        facts = {key: value for key, value in result.to_json().items() if key != "steps"}
        layers = [{"name": "conv", "before": 800, "after": 400}, {"name": "fc", "before": 200, "after": 100}]
        made.write_json("plan.json", {**json.loads(result.plan.to_json()), "search": facts, "layers": layers})
        for number in (1, 2):
            made.append(
                "finetune.jsonl", {"number": number, "loss": 1.0, "lr": 0.1, "seconds": 1.0, "test_accuracy": 0.8}
            )
    return path


def fill_bank(path: Path, said: list[list[int]]) -> None:
    """said: for each teacher the class it names for each sample."""
    row = RowFormat((3,))
    (path / "bank").mkdir()
    teachers = []
    for number, classes in enumerate(said):
        rows = np.zeros(len(classes), row.dtype)
        rows["sample"] = np.arange(len(classes))
        rows["values"][np.arange(len(classes)), classes] = 1
        file = path / "bank" / f"teacher-{number}.rows"
        rows.tofile(file)
        teachers.append({"step": number, "loss": 0.1, "infidelity": 0.0, "file": checksum(file)})
    manifest = {"format": 1, "shape": [3], "top_k": None, "temperature": 1.0, "teachers": teachers}
    (path / "bank" / "bank.json").write_text(json.dumps(manifest))


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_figures_of_a_run(run):
    fill_bank(run, [[0, 1, 2, 0], [0, 1, 2, 1], [0, 0, 0, 0]])
    facts = Facts.of(run)
    assert facts.widths == [("first", 4, 2), ("second", 8, 7)]
    assert facts.knowledge.agreement == [[1.0, 0.75, 0.5], [0.75, 1.0, 0.25], [0.5, 0.25, 1.0]]
    page = report.page(facts)
    texts = Page(page).texts
    for said in (
        "87.50%",
        "−2.50 points",
        "50.0% kept",
        "first: 4 → 2 channels (50.0% kept)",
        "budget 55.0%",
        "conv: 800 → 400 MACs (50.0% kept)",
        "80.0%",
    ):
        assert said in texts, said
    assert any("ekgfx prune timm:some -o 'a run'" in text for text in texts)
    assert any("MACs 1.00 k → 500 (50.0% kept, 50.0% removed)" in text for text in texts)
    assert page == report.page(Facts.of(run))


def test_nothing_a_run_says_becomes_markup(run):
    manifest = json.loads((run / "run.json").read_text())
    manifest["settings"] |= {"model": HOSTILE, "description": HOSTILE, "data": HOSTILE}
    manifest |= {"status": HOSTILE, "error": HOSTILE, "weights": "random " + HOSTILE, "command": ["x", HOSTILE]}
    manifest["versions"] = {HOSTILE: HOSTILE}
    plan = json.loads((run / "plan.json").read_text().replace('"second"', json.dumps(HOSTILE)))
    (run / "history.jsonl").write_text((run / "history.jsonl").read_text().replace('"second"', json.dumps(HOSTILE)))
    (run / "plan.json").write_text(json.dumps(plan))
    manifest["files"]["plan.json"]["now"] = checksum(run / "plan.json")
    (run / "run.json").write_text(json.dumps(manifest))

    page = Page(report.write(run).read_text(encoding="utf-8"))
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "section",
        "div",
        "span",
        "p",
        "h1",
        "h2",
    }
    allowed |= {
        "h3",
        "pre",
        "code",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "details",
        "summary",
        "figure",
        "figcaption",
    }
    allowed |= {"svg", "g", "rect", "path", "circle", "line", "text"}
    assert {tag for tag, _ in page.tags} <= allowed
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href", "style")}
    shown = [text for text in page.texts if "alert(1)" in text]
    assert len(shown) >= 6  # as text, and all of it
    assert all("<script>alert(1)</script>" in text for text in shown)


def test_layers_say_where_the_time_went(run):
    layers = (
        LayerTime("conv", 800, 400, 4.0, 2.5, 1.5, "compute"),
        LayerTime(HOSTILE.replace("\ud800", ""), 200, 100, 1.0, 1.0, 1.0, "launch"),
        LayerTime("", 0, 0, 1.0, 0.5, 0.5, "memory"),
    )
    with Run.reopen(run) as opened:
        opened.write_json("export.json", {"latency": None, "layers": Breakdown("cpu:fp32", 8, layers).to_json()})
    page = Page(report.write(run).read_text(encoding="utf-8"))
    assert "Where the time went" in page.texts
    (said,) = [text for text in page.texts if text.startswith("Layers on cpu:fp32")]
    assert "50% of the MACs and 33% of the time saved" in said
    assert "widths rounded up to 8 would take 0.75 of it" in said
    assert "conv: 4.00 k → 2.50 k µs (62.5% kept)" in page.texts
    # The largest saving of time comes first.
    assert [text for text in page.texts if text in ("compute", "launch", "memory")] == ["compute", "memory", "launch"]
    assert [text for text in page.texts if text in ("75.0%", "25.0%", "0.0%")] == ["75.0%", "25.0%", "0.0%"]
    assert "aligned to 8" in page.texts
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert any("<script>alert(1)</script>" in text for text in page.texts)

    with Run.reopen(run) as opened:
        opened.write_json("export.json", {"latency": None})  # of an export before layers were timed
    assert "Where the time went" not in Page(report.write(run).read_text(encoding="utf-8")).texts


def test_the_page_loads_nothing_and_runs_nothing(run):
    text = report.write(run).read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not [word for word in ("http://", "https://", "@import", "url(", "<script", "<link") if word in text]


def test_a_run_under_way_is_shown_as_far_as_it_is(tmp_path):
    with Run.create(tmp_path / "run", settings=Recipe(model="timm:some").to_json()) as run:
        run.append("history.jsonl", step(1, 0.9, "first", (0,), None).to_json())
        page = Page(report.page(Facts.of(run.path)))
    assert any("This run is not done (running)" in text for text in page.texts)
    assert "Search" in page.texts
    assert "Widths" not in page.texts


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("history.jsonl", '{"number": 1}\n'),
        ("history.jsonl", "[1]\n"),
        ("finetune.jsonl", '{"number": 1, "speed": 3}\n'),
        ("finetune.jsonl", "not JSON\n"),
        ("bank/bank.json", "{}"),
        ("bank/bank.json", '{"format": 99}'),
        ("run.json", '{"format": 1, "files": {}, "results": {"before": {"accuracy": "high"}}}'),
        ("run.json", '{"format": 1, "files": {}, "settings": {"modle": 3}}'),
    ],
)
def test_a_damaged_run_is_one_clear_error(run, file, content):
    (run / "bank").mkdir()
    (run / file).write_text(content)
    with pytest.raises(EkgfxError) as caught:
        report.write(run)
    assert "\n" not in str(caught.value)
    assert not (run / report.FILE).exists()


def test_a_changed_plan_is_refused(run):
    (run / "plan.json").write_text((run / "plan.json").read_text().replace("1", "2", 1))
    with pytest.raises((RunError, PlanError), match=r"plan\.json was changed"):
        report.write(run)


def test_lines_are_where_the_numbers_say():
    chart = charts.lines("", [charts.Line("a", [(0, 0.0), (1, 1.0), (2, math.nan), (4, 0.5)])], x="step")
    path = chart.find("path").get("d")
    points = [tuple(map(float, pair.split())) for pair in path.removeprefix("M").split("L")]
    (x0, y0), (x1, y1), (x2, y2) = points  # the point that is no number is left out
    assert (x0, x2) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert x1 == pytest.approx(x0 + (x2 - x0) / 4, abs=0.1)
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert y1 < y0  # up is more


def test_a_curve_has_its_points_and_intervals_where_the_numbers_say():
    spots = [charts.Spot("a", 1.0, 0.9, (0.8, 1.0)), charts.Spot("b", 0.5, 0.6, (0.4, 0.8), marked=True)]
    spots.append(charts.Spot("c", 0.75, 0.8))
    chart = charts.spots("", spots, x="kept", form="{:g}".format, across_form="{:g}".format)
    dots = [(float(dot.get("cx")), float(dot.get("cy")), dot.get("r")) for dot in chart.findall("circle")]
    (x0, y0, r0), (x1, y1, _), (x2, y2, r2) = dots  # from left to right
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert (y0 - y1) / (y1 - y2) == pytest.approx(2, abs=0.02)  # up is more
    assert (r0, r2) == ("5", "3")
    bars = [bar for bar in chart.findall("line") if bar.get("class") == "bar"]
    assert [float(bar.get("x1")) for bar in bars] == [x0, x2]
    for bar, middle in zip(bars, (y0, y2), strict=True):
        assert float(bar.get("y1")) + float(bar.get("y2")) == pytest.approx(2 * middle, abs=0.2)
    assert "b" in [text.text for text in chart.findall("text")]


def test_every_budget_is_drawn_and_the_knee_marked(run):
    """By hand: 0.85 at 60% lies above the line from 0.9 at 100% to 0.6 at 40%; the other does not."""
    networks = [
        ("unpruned", 1000, 0.9, 4.0),
        ("flops=0.8", 800, 0.8, 3.5),
        ("flops=0.6", 600, 0.85, 3.0),
        ("flops=0.4", 400, 0.6, None),
    ]
    rows = [
        {"label": label, "macs": macs, "params": 10, "quality": q, "interval": [q - 0.01, q + 0.01], "finetuned": False}
        | {"milliseconds": ms}
        for label, macs, q, ms in networks
    ]
    told = {"networks": rows, "measures": "accuracy", "samples": 50, "target": "cpu:fp32:batch=1", "knee": 2}
    with Run.reopen(run) as made:
        made.write_json("frontier.json", told)
    page = report.page(Facts.of(run))
    texts = Page(page).texts
    assert "flops=0.6 (knee)" in texts
    assert "flops=0.6 (knee): 85.00% at 60%" in texts
    assert "flops=0.6 (knee): 85.00% at 3" in texts
    assert "flops=0.4: 60.00% at 40%" in texts
    assert not any(text.startswith("flops=0.4: 60.00% at") and not text.endswith("%") for text in texts)
    assert any("The curve bends at flops=0.6" in text for text in texts)
    with Run.reopen(run) as made:
        made.write_json("frontier.json", {**told, "knee": "high"})
    with pytest.raises(RunError, match="knee"):
        Facts.of(run)


def test_columns_are_as_high_as_what_is_kept():
    def heights(column) -> list[float]:
        return [float(rect.get("height")) for rect in column.findall("rect")]

    (whole, kept), (other, _) = map(heights, charts.columns("", [("a", 8, 2), ("b", 4, 4)], "channels").findall("g"))
    assert kept == pytest.approx(whole / 4, abs=0.1)
    assert other == whole  # shares
    (whole, kept), (other, _) = map(heights, charts.columns("", [("a", 8, 2), ("b", 4, 4)], "", str).findall("g"))
    assert kept == pytest.approx(whole / 4, abs=0.1)
    assert other == pytest.approx(whole / 2, abs=0.1)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.31, 0.52, [0.35, 0.4, 0.45, 0.5]), (-3, 17, [0, 5, 10, 15]), (2, 2, [2])],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_elements_hold_text_where_it_was_put():
    made = markup.element("p", "a ", markup.element("b", "<b>"), " c", None, " d", class_="x", data_kind='"')
    assert ET.tostring(made, encoding="unicode") == '<p class="x" data-kind="&quot;">a <b>&lt;b&gt;</b> c d</p>'
