"""Data on real images: right labels and indices, randomness by seed, and errors that name the file."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ekgfx import data
from ekgfx.data.augment import flip_some, jitter_colours, shift_some
from ekgfx.data.base import by_class, generator, holdout, spread
from ekgfx.data.images import seeded
from ekgfx.data.sources import open_timm
from ekgfx.errors import DataError


@pytest.fixture(scope="module")
def cifar(data_dir: Path) -> data.Data:
    return data.load(f"cifar10:{data_dir / 'cifar10'}", classes=10)


@pytest.fixture
def photos_of(data_dir: Path, tmp_path: Path):
    """Copies some of the real ImageNet images to the given places below the test's folder."""
    images = sorted((data_dir / "imagenet-sample").glob("*.jpg"))

    def copy(*places: str) -> Path:
        for image, place in zip(images, places, strict=False):
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, tmp_path / place)
        return tmp_path

    return copy


def unaugmented(split_of: data.Data, split: str, index: list[int]) -> Tensor:
    (batch,) = split_of.loader(split, len(index), subset=index)
    return batch.images


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_shift_crops_every_sample_somewhere_in_its_reflected_border() -> None:
    images = torch.rand(16, 3, 6, 5)
    shifted = shift_some(images, 2, generator(1))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="reflect")
    places = []
    for sample in range(16):
        crops = {(y, x): padded[sample, :, y : y + 6, x : x + 5] for y in range(5) for x in range(5)}
        (place,) = [place for place, crop in crops.items() if torch.equal(crop, shifted[sample])]
        places.append(place)
    assert len(set(places)) > 5  # a place of its own for every sample


def test_flip_mirrors_about_half_of_the_samples() -> None:
    images = torch.rand(200, 1, 4, 4)
    flipped = flip_some(images, generator(1))
    mirrored = [torch.equal(flipped[i], images[i].flip(2)) for i in range(200)]
    assert all(mirrored[i] or torch.equal(flipped[i], images[i]) for i in range(200))
    assert 70 < sum(mirrored) < 130


def test_jitter_stays_within_its_strength_and_differs_between_samples() -> None:
    flat = torch.full((100, 3, 4, 4), 0.5)  # no contrast and no colour: only brightness can change it
    jittered = jitter_colours(flat, 0.2, generator(1))
    torch.testing.assert_close(jittered, jittered[:, :1, :1, :1].expand_as(jittered))
    levels = jittered[:, 0, 0, 0]
    assert levels.min() >= 0.4 and levels.max() <= 0.6 and levels.std() > 0.04


def test_jitter_scales_contrast_and_saturation() -> None:
    image = torch.tensor([[0.2, 0.6], [0.5, 0.5], [0.3, 0.3]])[None, :, None]  # 1×3×1×2: red differs between two pixels
    strengths = []
    for seed in range(50):
        jittered = jitter_colours(image, 0.2, generator(seed))[0, :, 0]
        brightness, contrast, saturation = (
            1 + 0.2 * (2 * torch.rand(3, 1, 1, 1, 1, generator=generator(seed)) - 1)
        ).flatten()
        mean = image[0, :, 0].mean(1, keepdim=True) * brightness
        expected = mean + contrast * (image[0, :, 0] * brightness - mean)
        grey = 0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2]
        torch.testing.assert_close(jittered, grey + saturation * (expected - grey))
        strengths.append((float(contrast), float(saturation)))
    assert len(set(strengths)) == 50


# --- loaders ----------------------------------------------------------------------------------------------------------


def test_cifar_is_the_published_one(cifar: data.Data, data_dir: Path) -> None:
    assert (cifar.size("train"), cifar.size("test"), cifar.classes, cifar.input_shape) == (
        50000,
        10000,
        10,
        (3, 32, 32),
    )
    assert cifar.labels("train").bincount().tolist() == [5000] * 10
    assert cifar.labels("test")[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]  # cat, ship, ship, airplane, frog …
    raw = np.load(data_dir / "cifar10" / "train-1.npz")["images"][7]  # image 12,507 of the training set
    shown = unaugmented(cifar, "train", [12507])[0]
    mean, std = torch.tensor(cifar.mean)[:, None, None], torch.tensor(cifar.std)[:, None, None]
    torch.testing.assert_close((shown * std + mean) * 255, torch.from_numpy(raw).movedim(2, 0).float())


