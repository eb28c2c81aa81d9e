"""Folders of images: labels by folders or names, views, and errors that name the file."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from ekgfx import data
from ekgfx.data.decoding import decode
from ekgfx.data.images import seeded
from ekgfx.data.sources import open_folder
from ekgfx.errors import DataError


def test_numbered_files_are_labelled_by_their_names(data_dir: Path) -> None:
    sample = data.load(f"folder:{data_dir / 'imagenet-sample'}", classes=1000, image_size=64)
    assert (sample.size("train"), sample.size("test"), sample.classes) == (400, 100, 1000)
    labels = torch.cat([sample.labels("train"), sample.labels("test")])
    assert labels.sort().values.tolist() == list(range(0, 1000, 2))
    (batch,) = sample.loader("test", 4, subset=[7, 0, 1, 2])
    assert batch.images.shape == (4, 3, 64, 64) and batch.index.tolist() == [7, 0, 1, 2]
    assert torch.equal(batch.labels, sample.labels("test")[batch.index])
    assert data.load(f"folder:{data_dir / 'imagenet-sample'}").classes == 999  # one more than the highest


def test_class_folders_and_sets(photos_of) -> None:
    places = [f"{split}/{name}/{i}.jpg" for split in ("train", "val") for name in ("b", "a10", "a2") for i in range(2)]
    folder = data.load(f"folder:{photos_of(*places)}", classes=3, image_size=32)
    assert (folder.size("train"), folder.size("test"), folder.classes) == (6, 6, 3)
    assert folder.labels("train").tolist() == [0, 0, 1, 1, 2, 2]  # a2, a10, b: in natural order


def test_folders_of_imagenet_ids_get_imagenets_numbers(photos_of) -> None:
    root = photos_of(*(f"{name}/{i}.jpg" for name in ("n03445777", "n01440764") for i in range(3)))
    assert sorted(set(data.load(f"folder:{root}", classes=1000).labels("train").tolist())) == [
        0,
        574,
    ]  # tench, golf ball
    assert sorted(set(data.load(f"folder:{root}").labels("train").tolist())) == [0, 1]


def test_files_without_numbers_have_no_labels(photos_of) -> None:
    folder = data.load(f"folder:{photos_of(*(f'{name}.jpg' for name in 'abcdefgh'))}", image_size=32, classes=1000)
    (batch,) = folder.loader("train", 8)
    assert folder.classes is None and folder.labels("train") is None and batch.labels is None


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_cut_short_is_named(photos_of, workers: int) -> None:
    root = photos_of(*(f"{i}_x.jpg" for i in range(10)))
    path = root / "3_x.jpg"
    path.write_bytes(path.read_bytes()[:5000])
    folder = data.load(f"folder:{root}", image_size=32)
    split = "train" if 3 in folder.labels("train") else "test"
    with pytest.raises(DataError, match=r"cannot read the image .*3_x\.jpg: .*truncated") as caught:
        list(folder.loader(split, 4, workers=workers))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_image_is_named(photos_of) -> None:
    root = photos_of(*(f"{i}_x.jpg" for i in range(8)))
    for path in root.glob("*.jpg"):
        path.write_text("not an image")
    with pytest.raises(DataError, match=r"cannot read the image .*_x\.jpg: cannot identify image file"):
        list(data.load(f"folder:{root}", image_size=32).loader("train", 4))


def test_augmented_views_of_files_belong_to_the_sample_not_to_the_batch(photos_of) -> None:
    folder = data.load(f"folder:{photos_of(*(f'{i}_x.jpg' for i in range(8)))}", image_size=32)
    options = {"augment": True, "views": 2, "seed": 7}
    before = torch.get_rng_state()
    (whole,) = folder.loader("train", 8, **options)
    parts = list(folder.loader("train", 2, workers=2, **options))
    assert torch.equal(whole.images, torch.cat([part.images for part in parts], dim=1))
    assert not torch.equal(whole.images[0], whole.images[1])
    assert torch.equal(torch.get_rng_state(), before)  # the user's random numbers are not touched
    other = folder.loader("train", 8, **options)
    other.set_epoch(1)
    assert not torch.equal(whole.images, next(iter(other)).images)


def test_seeding_puts_the_generators_back() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with seeded(5):
        torch.rand(3)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


@pytest.mark.parametrize(
    ("places", "classes", "message"),
    [
        ([], None, "no images in .*; use .bmp, .jpeg"),
        (["a/1.jpg", "b/1.jpg", "loose.jpg"], None, r"images of its own beside class folders, such as .*loose\.jpg"),
        (["1_a.jpg", "2_b.jpg", "c.jpg"], None, r"c\.jpg has no label"),
        ([f"{name}/{i}.jpg" for name in "ab" for i in range(5)], 10, "has 2 classes, but the model has 10 outputs"),
        ([f"{i}_x.jpg" for i in range(12)], 10, "has 12 classes, but the model has 10 outputs"),
        (["train/a/1.jpg", "val/b/1.jpg"], None, "class folder 'b' of .*val is none of the training set's"),
        (["train/a/1.jpg", "val/1.jpg"], None, "only one has labels"),
    ],
)
def test_unusable_folders_are_explained(photos_of, tmp_path: Path, places: list[str], classes, message: str) -> None:
    photos_of(*places)
    with pytest.raises(DataError, match=message):
        data.load(f"folder:{tmp_path}", classes=classes)


def test_a_model_of_one_channel_is_fed_in_grey(photos_of) -> None:
    """The grey of Pillow's mode L, whatever the files hold, normalized by the mean of what is known of the colours."""
    spec = f"folder:{photos_of(*(f'{name}/{i}.jpg' for name in 'ab' for i in range(5)))}"
    options = {"image_size": 32, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    (grey,), (colour,) = (data.load(spec, channels=c, **options).loader("train", 8) for c in (1, 3))
    assert grey.images.shape == (8, 1, 32, 32)
    luma = (colour.images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert (grey.images - luma).abs().max() < 3 / 255
    augmented = next(iter(data.load(spec, channels=1).loader("train", 4, augment=True, views=2)))
    assert augmented.images.shape == (2, 4, 1, 224, 224)
    assert data.load(spec, channels=1).mean == pytest.approx((0.449,), abs=1e-3)
    with pytest.raises(DataError, match="image files have 3 channels, or 1 if they are grey, but the model takes 4"):
        data.load(spec, channels=4)
    photos = data.load("photos", channels=1, image_size=32)
    assert next(iter(photos.loader("test", 2))).images.shape == (2, 1, 32, 32)
    with pytest.raises(DataError, match="the images of digits have 1 channel, but the model takes 3"):
        data.load("digits", channels=3)


def test_a_disk_or_a_home_is_refused_at_once(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(DataError, match="folder:/ is a whole disk; name the folder of images"):
        data.load("folder:/")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match="is a whole home"):
        data.load(f"folder:{tmp_path}")
    deep = tmp_path / "x" / "/".join("abcdefghijklmno")
    deep.mkdir(parents=True)
    with pytest.raises(DataError, match="has folders more than 12 deep, such as .*; name the folder"):
        data.load(f"folder:{tmp_path / 'x'}")


def test_parquet_is_read_through_timm(tmp_path: Path) -> None:
    """Files as Hugging Face's hub has them: images as bytes, labels with names, the columns described in the schema."""
    pytest.importorskip("datasets", reason="datasets, which timm reads Parquet with, is not installed")
    import io
    import json

    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    draw = np.random.default_rng(0)
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    described = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    (tmp_path / "set").mkdir()
    written = {}
    for split, count in (("train", 6), ("test", 4)):
        pixels = [draw.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(count)]
        labels, files = [number % 2 for number in range(count)], []
        for each in pixels:
            file = io.BytesIO()
            Image.fromarray(each).save(file, "PNG")
            files.append({"bytes": file.getvalue(), "path": None})
        kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        table = pyarrow.table({"image": pyarrow.array(files, kind), "label": pyarrow.array(labels, pyarrow.int64())})
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
        pyarrow.parquet.write_table(table, tmp_path / "set" / f"{split}-00000-of-00001.parquet")
        written[split] = pixels, labels
    spec = f"timm:hfds/{tmp_path / 'set'}@{tmp_path / 'cache'}"
    opened = data.load(spec, image_size=8, mean=[0.0], std=[1.0], channels=3)
    for split, (pixels, labels) in written.items():
        found = opened.labels(split)
        assert opened.size(split) == len(labels) and found is not None and found.tolist() == labels
        (batch,) = opened.loader(split, 8, subset=range(len(labels)))
        expected = torch.stack([torch.from_numpy(image).movedim(2, 0) / 255 for image in pixels])
        torch.testing.assert_close(batch.images, expected, atol=1e-5, rtol=0)


SIXTEEN = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
"""Grey values over all of 16 bits: each is one of 0 … 255, in both bytes."""


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey.png", Image.fromarray(SIXTEEN)),
        ("grey.tif", Image.fromarray(SIXTEEN)),
        ("big_endian.tif", Image.frombytes("I;16B", (16, 16), SIXTEEN.astype(">u2").tobytes())),
        ("grey.pgm", Image.fromarray(SIXTEEN)),
        ("eight.webp", Image.fromarray(np.stack([SIXTEEN >> 8] * 3, 2).astype(np.uint8))),
        ("palette.png", Image.fromarray((SIXTEEN >> 8).astype(np.uint8)).convert("P")),
        ("alpha.png", Image.fromarray((SIXTEEN >> 8).astype(np.uint8)).convert("LA")),
    ],
)
def test_every_depth_of_grey_is_the_same_grey(name: str, image: Image.Image, tmp_path: Path, recwarn) -> None:
    options = (
        {"lossless": True} if name.endswith("webp") else {"transparency": bytes(256)} if name == "palette.png" else {}
    )
    image.save(tmp_path / name, **options)
    read = np.asarray(decode(tmp_path / name, name))
    assert read.shape == (16, 16, 3) and (read == (SIXTEEN >> 8)[..., None]).all()
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_whose_white_is_unknown_are_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (4, 4), 1).save(tmp_path / "0.tif")
    with pytest.raises(DataError, match=r"cannot read the image 0\.tif: its pixels are .*; save it with 8 or 16 bits"):
        decode(tmp_path / "0.tif", "0.tif")


