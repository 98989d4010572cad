"""Paired statistics against closed forms and exhaustive enumeration."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.tgi import paired


def by_clip(values):
    return {f"clip-{n}": float(value) for n, value in enumerate(values)}


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(1.0, 2.0, 400)
    low, high = paired.interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)
    assert paired.interval(values) == (low, high)  # seeded


def test_the_interval_covers_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        low, high = paired.interval(np.random.default_rng(seed).normal(0.0, 1.0, 60))
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("values", [[0.3], []])
def test_fewer_than_two_clips_have_no_interval(values):
    assert all(math.isnan(end) for end in paired.interval(np.array(values)))


def test_sign_flips_agree_with_all_of_them():
    values = np.random.default_rng(3).normal(0.5, 1.0, 10)
    means = [abs((np.array(signs) * values).mean()) for signs in itertools.product([-1, 1], repeat=10)]
    exact = np.mean(np.array(means) >= abs(values.mean()) - 1e-12)
    assert paired.sign_flip(values) == pytest.approx(exact, abs=0.015)


def test_no_difference_is_never_significant():
    assert paired.sign_flip(np.zeros(50)) == 1.0
    assert paired.sign_flip(np.ones(50)) == pytest.approx(1 / 10_001)


def test_holm_of_a_worked_example():
    adjusted = paired.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert paired.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert paired.holm({}) == {}


def test_comparison_is_by_clip():
    """Clips that differ widely, but all by the same step: the pairing sees it, unpaired means would not."""
    base = np.random.default_rng(0).normal(20, 8, 40)
    found = paired.compare(by_clip(base + 0.1), by_clip(base))
    assert found.mean == pytest.approx(0.1) and found.low > 0.09 and found.high < 0.11
    assert found.p < 0.001 and found.wins == 1 and found.clips == 40
    assert paired.compare(by_clip(base), by_clip(base)).wins == 0.5


@pytest.mark.parametrize("arm, baseline", [({}, {}), ({"a": 1.0}, {"b": 1.0}), ({"a": 1.0}, {"a": 1.0, "b": 2.0})])
def test_other_clips_are_refused(arm, baseline):
    with pytest.raises(ValueError, match="same clips"):
        paired.compare(arm, baseline)
