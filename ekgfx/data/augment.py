"""Augmentation of whole batches in memory, with other random numbers for every sample, on the batch's own device."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: how much red, green and blue add to a grey value


@dataclass(frozen=True)
class Augmentation:
    """What may be done to the images of a data set without changing what they show."""

    flip: bool = True
    """Mirror half of the images left to right."""
    pad: int = 4
    """Shift by up to this many pixels either way, filling the border with its reflection."""
    jitter: float = 0.2
    """Most that brightness, contrast and saturation change, as a fraction; only where several views are taken."""

    def __str__(self) -> str:
        pixels = "1 pixel" if self.pad == 1 else f"{self.pad} pixels"
        return f"shifts by up to {pixels}" + (", mirrored half the time" if self.flip else "")

    def __call__(self, images: Tensor, draw: torch.Generator, colours: bool) -> Tensor:
        """Images on [0, 1], B×C×H×W → the same shape. `draw` is a CPU generator."""
        if colours:
            images = jitter_colours(images, self.jitter, draw)
        if self.flip:
            images = flip_some(images, draw)
        return shift_some(images, self.pad, draw)


def flip_some(images: Tensor, draw: torch.Generator) -> Tensor:
    chosen = torch.rand(len(images), generator=draw) < 0.5
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(3), images)


def shift_some(images: Tensor, pad: int, draw: torch.Generator) -> Tensor:
    """Pads by `pad` pixels of reflection, then crops the old size at a random place of each sample."""
    count, _, height, width = images.shape
    offsets = torch.randint(0, 2 * pad + 1, (2, count), generator=draw).to(images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    sample = torch.arange(count, device=images.device)[:, None, None]
    return padded.movedim(1, 3)[sample, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def jitter_colours(images: Tensor, strength: float, draw: torch.Generator) -> Tensor:
    """Scales brightness, then contrast around each channel's mean, then saturation around the grey image."""
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=draw) - 1)
    brightness, contrast, saturation = factors.to(images.device)
    images = images * brightness
    mean = images.mean(dim=(2, 3), keepdim=True)
    images = mean + contrast * (images - mean)
    if images.shape[1] == len(LUMA):
        weights = torch.tensor(LUMA, device=images.device)[:, None, None]
        grey = (images * weights).sum(dim=1, keepdim=True)
        images = grey + saturation * (images - grey)
    return images.clamp(0, 1)