def test_the_same_seed_and_epoch_give_the_same_batches(cifar: data.Data) -> None:
    def batches(seed: int, epoch: int) -> list[data.Batch]:
        loader = cifar.loader("test", 32, shuffle=True, augment=True, views=2, seed=seed, subset=range(100))
        loader.set_epoch(epoch)
        first, again = list(loader), list(loader)
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.index, other.index)
        return first

    base = batches(3, 1)
    assert [tuple(batch.images.shape) for batch in base] == [(2, 32, 3, 32, 32)] * 3 + [(2, 4, 3, 32, 32)]
    assert all(torch.equal(one.images, other.images) for one, other in zip(base, batches(3, 1), strict=True))
    for other in (batches(3, 2), batches(4, 1)):
        assert not torch.equal(base[0].index, other[0].index)
    assert not torch.equal(base[0].images[0], base[0].images[1])  # two views, not one twice


def test_a_batch_knows_its_labels_and_indices(cifar: data.Data) -> None:
    subset = [17, 3, 9999, 17, 42]
    loader = cifar.loader("test", 2, shuffle=True, subset=subset)
    batches = list(loader)
    index = torch.cat([batch.index for batch in batches])
    assert sorted(index.tolist()) == sorted(subset)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), cifar.labels("test")[index])
    assert torch.equal(torch.cat([batch.images for batch in batches]), unaugmented(cifar, "test", index.tolist()))


def test_a_short_last_batch_can_be_left_out(cifar: data.Data) -> None:
    def sizes(loader: data.Loader) -> list[int]:
        found = [len(batch.index) for batch in loader]
        assert len(loader) == len(found) and loader.samples == sum(found)
        return found

    assert sizes(cifar.loader("test", 4, subset=range(10))) == [4, 4, 2]
    assert sizes(cifar.loader("test", 4, subset=range(10), drop_last=True)) == [4, 4]
    assert sizes(cifar.loader("test", 4, subset=[])) == []


