"""How images become the model's input: who says so, what the user may say instead, and that nothing is cut unasked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ekgfx.cli import cli
from ekgfx.data import load
from ekgfx.errors import DataError, RecipeError
from ekgfx.models.source import Source, parse
from ekgfx.pipeline import job
from ekgfx.settings.preprocessing import Preprocessing
from ekgfx.settings.recipe import Recipe


@pytest.fixture
def files(tmp_path) -> Path:
    """Twenty 32×32 colour images of two classes."""
    draw = np.random.default_rng(0)
    for number in range(20):
        place = tmp_path / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(place / f"{number:02}.png")
    return tmp_path / "images"


def first(opened, split: str = "test") -> tuple[torch.Tensor, np.ndarray]:
    """The first image as the loader gives it, and the file's own pixels on [0, 1]."""
    shown = next(iter(opened.loader(split, 1))).images[0]
    file = opened.split(split).source.files[0]
    return shown, np.asarray(Image.open(file), dtype=np.float32) / 255


def test_files_that_have_the_size_are_taken_whole(files) -> None:
    """Pixel for pixel; a share that somebody asks for, and files of another size, are cropped as before."""
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    shown, own = first(load(f"folder:{files}", image_size=32, **plain))
    assert torch.equal(shown, torch.from_numpy(own).movedim(2, 0))
    cropped, _ = first(load(f"folder:{files}", image_size=32, crop_pct=0.875, **plain))
    assert cropped.shape == shown.shape and not torch.allclose(cropped, shown, atol=0.05)
    assert load(f"folder:{files}", image_size=24).resized == "the middle 87.5% of files, bicubic"
    assert load(f"folder:{files}", image_size=32).resized == "files as they are"


def test_grey_images_for_models_of_one_channel(files) -> None:
    """The grey value of Pillow, normalized by the mean of the colours' means."""
    opened = load(f"folder:{files}", image_size=32, channels=1, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    assert opened.input_shape == (1, 32, 32)
    shown = next(iter(opened.loader("test", 1))).images[0]
    grey = np.asarray(Image.open(opened.split("test").source.files[0]).convert("L"), dtype=np.float32) / 255
    torch.testing.assert_close(shown[0], (torch.from_numpy(grey) - 0.2) / 0.5)
    augmented = next(iter(opened.loader("train", 4, augment=True, views=2))).images
    assert augmented.shape == (2, 4, 1, 32, 32)
    with pytest.raises(DataError, match="image files have 3 channels, or 1 if they are grey, but the model takes 4"):
        load(f"folder:{files}", channels=4)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {},
            "images: 160×160 (the model), the middle 95.0% of files, bilinear (the model); 3 channels; "
            "mean 0.5 0.5 0.5 (the model), std 0.5 0.5 0.5 (the model)",
        ),
        (
            {"img_size": 32, "mean": (0.4,)},
            "images: 32×32 (--img-size), files as they are; 3 channels; mean 0.4 0.4 0.4 (--mean), "
            "std 0.5 0.5 0.5 (the model)",
        ),
        (
            {"img_size": 32, "in_chans": 1, "crop_pct": 0.5, "mean": (0.4,), "std": (0.2,)},
            "images: 32×32 (--img-size), the middle 50.0% of files, bilinear (--crop-pct); 1 channel; "
            "mean 0.4 (--mean), std 0.2 (--std)",
        ),
    ],
)
def test_one_line_says_what_is_done_and_who_says_so(options, line, files) -> None:
    built = parse("timm:test_resnet", "none", classes=2, preprocessing=Preprocessing(**options)).build()
    opened = job.open_data(f"folder:{files}", built, 0)
    assert job.preprocessing_of(opened, built) == line
    assert built.model(next(iter(opened.loader("test", 2))).images).shape == (2, 2)


def test_torchvision_says_what_its_images_are(files) -> None:
    """Its factories take any keyword, and its published weights come with their transforms."""
    built = parse("torchvision.models:squeezenet1_1", classes=2).build()
    assert built.example_inputs[0].shape == (1, 3, 224, 224)
    assert built.data_options["crop_pct"] == 224 / 256 and built.data_options["interpolation"] == "bilinear"
    small = parse("torchvision.models:squeezenet1_1", classes=2, preprocessing=Preprocessing(img_size=64)).build()
    assert small.example_inputs[0].shape == (1, 3, 64, 64) and small.model(small.example_inputs[0]).shape == (1, 2)


def test_arguments_of_the_model(tmp_path) -> None:
    built = parse("timm:test_vit", "none", model_kwargs={"depth": 1}, preprocessing=Preprocessing(img_size=64)).build()
    assert len(built.model.blocks) == 1 and built.example_inputs[0].shape == (1, 3, 64, 64)
    asked = parse("timm:test_vit", "none", model_kwargs={"depth": 1}, preprocessing=Preprocessing(mean=(0.5,)))
    assert Source.from_description(json.loads(json.dumps(asked.describe()))) == asked


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"img_size": 0}, "img_size 0: use at least 1"),
        ({"crop_pct": 1.5}, r"crop_pct 1.5: a share in \(0, 1\]"),
        ({"std": [0.5, 0.0]}, "std .*: each is above 0"),
        ({"mean": []}, "need a number for each channel"),
        ({"interpolation": "cubic"}, "interpolation 'cubic': use nearest, "),
    ],
)
def test_what_cannot_be_is_refused(asked, message) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json({"preprocessing": asked})


def test_the_command_line_says_it_before_the_work(files, tmp_path) -> None:
    flags = ["--weights", "none", "--classes", "2", "--data", f"folder:{files}", "--img-size", "32", "--in-chans", "1"]
    done = CliRunner().invoke(
        cli, ["eval", "timm:test_resnet", *flags, "--mean", "0.5", "--model-kwargs", "drop_rate=0.1"]
    )
    assert done.exit_code == 0, done.stderr
    assert "note: images: 32×32 (--img-size), files as they are; 1 channel; mean 0.5 (--mean)" in done.stderr
    search = ["--flops", "0.7", "--search", "uniform", "--importance", "magnitude", "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(cli, ["prune", "timm:test_resnet", *flags, *search])
    assert done.exit_code == 0, done.stderr
    said = done.stderr
    assert said.index("images: 32×32 (--img-size)") < said.index("accuracy ") < said.index("search")
    done = CliRunner().invoke(cli, ["eval", str(tmp_path / "run")])  # the run remembers
    assert done.exit_code == 0 and "images: 32×32 (--img-size), files as they are; 1 channel" in done.stderr
