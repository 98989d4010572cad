"""Metrics of one video against the truth, in numpy and scikit-image, and the policy behind each number.

Axis letters: T frames, H height, W width. Everything is computed on the uint8 arrays that the model made, never on a
compressed file, at the size of the run; the truth is stretched to it by Pillow's antialiased bicubic.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

PSNR_CAP = 60.0
"""dB of a frame at most: equal frames would be infinite, and one of them would rule the mean."""

MIN_SIZE = 11
"""Pixels on a side, the window of SSIM."""

HIGHER_IS_BETTER = {
    "psnr_interior": True,
    "ssim_interior": True,
    "psnr_all": True,
    "ssim_all": True,
    "psnr_ends": True,
    "lpips_interior": False,
    "pace_distance": False,
    "pace_variance": None,
    "flicker": None,
}
"""Direction of each metric; None where only the nearness to the truth's own value means something."""


def policy() -> dict[str, dict[str, Any]]:
    """Implementation, version, resize and endpoint policy of every metric, for the results file."""
    resize = "truth stretched to the run's size, Pillow bicubic, antialiased; made frames as they are"
    skimage = f"scikit-image {version('scikit-image')}"
    psnr = {"implementation": f"{skimage} peak_signal_noise_ratio of each frame, 255 peak, at most {PSNR_CAP:g} dB; "
            "mean of dB over frames", "resize": resize}  # fmt: skip
    ssim = {"implementation": f"{skimage} structural_similarity, Gaussian 11x11 sigma 1.5, valid, population "
            "covariance, K 0.01 0.03, mean over channels; mean over frames", "resize": resize}  # fmt: skip
    own = {"implementation": "numpy, see benchmarks/tgi/metrics.py", "resize": resize, "frames": "all"}
    interior, everything = {"frames": "1 .. T-2, the keyframes left out"}, {"frames": "all, keyframes included"}
    return {
        "psnr_interior": psnr | interior,
        "ssim_interior": ssim | interior,
        "psnr_all": psnr | everything,
        "ssim_all": ssim | everything,
        "psnr_ends": psnr | {"frames": "0 and T-1"},
        "pace_distance": own,
        "pace_variance": own,
        "flicker": own,
    }


def psnr(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """dB of every frame, float64 [T], of uint8 [T, H, W, 3]; at most PSNR_CAP."""
    with np.errstate(divide="ignore"):  # equal frames
        frames = [peak_signal_noise_ratio(one, other, data_range=255) for one, other in zip(truth, made, strict=True)]
    return np.minimum(frames, PSNR_CAP)


def ssim(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of every frame, float64 [T], of uint8 [T, H, W, 3]; sides of at least 11."""
    return np.array([
        structural_similarity(
            one, other, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for one, other in zip(made, truth, strict=True)
    ])  # fmt: skip


def motion(video: np.ndarray) -> np.ndarray:
    """How much moves from each frame to the next: mean absolute difference in grey levels, float64 [T - 1]."""
    return np.abs(np.diff(video.astype(np.float64), axis=0)).mean(axis=(1, 2, 3))


def pace(video: np.ndarray) -> np.ndarray:
    """Share of the clip's motion in each step, float64 [T - 1], sum 1; even where nothing moves at all."""
    steps = motion(video)
    return steps / steps.sum() if steps.any() else np.full(len(steps), 1 / len(steps))


def pace_variance(video: np.ndarray) -> float:
    """Variance of per-frame motion over its squared mean: 0 for an even pace, T - 2 for a single jump."""
    shares = pace(video)
    return float(np.square(shares * len(shares) - 1).mean())


def pace_distance(made: np.ndarray, truth: np.ndarray) -> float:
    """Earth mover's distance between two paces in clip lengths: how far in time motion must be moved, in [0, 1)."""
    cumulative = np.cumsum(pace(made)) - np.cumsum(pace(truth))
    return float(np.abs(cumulative).mean())


def flicker(video: np.ndarray) -> float:
    """Mean absolute second difference in time, grey levels: what a steady motion of smooth things does not have."""
    return float(np.abs(np.diff(video.astype(np.float64), 2, axis=0)).mean()) if len(video) > 2 else 0.0


def measure(made: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Every metric of one clip, and PSNR frame by frame.

    Args:
      made, truth: uint8 [T, H, W, 3], T at least 3, sides at least 11.

    Raises:
      ValueError: shapes or dtypes that differ, or are too small.
    """
    if made.shape != truth.shape or made.dtype != np.uint8 or truth.dtype != np.uint8:
        raise ValueError(f"made {made.dtype} {made.shape}, truth {truth.dtype} {truth.shape}: give uint8 of one shape")
    if len(made) < 3 or min(made.shape[1:3]) < MIN_SIZE:
        raise ValueError(f"video of shape {made.shape}: metrics need 3 frames of at least {MIN_SIZE} x {MIN_SIZE}")
    decibel, similar = psnr(made, truth), ssim(made, truth)
    figures = {
        "psnr_interior": decibel[1:-1].mean(),
        "ssim_interior": similar[1:-1].mean(),
        "psnr_all": decibel.mean(),
        "ssim_all": similar.mean(),
        "psnr_ends": decibel[[0, -1]].mean(),
        "pace_distance": pace_distance(made, truth),
        "pace_variance": pace_variance(made),
        "flicker": flicker(made),
    }
    return {
        "metrics": {name: round(float(value), 6) for name, value in figures.items()},
        "psnr_frames": [round(float(value), 4) for value in decibel],
    }
