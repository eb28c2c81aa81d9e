"""Folders as they are: tables of labels, other names of the sets, empty classes, an archive's own folder."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ekgfx.data import load
from ekgfx.data.tables import read_table
from ekgfx.errors import DataError
from tests.support.fuzzing import bounded, mutants, of_bytes, refused


@pytest.fixture
def image(tmp_path):
    """Writes an image whose grey value tells which one it is."""

    def write(place: str, value: int) -> None:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)

    return write


def labelled(opened, split: str) -> dict[int, int]:
    """Grey value → label."""
    plain = next(iter(opened.loader(split, 1000)))
    values = (plain.images[:, 0, 0, 0] * 255).round().int().tolist()
    return dict(zip(values, plain.labels.tolist(), strict=True))


def opened(folder: Path, classes: int | None = None):
    return load(f"folder:{folder}", image_size=8, mean=(0.0,), std=(1.0,), classes=classes)


@pytest.mark.parametrize(
    "header", ["file,label", "Filename;Class", "id\ttarget", "other,image,category", "\ufefffile,label"]
)
def test_labels_of_a_table(header, image, tmp_path) -> None:
    """Names of classes in natural order; columns, separators and endings as people have them."""
    between = next(mark for mark in ",;\t" if mark in header)
    lines = [header]
    for number in range(20):
        image(f"images/{number}.png", number)
        name = str(number) if "id" in header else f"{number}.png"
        cells = [name, f"class{10 if number % 2 else 9}"]
        lines.append(between.join(["x", *cells] if "other" in header else cells))
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = opened(tmp_path, 2)
    found = labelled(data, "train") | labelled(data, "test")
    assert found == {number: number % 2 for number in range(20)}


def test_a_column_of_splits_and_a_table_for_each(image, tmp_path) -> None:
    for number in range(12):
        image(f"a/images/{number}.png", number)
    rows = [f"images/{number}.png,{number % 3},{('train', 'val', 'test')[number // 4]}" for number in range(12)]
    (tmp_path / "a" / "labels.csv").write_text("\n".join(["path,label,split", *rows]))
    data = opened(tmp_path / "a", 3)
    assert labelled(data, "train") == {number: number % 3 for number in range(4)}
    assert labelled(data, "test") == {number: number % 3 for number in range(4, 8)}
    for split, numbers in (("train", range(6)), ("test", range(6, 9))):
        rows = [f"{number},{number % 3}" for number in numbers]
        (tmp_path / "a" / f"{split}.csv").write_text("\n".join(["id,label", *rows]))
    data = opened(tmp_path / "a", 3)
    assert labelled(data, "test") == {number: number % 3 for number in range(6, 9)}


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "Testing"), ("TRAIN", "Valid"), ("train", "dev")])
@pytest.mark.parametrize("within", ["", "archive/"])
def test_sets_in_any_usual_naming(names, within, image, tmp_path) -> None:
    for split, name in enumerate(names):
        for number in range(4):
            image(f"{within}{name}/{'ab'[number % 2]}/{number}.png", 10 * split + number)
    (tmp_path / "__MACOSX").mkdir()
    data = opened(tmp_path, 2)
    assert labelled(data, "train") == {0: 0, 1: 1, 2: 0, 3: 1}
    assert labelled(data, "test") == {10: 0, 11: 1, 12: 0, 13: 1}


def test_an_empty_class_keeps_its_number_and_is_named(image, tmp_path, caplog) -> None:
    for split in ("train", "val"):
        for number, name in enumerate("ac"):
            image(f"{split}/{name}/{number}.png", number)
        (tmp_path / split / "b").mkdir()
    assert labelled(opened(tmp_path, 3), "test") == {0: 0, 1: 2}
    assert [record.getMessage() for record in caplog.records if record.name == "ekgfx"] == [
        f"{tmp_path / 'train'}: no images of class b"
    ]
    assert labelled(opened(tmp_path, 2), "test") == {0: 0, 1: 1}  # the model knows of no such class


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks rows"),
        ("file,label\n", "lacks rows"),
        ("a,b\n1,2\n", "lacks a column of files: its first line names columns such as 'file,label' .a, b."),
        ("file,b\n1,2\n", "lacks a column of labels"),
        ("file,label\ngone.png,1\n", "line 2: no image 'gone.png' beside the table or in a folder there"),
        ("file,label\n0.png\n", "line 2: 1 values for 2 columns"),
    ],
)
def test_unusable_tables_are_explained(text, message, image, tmp_path) -> None:
    image("images/0.png", 0)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_malformed_tables_are_refused_in_one_line(image, tmp_path) -> None:
    for number in range(4):
        image(f"images/{number}.png", number)
    valid = b"file,label,split\n" + b"".join(b"%d.png,%d,train\n" % (number, number % 2) for number in range(4))
    table, found = tmp_path / "labels.csv", 0
    with bounded():
        for content in mutants(valid, 300, random.Random(3).randrange(100), of_bytes):
            table.write_bytes(content)
            found += refused(lambda: read_table(table))
    assert 0 < found < 300
