"""Ratios of synthetic timings whose truth is known."""

import numpy as np
import pytest
from ekgfx.export import compare


def noisy(milliseconds: float, seed: int, rounds: int = 200, spread: float = 0.05) -> np.ndarray:
    """Timings as they come: a floor, and a tail to the right."""
    return milliseconds * (1 + spread * np.random.default_rng(seed).lognormal(0, 1, rounds))


def test_exact_timings_give_an_exact_ratio():
    ratio = compare([3.0] * 50, [2.0] * 50)
    assert (ratio.value, ratio.low, ratio.high) == (1.5, 1.5, 1.5)
    assert ratio.verdict == "faster"


def test_ratio_is_that_of_the_medians():
    assert compare([1.0, 2.0, 30.0] * 5, [1.0, 4.0, 5.0] * 5).value == 0.5


@pytest.mark.parametrize(("truth", "verdict"), [(2.0, "faster"), (1.1, "faster"), (0.9, "slower")])
def test_real_differences_are_seen(truth, verdict):
    ratio = compare(noisy(truth, 0), noisy(1.0, 1))
    assert ratio.verdict == verdict
    assert ratio.low < truth < ratio.high
    assert ratio.high - ratio.low < 0.1


def test_equal_networks_are_called_equal_as_often_as_promised():
    verdicts = [compare(noisy(1.0, 2 * seed), noisy(1.0, 2 * seed + 1)).verdict for seed in range(100)]
    # 95 of 100 are expected; fewer than 88 has a probability of 0.1%.
    assert verdicts.count("no difference") >= 88


def test_disturbances_that_last_widen_the_interval():
    """Random noise and a disturbance of 25 rounds of one side have the same values in another order; only the second
    says that the two sides may have met different conditions."""
    rng = np.random.default_rng(0)
    reference = rng.normal(1.0, 0.02, 200)
    disturbed = np.where((np.arange(200) // 25) % 2 == 0, 1.0, 1.3) + rng.normal(0, 0.02, 200)
    in_runs, shuffled = compare(reference, disturbed), compare(reference, rng.permutation(disturbed))
    assert in_runs.value == shuffled.value
    assert in_runs.high - in_runs.low > 1.02 * (shuffled.high - shuffled.low)


def test_what_slows_both_sides_cancels():
    """A machine that becomes three times slower half-way: the two medians are uncertain, their ratio is not."""
    load = np.repeat([1.0, 3.0], 100)
    ratio = compare(1.5 * load * noisy(1.0, 0, spread=0.01), load * noisy(1.0, 1, spread=0.01))
    assert ratio.value == pytest.approx(1.5, rel=0.05)
    assert ratio.verdict == "faster"


def test_a_few_timings_prove_nothing():
    with pytest.raises(ValueError, match="9 rounds"):
        compare([2.0] * 9, [1.0] * 9)


def test_timings_must_come_in_pairs():
    with pytest.raises(ValueError, match="2 and 3"):
        compare([1.0, 2.0], [1.0, 2.0, 3.0])