def test_images_are_resized_to_the_model(cifar: data.Data, data_dir: Path) -> None:
    large = data.load(f"cifar10:{data_dir / 'cifar10'}", image_size=64)
    assert large.input_shape == (3, 64, 64)
    images = unaugmented(large, "test", [0, 1])
    back = torch.nn.functional.avg_pool2d(images, 2)
    assert images.shape == (2, 3, 64, 64)
    assert (back - unaugmented(cifar, "test", [0, 1])).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "no split 'val': use train or test"),
        ({"batch_size": 0}, "batch size 0 and 1 views"),
        ({"subset": [0, 10000]}, "subset index 10000 is out of range: cifar10 has 10000 samples in 'test'"),
        ({"subset": [-1, 3]}, "subset index -1 is out of range"),
    ],
)
def test_a_loader_refuses_what_cannot_be(cifar: data.Data, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cifar.loader(**{"split": "test", "batch_size": 4} | options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_sees_the_same_batches(cifar: data.Data) -> None:
    options = {"shuffle": True, "augment": True, "views": 2, "subset": range(64)}
    (here,), (there,) = cifar.loader("test", 64, **options), cifar.to("cuda").loader("test", 64, **options)
    assert there.images.device.type == there.labels.device.type == "cuda" and there.index.device.type == "cpu"
    torch.testing.assert_close(there.images.cpu(), here.images, atol=1e-5, rtol=1e-5)


# --- subsets ----------------------------------------------------------------------------------------------------------


def test_search_subset_takes_so_many_of_each_class(cifar: data.Data) -> None:
    train, val = cifar.search_subset(256, 32, seed=5)
    labels = cifar.labels("train")
    assert labels[train].bincount().tolist() == [256] * 10 and labels[val].bincount().tolist() == [32] * 10
    assert len({*train.tolist(), *val.tolist()}) == 2880
    assert labels[val][:64].unique().numel() == 10  # shuffled: the first batch has every class
    again, other = cifar.search_subset(256, 32, seed=5), cifar.search_subset(256, 32, seed=6)
    assert torch.equal(train, again[0]) and torch.equal(val, again[1]) and not torch.equal(val, other[1])


def test_search_subset_divides_small_classes_in_proportion() -> None:
    digits = data.load("digits")
    train, val = digits.search_subset(256, 32)  # about 144 of each class
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(digits.size("train")))
    counts = digits.labels("train")[val].bincount(minlength=10)
    assert counts.min() >= 15 and counts.max() <= 17 and abs(len(val) - digits.size("train") / 9) <= 1


def test_spread_takes_an_even_share_of_classes_with_one_member() -> None:
    rest, chosen = spread(torch.arange(500), 0.2, generator(0))
    assert len(chosen) == 100 and set(chosen.diff().tolist()) == {5}
    assert sorted([*rest.tolist(), *chosen.tolist()]) == list(range(500))


def test_by_class_lists_every_index_under_its_label() -> None:
    labels = torch.tensor([4, 0, 4, 7, 0, 4])
    assert [sorted(members.tolist()) for members in by_class(labels, 6, generator(0))] == [[1, 4], [0, 2, 5], [3]]


def test_holdout_is_stratified_and_repeatable() -> None:
    labels = torch.arange(100) % 10
    train, test = holdout(labels, 100, 0.2)
    assert labels[test].bincount().tolist() == [2] * 10 and len(train) == 80
    assert torch.equal(test, holdout(labels, 100, 0.2)[1])
    assert set(test.diff().tolist()) != {test.diff()[0]}  # drawn, not every fifth
    with pytest.raises(DataError, match="1 samples are too few"):
        holdout(None, 1, 0.2)


# --- folders of images ------------------------------------------------------------------------------------------------


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
        ([], None, "no images in .*; use .jpg"),
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


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_cifar_binary_files_are_the_same_data(cifar: data.Data, data_dir: Path, tmp_path: Path) -> None:
    source = np.load(data_dir / "cifar10" / "test.npz")
    pixels = source["images"][:100].transpose(0, 3, 1, 2).reshape(100, -1)
    records = np.concatenate([source["labels"][:100, None], pixels], axis=1)
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    records[:50].tofile(inner / "test_batch.bin")
    for number in (1, 2):
        records[25 * number : 25 * number + 25].tofile(inner / f"data_batch_{number}.bin")
    binary = data.load(f"cifar10:{tmp_path}")
    assert (binary.size("train"), binary.size("test")) == (50, 50)
    assert torch.equal(unaugmented(binary, "train", [0, 49]), unaugmented(cifar, "test", [25, 74]))
    assert torch.equal(binary.labels("test"), cifar.labels("test")[:50])
    (inner / "test_batch.bin").write_bytes(records[:50].tobytes()[:-7])
    with pytest.raises(DataError, match=r"test_batch\.bin has 153643 bytes.*cut short"):
        data.load(f"cifar10:{tmp_path}")


def test_cifar100_binary_takes_the_fine_label(tmp_path: Path) -> None:
    records = np.zeros((4, 3074), dtype=np.uint8)
    records[:, 0], records[:, 1] = 9, [0, 99, 5, 7]
    for name in ("train.bin", "test.bin"):
        records.tofile(tmp_path / name)
    assert data.load(f"cifar100:{tmp_path}", classes=100).labels("train").tolist() == [0, 99, 5, 7]


def test_one_npz_set_is_divided_and_floats_are_kept(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((50, 6, 6))
    np.savez(tmp_path / "all.npz", images=images, labels=np.arange(50) % 5)
    loaded = data.load(f"npz:{tmp_path}", classes=5)
    assert (loaded.size("train"), loaded.size("test"), loaded.input_shape) == (40, 10, (1, 6, 6))
    assert loaded.labels("test").bincount().tolist() == [2] * 5
    shown = torch.cat([unaugmented(loaded, "train", list(range(40))), unaugmented(loaded, "test", list(range(10)))])
    pixels = (shown * 0.5 + 0.5).flatten().sort().values
    torch.testing.assert_close(pixels, torch.from_numpy(images).float().flatten().sort().values)


def test_digits_have_a_fixed_split_and_no_mirror_images() -> None:
    digits = data.load("digits", seed=9)
    assert (digits.size("train"), digits.size("test"), digits.classes, digits.input_shape) == (1438, 359, 10, (1, 8, 8))
    assert torch.equal(digits.labels("test"), data.load("digits", seed=1).labels("test"))
    assert digits.labels("test").bincount().min() >= 34
    (train,) = digits.loader("train", 2000)
    assert abs(float(train.images.mean())) < 0.01 and abs(float(train.images.std()) - 1) < 0.01
    assert not digits.split("train").augmentation.flip


def test_photos_are_label_free_crops_of_two_photographs() -> None:
    photos = data.load("photos", image_size=48)
    (batch,) = photos.loader("test", 64)
    assert photos.classes is None and batch.labels is None and batch.images.shape == (64, 3, 48, 48)
    assert torch.equal(batch.images, next(iter(data.load("photos", image_size=48).loader("test", 64))).images)
    assert len({tuple(image.flatten()[:50].tolist()) for image in batch.images}) == 64  # no crop twice
    assert batch.images.flatten(1).std(1).min() > 0.05  # and none empty
    train, val = photos.search_subset()
    assert len(train) == 256 and len(val) == 32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(4, int)}, "has no array 'images'"),
        ({"images": np.zeros((4, 8, 8, 3), np.int32)}, "images are int32"),
        ({"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.zeros(3, int)}, "labels are int64 .3,.; use one"),
        ({"images": np.array([{}], dtype=object)}, "cannot read .*allow_pickle=False"),
    ],
)
def test_unusable_arrays_are_explained(tmp_path: Path, arrays: dict, message: str) -> None:
    for name in ("train.npz", "test.npz"):
        np.savez(tmp_path / name, **arrays)
    with pytest.raises(DataError, match=message):
        data.load(f"npz:{tmp_path}")


