"""What the stages of a job ask of the data."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ekgfx.data.arrays import ArraySplit
from ekgfx.data.base import Batch, Views
from ekgfx.pipeline.job import Job, Silent
from ekgfx.pipeline.jobs import to_the_plan
from ekgfx.runs.directory import Run
from ekgfx.settings.recipe import Recipe

ASKED = {
    "model": "ekgfx.models:digits_cnn",
    "data": "digits",
    "search": {"flops": 0.8, "align": 4, "train_per_class": 4, "val_per_class": 4},
}


def test_validation_images_are_loaded_once(tmp_path: Path, monkeypatch) -> None:
    read, plain = Counter[int](), ArraySplit.batches

    def counted(self: ArraySplit, chunks: Sequence[Tensor], views: Views) -> Iterator[Batch]:
        for chunk in chunks:
            read.update(chunk.tolist())
            yield from plain(self, [chunk], views)

    with Run.create(tmp_path / "run", settings=Recipe.from_json(ASKED).to_json()) as run:
        job = Job.of(run, Silent())
        assert job.data is not None
        train, val = job.data.search_subset(4, 4, seed=job.recipe.seed)
        job.keep_score("before", job.built.model, None)  # reads the test images
        monkeypatch.setattr(ArraySplit, "batches", counted)
        to_the_plan(job)
    assert read == Counter([*train.tolist(), *val.tolist()])
