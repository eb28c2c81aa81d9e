"""How the tests read a data set."""

from torch import Tensor

from ekgfx import data


def unaugmented(split_of: data.Data, split: str, index: list[int]) -> Tensor:
    """The images at these indices."""
    (batch,) = split_of.loader(split, len(index), subset=index)
    return batch.images