def test_damaged_arrays_are_explained(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "test.npz").write_bytes((data_dir / "cifar10" / "test.npz").read_bytes()[:100_000])
    with pytest.raises(DataError, match=r"cannot read .*test\.npz"):
        data.load(f"cifar10:{tmp_path}")
    np.savez(tmp_path / "test.npz", images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.array([0, 1, 10, 11]))
    np.savez(tmp_path / "train.npz", images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.array([0, 1]))
    with pytest.raises(DataError, match="label 10 of image 2 is out of range 0…9 .2 such"):
        data.load(f"cifar10:{tmp_path}").size("test")


# --- specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar:x", "did you mean 'cifar10:x'?"),
        ("digit", "did you mean 'digits'?"),
        ("imagenet", "unknown data 'imagenet': use folder:DIR"),
        ("folder:/nowhere", "no such folder: '/nowhere'"),
        ("folder:", "no such folder: ''"),
        ("timm:", "names no data set"),
        ("timm:torch/nothing", "timm cannot open 'torch/nothing'"),
    ],
)
def test_unknown_data_is_explained(spec: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        data.load(spec)
    assert message in str(caught.value)


def test_a_folder_without_its_kind_is_recognized(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'folder:"):
        data.load(str(tmp_path))


def test_a_folder_without_cifar_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no cifar10 in .*test\*\.npz .*or the binary version's test_batch\.bin"):
        data.load(f"cifar10:{tmp_path}")


def test_data_for_another_model_is_refused(data_dir: Path) -> None:
    with pytest.raises(DataError, match="cifar10 has 10 classes, but the model has 1000 outputs"):
        data.load(f"cifar10:{data_dir / 'cifar10'}", classes=1000)
    with pytest.raises(DataError, match="digits have 1 channels, but the model is fed 3"):
        data.load("digits", mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves the archive open
def test_timm_opens_folders_torchvision_and_archives_alike(photos_of) -> None:
    root = photos_of(*(f"{name}/{i}.jpg" for name in "ab" for i in range(4)))
    with tarfile.open(root / "all.tar", "w") as archive:
        for name in "ab":
            archive.add(root / name, name)
    opened = {
        "files": open_timm("folder", str(root), "train"),
        "pairs": open_timm("torch/folder", str(root), "train"),
        "reader": open_timm("tar", str(root / "all.tar"), "train"),
    }
    assert {type(source).__name__ for source in opened.values()} == {"FileImages", "PairImages", "ReaderImages"}
    for source in opened.values():
        assert len(source) == 8 and source.labels().tolist() == [0] * 4 + [1] * 4
        image, label = source.read(5)
        assert label == 1 and np.array_equal(image, opened["files"].read(5)[0])
    whole = data.load(f"timm:torch/folder@{root}", image_size=32)
    (batch,) = whole.loader("train", 8)
    assert whole.classes == 2 and batch.labels.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(DataError, match="label 1 of image 4 is out of range 0…0 .4 such labels of 8"):
        next(iter(data.load(f"timm:torch/folder@{root}", image_size=32, classes=1).loader("train", 8)))
