"""The sweep over timm: every listed model is cut exactly, keeps its class, and can be used as before."""

from collections import Counter

import pytest

from benchmarks.common import Lines, listed
from benchmarks.parts import coverage_libraries, coverage_peers, coverage_round_trip, coverage_transformers
from benchmarks.parts.coverage_tables import summary
from benchmarks.parts.coverage_timm import measure
from tests.support import ROOT

# `num_features` is the old value of several widths there (SigLIP's pooling brings its own back), and another is taken.
WIDTHS_NOT_FOUND = {
    "tnt_s_legacy_patch16_224",
    "resnet50_clip",
    "vit_base_patch16_siglip_224",
    "vit_base_patch32_siglip_256",
    "naflexvit_base_patch16_siglip",
}
# Their forwards make float32 tensors.
IN_FLOAT32 = {"torchvision:raft_small", "monai:VQVAE"} | {
    f"diffusers:{name}"
    for name in ("AutoencoderTiny", "AutoencoderDC", "SanaTransformer2DModel", "WanTransformer3DModel")
}


@pytest.mark.sweep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", listed())
def test_a_model_of_every_signature_is_cut_exactly(name: str) -> None:
    row = measure(name)
    assert row["share"] >= 0.8 and not row["unknown"]
    if row["status"] == "analysed":  # too large to be cut
        return
    assert row["status"].startswith("ok"), row
    assert all(check["class_kept"] for check in row["checks"].values()), row["checks"]
    broken = any(check.get("interface") for check in row["checks"].values())
    assert broken == (name in WIDTHS_NOT_FOUND), row["checks"]


def test_the_page_shows_what_was_measured() -> None:
    raw = ROOT / "benchmarks" / "results" / "coverage.jsonl"
    rows = list(Lines(raw))
    assert len({row["model"] for row in rows}) == len(rows)
    assert {row["model"] for row in rows} <= set(listed())
    assert summary(rows).strip() in (ROOT / "docs" / "coverage.md").read_text()


def test_the_page_shows_what_was_measured_of_transformers() -> None:
    raw = ROOT / "benchmarks" / "results" / "coverage-transformers.jsonl"
    rows = list(Lines(raw))
    assert {row["model"] for row in rows} <= set(coverage_transformers.listed())
    page = (ROOT / "docs" / "coverage.md").read_text()
    assert coverage_transformers.table(rows).strip() in page
    assert f"The sweep knows {len(coverage_transformers.listed())} architectures" in page


def test_the_page_shows_what_was_measured_of_other_libraries() -> None:
    rows = list(Lines(ROOT / "benchmarks" / "results" / "coverage-libraries.jsonl"))
    page = (ROOT / "docs" / "coverage.md").read_text()
    libraries = {row["model"].partition(":")[0] for row in rows}
    assert libraries <= coverage_libraries.LIBRARIES.keys() and len({row["model"] for row in rows}) == len(rows)
    for library in libraries:
        some = [row for row in rows if row["model"].startswith(f"{library}:")]
        assert {row["model"] for row in some} <= {*coverage_libraries.LIBRARIES[library].names()}
        assert coverage_libraries.table(some).strip() in page, library


@pytest.mark.parametrize("package", coverage_peers.PEERS)
def test_the_page_shows_what_was_measured_of_other_tools(package: str) -> None:
    rows = list(Lines(ROOT / "benchmarks" / "results" / f"coverage-{package}.jsonl"))
    assert len({row["model"] for row in rows}) == len(rows)
    assert {row["model"] for row in rows} <= set(coverage_peers.names())
    assert coverage_peers.table(package, rows).strip() in (ROOT / "docs" / "coverage.md").read_text()


def test_the_readme_counts_other_tools_as_they_were_measured() -> None:
    counts = {}
    for package in coverage_peers.PEERS:
        rows = list(Lines(ROOT / "benchmarks" / "results" / f"coverage-{package}.jsonl"))
        assert {row["model"] for row in rows} == set(coverage_peers.names())
        counts[package] = Counter(row["status"] for row in rows)
    every = len(coverage_peers.names())
    right, wrong, undecided = (counts["torch-pruning"][status] for status in ("right", "wrong", "runs"))
    kirigami = counts["torch-kirigami"]
    assert not kirigami["wrong"] and not kirigami["runs"]
    said = (
        f"of {every}, by Torch-Pruning 1.6.1 {right} run and are right, {wrong} compute something else, {undecided} "
        f"are undecided, {every - right - wrong - undecided} do not run or are not cut; by torch-kirigami 0.2.1 "
        f"{kirigami['right']} are right, {every - kirigami['right']} fail or are not cut"
    )
    assert said in (ROOT / "README.md").read_text()


def test_the_page_shows_what_comes_back() -> None:
    rows = list(Lines(ROOT / "benchmarks" / "results" / "coverage-round-trip.jsonl"))
    assert {row["model"] for row in rows} == set(coverage_round_trip.names())
    assert coverage_round_trip.table(rows).strip() in (ROOT / "docs" / "coverage.md").read_text()


def test_the_readme_counts_other_libraries_as_they_were_measured() -> None:
    rows = list(Lines(ROOT / "benchmarks" / "results" / "coverage-libraries.jsonl"))
    cut = [row for row in rows if row["status"] == "ok"]
    bound = [coverage_libraries.SINGLE if r["model"] in IN_FLOAT32 else coverage_libraries.TOLERANCE for r in cut]
    exact = sum(max(row["masked"], row["batch"]) < most for row, most in zip(cut, bound, strict=True))
    training, size = (sum(row[column] == "" for row in cut) for column in ("training", "size"))
    exported = [row["onnx"] == "" for row in cut if row["onnx"] is not None]
    kept, fixed = sum(row["class"] for row in cut), sum(row["size"] == "fixed" for row in cut)
    said = (
        f"{exact} cut exactly ({len(IN_FLOAT32)} of them in float32, to 1e-4), {training} right in training, "
        f"{kept} with their class, {size} right at another size, "
        f"{fixed} others take none; {sum(exported)} of {len(exported)}"
    )
    page = (ROOT / "README.md").read_text()
    assert f"| {len(rows)} networks of" in page and said in page
