"""Paired comparison of two arms: clip-level bootstrap, sign-flip test, Holm's correction.

Clips are the independent units: the noise seeds of one clip are averaged first, so that more seeds make a clip's
figure surer but never pass for more clips. Axis letters: N clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

DRAWS = 10_000
LEVEL = 0.95
SEED = 20260317


@dataclass(frozen=True)
class Difference:
    """Mean over clips of (arm - baseline).

    Attributes:
      mean: in the metric's unit.
      low, high: of the 95% percentile bootstrap interval over clips; NaN for fewer than 2 clips.
      p: two-sided, of the sign-flip test that the differences are symmetric about 0.
      clips: N.
      wins: share of clips where the arm is higher; ties count half.
    """

    mean: float
    low: float
    high: float
    p: float
    clips: int
    wins: float


def interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of float [N]; NaN for N below 2."""
    if len(values) < 2:
        return float("nan"), float("nan")
    # scipy draws the same resamples as earlier reports did, and so gives their intervals to the last bit.
    found = stats.bootstrap((values,), np.mean, n_resamples=DRAWS, batch=500, confidence_level=LEVEL,
                            method="percentile", rng=np.random.default_rng(SEED)).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def sign_flip(values: np.ndarray) -> float:
    """Two-sided p of float [N]: how often random signs give as large a mean; never 0.

    By hand, as `scipy.stats.permutation_test` doubles the smaller one-sided p, which is another figure.
    """
    rng = np.random.default_rng(SEED + 1)
    target = abs(values.mean()) - 1e-12
    reached = 0
    for _ in range(DRAWS // 500):
        signs = rng.choice([-1.0, 1.0], size=(500, len(values)))
        reached += int((np.abs((signs * values).mean(1)) >= target).sum())
    return (1 + reached) / (1 + DRAWS)


def compare(arm: Mapping[str, float], baseline: Mapping[str, float]) -> Difference:
    """Paired difference of two arms, each clip id -> metric.

    Raises:
      ValueError: not the same clips, or none.
    """
    if not arm or set(arm) != set(baseline):
        raise ValueError(f"{len(arm)} and {len(baseline)} clips: the arms must have the same clips, at least one")
    values = np.array([arm[clip] - baseline[clip] for clip in sorted(arm)])
    wins = float(((values > 0) + 0.5 * (values == 0)).mean())
    return Difference(float(values.mean()), *interval(values), sign_flip(values), len(values), wins)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p of a family of rows: the smallest times m, the next times m - 1, ..., monotone."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, p[name] * (len(p) - rank)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}
