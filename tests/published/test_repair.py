"""What docs/repair.md says was measured is what the raw results hold."""

import json

import pytest

from benchmarks.parts.repair_questions import spearman
from tests.support import ROOT

LINES = [json.loads(line) for line in (ROOT / "benchmarks/results/repair.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line['network']}, {line['plan']}")
def test_a_row_is_what_was_measured(line: dict) -> None:
    digits = 1 if line["network"] == "resnet50" else 2  # of 250 images, and of 10,000
    before = next(other["before"] for other in LINES if other["network"] == line["network"] and "before" in other)
    shown = [f"{score['accuracy']:.{digits}%}" for score in (before, line["reestimated"], line["repaired"])]
    row = f"| {' | '.join(shown)} | {line['cpu_seconds']:.0f} |"
    assert row in (ROOT / "docs/repair.md").read_text(encoding="utf-8").replace("**", "")


def test_the_other_importance_is_what_was_measured() -> None:
    (line,) = lines("repair_per_sample")
    said = " ".join(page().split())
    assert f"{line['reestimated']['accuracy']:.1%} right after the cut" in said
    assert f"{line['repaired']['accuracy']:.1%} repaired, in {line['cpu_seconds']:.0f} CPU seconds" in said


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"benchmarks/results/{name}.jsonl").read_text().splitlines()]


def page() -> str:
    return (ROOT / "docs/repair.md").read_text(encoding="utf-8").replace("**", "")


@pytest.mark.parametrize(
    "line", lines("search_importance"), ids=lambda line: f"{line['network']}, {line['importance']}"
)
def test_an_importance_is_what_was_measured(line: dict) -> None:
    cut, repaired = line["cut"], line["repaired"]
    shown = f"{cut['accuracy']:.1%} | {repaired['accuracy']:.1%} | {repaired['loss']:.3f}"
    assert f"| {line['network']} | {line['seed']} | {line['importance']} | {shown} |" in page()


def test_what_activations_bring_is_what_was_measured() -> None:
    (line,) = lines("repair_activations")
    after = line["repaired"]
    shown = f"{after['accuracy']:.1%} (loss {after['loss']:.3f}) in {line['cpu_seconds']:.0f} CPU seconds"
    assert line["blind"] and shown in " ".join(page().split())


def test_the_cost_of_large_networks_is_what_was_measured() -> None:
    found = json.loads((ROOT / "benchmarks/results/repair_scale.json").read_text())["networks"]
    for name, row in found.items():
        assert f"| {name} | {row['operators']} | {row['cpu_seconds'] / 60:.1f} | {row['peak_gb']:.1f} |" in page()


QUESTIONS = lines("repair_questions")


def test_mirrored_images_are_what_was_measured() -> None:
    line, plain = lines("repair_mirrored")
    said = " ".join(page().split())
    assert f"KL {line['kl'][1]:.3f} instead of {plain['kl'][1]:.3f}" in said
    assert line["repaired"]["accuracy"] == plain["repaired"]["accuracy"]
    took = [f"{each['cpu_seconds']:.0f}" for each in (line, plain)]
    assert f"{line['repaired']['accuracy']:.1%} both, in {took[0]} CPU seconds instead of {took[1]}" in said


ASKED = {question: [line for line in QUESTIONS if line["question"] == question] for question in ("finetune", "polish")}


@pytest.mark.parametrize(
    "line", [line for line in ASKED["finetune"] if line["repaired"]], ids=lambda line: line["network"]
)
def test_fine_tuning_is_what_was_measured(line: dict) -> None:
    same = ("network", "seed", "epochs")
    (other,) = (
        each for each in ASKED["finetune"] if not each["repaired"] and all(each[key] == line[key] for key in same)
    )
    shown = f"{other['accuracy']:.1%} | {line['accuracy']:.1%} | {other['loss']:.3f} | {line['loss']:.3f}"
    assert f"| {line['network']} | {line['seed']} | {line['epochs']} | {shown} |" in page()


@pytest.mark.parametrize("line", ASKED["polish"], ids=lambda line: f"{line['way']}, {line['seed']}")
def test_a_polish_is_what_was_measured(line: dict) -> None:
    scores = line["after_repair"], line["after_training"]
    shown = " | ".join(f"{score['accuracy']:.1%}, {score['loss']:.3f}" for score in scores)
    assert f"| {line['way']} | {line['seed']} | {line['search_seconds']:.0f} | {line['kl']:.3f} | {shown} |" in page()


def test_what_tells_the_potential_is_what_was_measured() -> None:
    found = [line for line in QUESTIONS if line["question"] == "potential"]
    for before in ("reestimated", "repaired"):
        for what in ("loss", "kl"):
            cells = [spearman(found, before, what, after) for after in ("reestimated", "repaired")]
            shown = " | ".join(f"{rank:.2f} ({low:.2f} … {high:.2f})" for rank, low, high in cells)
            name = {"reestimated": "averages corrected", "repaired": "repaired"}[before]
            assert f"| {name}, {what.upper() if what == 'kl' else what} | {shown} |" in page()
