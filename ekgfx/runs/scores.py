"""What a network is worth, as run.json's results record it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """What a network is worth and costs. accuracy: fraction of right classes on the test split; agreement: where there
    are no labels, the fraction of test images for which it says what the (trained) unpruned network says. macs: per
    sample."""

    accuracy: float | None
    loss: float | None
    agreement: float | None
    macs: int
    params: int