def test_what_a_system_leaves_behind_is_no_image_and_no_class(photos_of, tmp_path: Path, caplog) -> None:
    places = ["a/0.jpg", "a/1.JPG", "b/0.jpg", "b/.ipynb_checkpoints/0.jpg", ".cache/0.jpg", "__MACOSX/b/0.jpg"]
    photos_of(*places)
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "1.webp")
    for name in ("a/._0.jpg", "a/.DS_Store", "b/Thumbs.db", "b/x.heic", "b/README"):
        (tmp_path / name).write_bytes(b"\0")
    with caplog.at_level("INFO", "ekgfx"):
        folder = data.load(f"folder:{tmp_path}", image_size=8)
    assert folder.classes == 2 and folder.size("train") + folder.size("test") == 4
    assert list(folder.loader("train", 4)) and list(folder.loader("test", 4))
    (said,) = [record.getMessage() for record in caplog.records if record.name == "ekgfx"]
    assert said.startswith(f"{tmp_path}: 4 images; other files are left out: ")
    assert set(said.partition("out: ")[2].split(", ")) == {"1 hidden", "1 .db", "1 .heic", "1 without an ending"}


def test_the_order_of_classes_can_be_told(photos_of, tmp_path: Path, caplog) -> None:
    """torchvision's ImageFolder sorts names as text; where that differs, it is said, with what to do about it."""
    names = ("dog 10", "dog 2", "cat")
    photos_of(*(f"{split}/{name}/{number}.jpg" for split in ("train", "val") for name in names for number in range(2)))

    def of(name: str) -> set[int]:
        found, _ = open_folder(tmp_path, 3)
        files = zip(found["test"].files, found["test"].file_labels, strict=True)
        return {label for file, label in files if Path(file).parent.name == name}

    assert of("dog 10") == {2}
    (warning,) = caplog.messages
    assert (
        "class 1 is 'dog 2', in natural order" in warning and "torchvision's ImageFolder has 'dog 10' there" in warning
    )
    (tmp_path / "classes.txt").write_text("\n".join(ImageFolder(tmp_path / "train").classes), encoding="utf-8")
    assert [of(name) for name in ("cat", "dog 10", "dog 2")] == [{0}, {1}, {2}]
    assert len(caplog.messages) == 1
    (tmp_path / "classes.txt").write_text("cat\ndog 2\n")
    with pytest.raises(DataError, match=r"classes\.txt does not name the class folder 'dog 10': add it, or move"):
        of("cat")
    (tmp_path / "classes.txt").write_text("1 cat\n2 dog\n")  # some other tool's
    assert of("dog 10") == {2}


def test_a_folder_that_cannot_be_listed_is_named(photos_of, tmp_path: Path, monkeypatch) -> None:
    photos_of(*(f"{name}/{number}.jpg" for name in "ab" for number in range(3)))
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"cannot list .*b: Permission denied"):
        data.load(f"folder:{tmp_path}")
