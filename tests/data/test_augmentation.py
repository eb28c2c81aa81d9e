"""Every augmentation does what it says, with a draw of its own for each sample."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ekgfx import data
from ekgfx.data.augment import flip_some, jitter_colours, shift_some
from ekgfx.data.base import generator


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


def test_small_image_files_are_shifted_and_mirrored_and_grey_ones_only_shifted(tmp_path: Path) -> None:
    """Each view is a 32 × 32 window of the whole image with 4 reflected pixels around it; none is a blown-up crop."""
    root = tmp_path
    for place in (f"{name}/{i}.png" for name in "ab" for i in range(4)):
        (root / place).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(len(place)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / place)
    for channels in (3, 1):
        opened = data.load(f"folder:{root}", image_size=32, channels=channels)
        assert opened.augmented == "shifts by up to 4 pixels" + (", mirrored half the time" if channels == 3 else "")
        subset = list(range(opened.size("train")))
        plain = next(iter(opened.loader("train", 8, subset=subset))).images
        padded = torch.nn.functional.pad(plain, (4,) * 4, mode="reflect")
        mirrored, places = 0, set()
        for seed in range(4):
            shown = next(iter(opened.loader("train", 8, subset=subset, augment=True, seed=seed))).images
            for sample in range(len(shown)):
                found = [
                    (y, x, flip)
                    for y in range(9)
                    for x in range(9)
                    for flip in (False, True)
                    if torch.allclose(
                        padded[sample, :, y : y + 32, x : x + 32],
                        shown[sample].flip(2) if flip else shown[sample],
                        atol=1e-5,
                    )
                ]
                assert found
                mirrored += found[0][2]
                places.add(found[0][:2])
        assert len(places) > 5
        assert 0 < mirrored < 4 * len(subset) if channels == 3 else not mirrored
    assert data.load(f"folder:{root}", image_size=96).augmented == "crops of 8% to 100%, mirrored half the time"
