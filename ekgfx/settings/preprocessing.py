"""How images become a model's input, as asked for: size, crop, normalization, channels; under timm's names."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ekgfx.errors import RecipeError


@dataclass(frozen=True)
class Preprocessing:
    """What was asked for; None leaves it to the model, then to the data.

    img_size: side of the model's square input. in_chans: channels of it. crop_pct: share of the short side that
    evaluation keeps of image files. mean, std: normalization per channel of images on [0, 1], or one for all channels.
    interpolation: of image files.
    """

    img_size: int | None = None
    in_chans: int | None = None
    crop_pct: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None

    def __post_init__(self) -> None:
        for name in ("img_size", "in_chans"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"preprocessing.{name} {value}: use at least 1")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise RecipeError(f"preprocessing.crop_pct {self.crop_pct}: a share in (0, 1], such as 0.875")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise RecipeError(f"preprocessing.std {self.std}: each is above 0")
        if () in (self.mean, self.std):
            raise RecipeError("preprocessing.mean and std need a number for each channel, or one for all")
        if self.interpolation not in (None, *INTERPOLATIONS):
            raise RecipeError(f"preprocessing.interpolation {self.interpolation!r}: use {', '.join(INTERPOLATIONS)}")

    def flags(self) -> Mapping[str, str]:
        """The flags of what was asked for, by the names that `ekgfx.data.load` has for it."""
        names = {"img_size": "image_size", "in_chans": "channels"}
        asked = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        return {names.get(name, name): f"--{name.replace('_', '-')}" for name in asked}

    def data_options(self) -> Mapping[str, Any]:
        """What was asked for of the data, for `ekgfx.data.load`; size and channels are those of the model's input."""
        names = ("crop_pct", "mean", "std", "interpolation")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
