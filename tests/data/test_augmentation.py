"""Every augmentation does what it says, with a draw of its own for each sample."""

import torch

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
