"""A norm's running averages after a cut: those of before, corrected by what the cut changed on the same images.

Running averages are those of the images that a network was trained on, augmented as they were then. Statistics of other
images, such as plain ones, differ from them before anything is cut, and a network that normalizes by those says other
things than the one that was given. What a cut changes shows on any images, between the uncut and the cut network.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Mean and variance per channel of what a norm normalizes."""

    mean: Tensor
    var: Tensor


def corrected(old: Statistics, full: Statistics, cut: Statistics, eps: float) -> Statistics:
    """The running averages `old` as they would be had the network been cut when they were taken.

    full and cut: of the same images, in the uncut network (the channels that are kept) and in the cut one. By how many
    standard deviations the old mean was off the images' own, and by what factor the variance was, is as it was:

        var + eps = (old.var + eps) · (cut.var + eps) / (full.var + eps)
        mean = cut.mean + (old.mean − full.mean) · sqrt((cut.var + eps) / (full.var + eps))

    So nothing changes, to the bit, where the cut changed nothing; the result is `cut` where the old averages are those
    of the images; and a channel that the cut only scaled is normalized as before. Where old averages are not finite
    (a variance that half precision cannot hold), `cut` takes their place.
    """
    before = full.var + eps
    gain = torch.where(before > 0, (cut.var + eps) / before, torch.ones_like(before))
    var = (old.var + (old.var + eps) * (gain - 1)).clamp_min(0)
    mean = old.mean + (cut.mean - full.mean) + (old.mean - full.mean) * (gain.sqrt() - 1)
    known = old.mean.isfinite() & old.var.isfinite()
    return Statistics(torch.where(known, mean, cut.mean), torch.where(known, var, cut.var))
