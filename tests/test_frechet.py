"""The Frechet distance against closed forms and a root of a matrix from scipy; its bootstrap against the definition."""

import math

import numpy as np
import pytest
from scipy.linalg import sqrtm

from benchmarks.tgi import frechet


def rows(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def exact(variances, mean=0.0):
    """2 D rows whose mean is `mean` and whose covariance is diag(variances), both exactly."""
    half = np.diag(np.sqrt(np.asarray(variances) * (2 * len(variances) - 1) / 2))
    return np.concatenate([half, -half]) + mean


def oracle(a, b):
    """The definition, with scipy's root of the product of covariances; for more rows than features."""
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c_a + c_b - 2 * sqrtm(c_a @ c_b)).real


def oracle_by_eigenvalues(a, b):
    """The definition, tr sqrt as the sum of the roots of the product's eigenvalues; for any number of rows."""
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.maximum(np.linalg.eigvals(c_a @ c_b).real, 0)).sum()
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c_a) + np.trace(c_b) - 2 * root


def test_diagonal_gaussians():
    v, w = np.array([0.5, 1.0, 4.0]), np.array([2.0, 9.0, 0.25])
    mean = np.array([3.0, -1.0, 0.5])
    wanted = np.sum(mean**2) + np.sum((np.sqrt(v) - np.sqrt(w)) ** 2)
    assert frechet.distance(exact(v, mean), exact(w)) == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("n, d", [(50, 8), (8, 50), (2, 1)])
def test_sets_related_in_simple_ways(n, d):
    a = rows(n, d) + 100.0
    spread = np.trace(np.atleast_2d(np.cov(a, rowvar=False)))
    shift = rows(1, d, seed=1)[0]
    assert frechet.distance(a, a) <= 1e-12 * spread
    assert frechet.distance(a, a[::-1]) <= 1e-12 * spread  # the order of rows does not count
    assert frechet.distance(a, a + shift) == pytest.approx(np.sum(shift**2), rel=1e-9)
    # Centred, then three times as wide: sqrt(C 9C) = 3C, so tr C (1 + 9 - 6).
    centred = a - a.mean(0)
    assert frechet.distance(centred, 3 * centred) == pytest.approx(4 * spread, rel=1e-10)


@pytest.mark.parametrize("n, m, d", [(40, 60, 10), (300, 25, 20), (25, 300, 20)])
def test_as_the_definition_with_a_root_of_a_matrix(n, m, d):
    a, b = rows(n, d), rows(m, d, seed=1) @ rows(d, d, seed=2) / 3 + 0.2
    assert frechet.distance(a, b) == pytest.approx(oracle(a, b), rel=1e-10)
    assert frechet.distance(b, a) == pytest.approx(frechet.distance(a, b), rel=1e-12)


@pytest.mark.parametrize("n, m, d", [(12, 9, 64), (2, 3, 64), (12, 90, 64), (90, 12, 64)])
def test_fewer_rows_than_features(n, m, d):
    a, b = rows(n, d), 2 * rows(m, d, seed=1) + 0.1
    # The oracle takes roots of eigenvalues that are 0 but for rounding, about 1e-16: each is off by 1e-8.
    assert frechet.distance(a, b) == pytest.approx(oracle_by_eigenvalues(a, b), rel=1e-6)
    # Coordinates in the span of both sets are fewer, and tell the same.
    basis = np.linalg.qr(np.concatenate([a, b]).T)[0]
    assert frechet.distance(a, b) == pytest.approx(frechet.distance(a @ basis, b @ basis), rel=1e-12)


def test_two_pairs_by_hand():
    # Variances 2 along x and 8 along x: (sqrt 8 - sqrt 2)^2 = 2. Along x and along y: no root in common, 2 + 8.
    x, wide = np.array([[-1.0, 0.0], [1.0, 0.0]]), np.array([[-2.0, 0.0], [2.0, 0.0]])
    assert frechet.distance(x, wide) == pytest.approx(2.0, rel=1e-14)
    assert frechet.distance(x, wide[:, ::-1]) == pytest.approx(10.0, rel=1e-14)


def test_moments_stand_for_rows():
    a, b = rows(80, 12), rows(30, 12, seed=1) + 0.3
    known = frechet.Moments(b.mean(0), np.cov(b, rowvar=False))
    assert frechet.distance(a, known) == pytest.approx(frechet.distance(a, b), rel=1e-10)
    assert frechet.distance(known, known) <= 1e-12 * np.trace(known.cov)


def test_float32_features_are_computed_in_float64():
    a = (rows(60, 10) + 1000).astype(np.float32)
    b = (rows(60, 10, seed=1) + 1000).astype(np.float32)
    assert frechet.distance(a, b) == frechet.distance(a.astype(np.float64), b.astype(np.float64))


@pytest.mark.parametrize("n, m", [(1, 5), (5, 1), (0, 5)])
def test_one_row_has_no_covariance(n, m):
    a, b = rows(n, 4), rows(m, 4)
    with pytest.raises(frechet.Undefined, match=f"at least 2 samples in each set; this one has {min(n, m)}") as caught:
        frechet.distance(a, b)
    assert "\n" not in str(caught.value)
    with pytest.raises(frechet.Undefined):
        frechet.bootstrap(a, b, 10, 0, 0.95)


