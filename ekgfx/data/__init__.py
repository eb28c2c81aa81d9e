"""Data for search, fine-tuning and evaluation: `load(spec)` opens what `--data SPEC` names."""

from ekgfx.data.augment import Augmentation
from ekgfx.data.base import SPLITS, Batch, Data, Loader
from ekgfx.data.spec import load

__all__ = ["SPLITS", "Augmentation", "Batch", "Data", "Loader", "load"]
