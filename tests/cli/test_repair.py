"""The repair as a stage of a run: on by default, left out when asked, and done later where it was left out."""

import json

from ekgfx.runs.directory import read_manifest

RECIPE = """
model: ekgfx.models:digits_cnn
data: digits
pretrain: {epochs: 1, batch_size: 128}
search: {flops: 0.6, strategy: uniform, importance: magnitude}
repair: {images: 100}
"""


def test_a_run_without_repair_is_repaired_later_as_one_that_had_it(ekgfx, refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = ekgfx("prune", "--recipe", "recipe.yaml", "-o", "with")
    assert "after repair" in done.out and "KL divergence" in done.err
    told = json.loads((tmp_path / "with" / "repair.json").read_text())
    assert told["images"] == 100 and told["held_out"] == 20 and told["layers"] and told["seconds"] > 0
    ekgfx("report", "with")
    page = (tmp_path / "with" / "report.html").read_text()
    assert "<h2>Repair</h2>" in page and "after repair" in page and told["layers"][0]["name"] in page

    done = ekgfx("prune", "--recipe", "recipe.yaml", "--no-repair", "-o", "without")
    assert "after repair" not in done.out and not (tmp_path / "without" / "repair.json").exists()
    before = {file: file.read_bytes() for file in (tmp_path / "without").rglob("*") if file.is_file()}
    for option, says in {
        ("--data", "folder:nowhere"): "no such folder: 'nowhere'",
        ("--data", "digit"): "did you mean 'digits'?",
        ("--data", "cifar10:with"): "no cifar10 in",
        ("--device", "cuda:77"): "device 'cuda:77' cannot be used",
        ("--images", "-1"): "repair.images -1: use at least 1",
    }.items():
        assert says in refused("repair", "without", *option)
        assert {file: file.read_bytes() for file in (tmp_path / "without").rglob("*") if file.is_file()} == before
    done = ekgfx("repair", "without")
    assert "after repair" in done.out
    results = [read_manifest(tmp_path / name)["results"] for name in ("with", "without")]
    assert results[0] == results[1]

    ekgfx("finetune", "without", "--epochs", "1", "--knowledge", "none")
    assert "was fine-tuned, and a repair comes before that" in refused("repair", "without")
    assert "repair.images 0: use at least 1" in refused("repair", "with", "--images", "0")
