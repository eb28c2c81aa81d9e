"""What docs/performance.md says of a step of fine-tuning is what the raw results hold."""

import json

import pytest

from tests.support import ROOT

FOUND = json.loads((ROOT / "benchmarks/results/training_speed.json").read_text())
XEON = json.loads((ROOT / "benchmarks/results/training_speed_xeon.json").read_text())
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", FOUND["steps"], ids=lambda row: f"{row['network']}, {row['way']}")
def test_a_row_is_what_was_measured(row: dict) -> None:
    first = next(r for r in FOUND["steps"] if "any widths" in r["network"] and r["way"] == "channels last")
    cells = [row["network"], row["way"], f"{row['seconds']:.2f}", f"{first['seconds'] / row['seconds']:.2f}"]
    assert f"| {' | '.join(cells)} |" in PAGE


@pytest.mark.parametrize("kind", ["convolutions", "BatchNorm", "ReLU"])
def test_a_share_is_what_was_measured(kind: str) -> None:
    said = " ".join(PAGE.split())
    assert f"{FOUND['shares'][kind]:.0%} {kind}" in said or f"{FOUND['shares'][kind]:.0%} of it are {kind}" in said


@pytest.mark.parametrize("name", FOUND["formats"])
def test_a_network_of_timm_is_as_fast_as_was_measured(name: str) -> None:
    own, last, half = FOUND["formats"][name].values()
    assert f"| {name} | {own:.3f} | {own / last:.2f} | {own / half:.2f} |" in PAGE


@pytest.mark.parametrize("page", ["docs/performance.md", "docs/finetuning.md", "CHANGELOG.md"])
def test_the_gain_of_channels_last_is_what_was_measured(page: str) -> None:
    gains = [row["own format"] / row["channels last"] for name, row in FOUND["formats"].items() if "vit" not in name]
    assert f"{min(gains):.2f} to {max(gains):.2f} times" in " ".join((ROOT / page).read_text(encoding="utf-8").split())


def test_another_processor_was_as_slow_in_bf16_as_is_said() -> None:
    seconds = {row["way"]: row["seconds"] for row in XEON["steps"] if "any widths" in row["network"]}
    said = " ".join(PAGE.split())
    assert f"took {seconds['bf16'] / seconds['channels last']:.2f} times as long as in fp32" in said
    assert f"`torch.compile` alone brought {seconds['channels last'] / seconds['compiled']:.2f}×" in said


def test_batch_norms_are_as_exact_as_is_said() -> None:
    """Powers of ten, as the page and the module say them."""
    theirs, ours = FOUND["norms"]["PyTorch, channels last"].values(), FOUND["norms"]["ekgfx, channels last"].values()
    assert [f"{off:.0e}" for off in theirs] == ["7e-05", "1e-03"] and [f"{off:.0e}" for off in ours] == [
        "4e-07",
        "5e-05",
    ]
    assert "off by 7·10⁻⁵" in PAGE and "by 10⁻³" in PAGE and "off by 4·10⁻⁷ and 5·10⁻⁵" in PAGE