def test_sets_that_are_not_such():
    a = rows(5, 4)
    broken = a.copy()
    broken[2, 1] = np.nan
    for b, message in ((rows(5, 3), "4 and 3 features"), (a[0], r"shape \[4\]"), (broken, "not finite in 1 rows")):
        with pytest.raises(ValueError, match=message):
            frechet.distance(a, b)
        with pytest.raises(ValueError, match=message):
            frechet.bootstrap(a, b, 10, 0, 0.95)
    with pytest.raises(ValueError, match="covariance of shape"):
        frechet.distance(a, frechet.Moments(np.zeros(4), np.eye(3)))
    with pytest.raises(ValueError, match="not finite"):
        frechet.distance(a, frechet.Moments(np.zeros(4), np.full((4, 4), np.inf)))


def test_bad_draws_levels_and_groups():
    a, groups = rows(6, 3), np.arange(6)
    for draws, level in ((0, 0.95), (5, 0.0), (5, 1.0), (5, float("nan"))):
        with pytest.raises(ValueError, match="take at least 1"):
            frechet.bootstrap(a, a, draws, 0, level)
    with pytest.raises(ValueError, match=r"6 rows with groups of shape \[5\]"):
        frechet.bootstrap(a, a, 5, 0, 0.9, groups[:5], groups)
    with pytest.raises(ValueError, match="not the same clips"):
        frechet.bootstrap(a, a, 5, 0, 0.9, groups, groups + 1)


def one_draw(a, b, seed, groups_a=None, groups_b=None):
    """Both ends of the interval of a single draw are that draw's distance."""
    low, high = frechet.bootstrap(a, b, 1, seed, 0.9, groups_a, groups_b)
    assert low == high
    return low


# Fewer rows than features, more, and so many more that features are the cheaper side.
@pytest.mark.parametrize("clips, d", [(5, 40), (9, 20), (30, 6)])
def test_a_draw_is_the_distance_of_the_rows_drawn(clips, d):
    """With paired groups: a clip's 3 rows of one set and 2 of the other come as often as the clip is drawn."""
    groups_a, groups_b = np.repeat(np.arange(clips), 3), np.tile(np.arange(clips), 2)
    a, b = rows(3 * clips, d) + 5, rows(2 * clips, d, seed=1) * 1.5
    for seed in range(5):
        chosen = np.random.default_rng(seed).integers(clips, size=clips)
        drawn_a = np.concatenate([a[groups_a == clip] for clip in chosen])
        drawn_b = np.concatenate([b[groups_b == clip] for clip in chosen])
        wanted = frechet.distance(drawn_a, drawn_b)
        # 1e-6: the draws' quicker sum of singular values.
        assert one_draw(a, b, seed, groups_a, groups_b) == pytest.approx(wanted, rel=1e-6)
    names = np.array([100, 7, 33, 2, 50, *range(200, 200 + clips)])[:clips]  # any numbers, in any order
    low_high = frechet.bootstrap(a, b, 20, 0, 0.9, names[groups_a], names[groups_b])
    assert low_high[0] < low_high[1]


def test_paired_sets_are_drawn_together_and_others_apart():
    a, groups = rows(20, 4), np.arange(20)
    low, high = frechet.bootstrap(a, a + 2, 50, 0, 0.95, groups, groups)
    assert low == pytest.approx(16, rel=1e-6) and high == pytest.approx(16, rel=1e-6)  # the shift, in every draw
    low, high = frechet.bootstrap(a, a + 2, 50, 0, 0.95)
    assert high - low > 1


def test_the_interval_is_seeded_and_grows_with_its_level():
    a, b = rows(40, 3), rows(40, 3, seed=1) + 1
    wide, narrow = (frechet.bootstrap(a, b, 100, 7, level) for level in (0.95, 0.5))
    assert frechet.bootstrap(a, b, 100, 7, 0.95) == wide != frechet.bootstrap(a, b, 100, 8, 0.95)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_interval_covers_the_truth():
    """Two normal sets 2 apart in one of 3 features: 4, in about 95 of 100 sets of 200 rows."""
    covered = 0
    for seed in range(100):
        a, b = rows(200, 3, seed=2 * seed), rows(200, 3, seed=2 * seed + 1) + [2, 0, 0]
        low, high = frechet.bootstrap(a, b, 100, seed, 0.95)
        covered += low <= 4 <= high
    assert 86 <= covered <= 100


def test_rows_of_a_clip_are_no_evidence_of_their_own():
    """Every row ten times over, as one clip: the same clips are drawn, so the interval is about as wide."""
    a, b, groups = rows(30, 3), rows(30, 3, seed=1) + 1, np.arange(30)
    tenfold = [np.repeat(x, 10, axis=0) for x in (a, b, groups, groups)]
    single = frechet.bootstrap(a, b, 100, 0, 0.9, groups, groups)
    by_clip = frechet.bootstrap(*tenfold[:2], 100, 0, 0.9, *tenfold[2:])
    by_row = frechet.bootstrap(*tenfold[:2], 100, 0, 0.9)
    assert by_clip[1] - by_clip[0] == pytest.approx(single[1] - single[0], rel=0.1)
    assert by_row[1] - by_row[0] < 0.6 * (by_clip[1] - by_clip[0])


def test_two_clips_of_one_row():
    """Four draws: both clips twice, the first alone, the second alone; alone there is no variance, only a mean."""
    a, b = np.array([[0.0], [2.0]]), np.array([[1.0], [9.0]])
    found = {round(one_draw(a, b, seed, np.arange(2), np.arange(2)), 6) for seed in range(20)}
    # (1 - 5)^2 + (sqrt 2 - sqrt 32)^2 = 16 + 18; (0 - 1)^2; (2 - 9)^2.
    assert found == {34.0, 1.0, 49.0}


def test_one_clip_has_no_interval():
    a = rows(10, 3)
    low, high = frechet.bootstrap(a, a + 1, 10, 0, 0.95, np.zeros(10, int), np.zeros(10, int))
    assert math.isnan(low) and math.isnan(high)
