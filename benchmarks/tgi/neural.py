"""The metrics that need public network weights: LPIPS of each clip, and features for FID and FVD of a whole set.

The weights are the user's own copies, brought over by `python -m benchmarks.tgi.networks.weights`. A network that is
not there is "unavailable" in the results: no other network takes its place.

Features go to files of their own in the results folder, one for each (network, length, arm, clip, seed), written
before the clip's line; FID and FVD are computed from them when a report is made.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.tgi import frechet
from benchmarks.tgi.networks import i3d, inception, lpips, weights
from benchmarks.tgi.scores import Key, Scores
from wanjax.writing import write_bytes

RESIZE = "truth stretched to the run's size by Pillow bicubic; then the network's own resize"
SETS = {"fid": "inception", "fvd": "i3d"}
BATCH = 16  # frames at once


class Neural:
    """The networks that are at hand.

    Args:
      folder: of converted weights, or None for none.

    Raises:
      ValueError: no such folder, or weights that are not what their name says.
    """

    def __init__(self, folder: Path | None):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--weights {folder}: no such folder; make it with benchmarks.tgi.networks.weights")
        files = {} if folder is None else weights.available(folder)
        self._digests = {name: weights.digest(path) for name, path in files.items()}
        self._params = {name: weights.load(name, path) for name, path in files.items()}

    def check(self, size: tuple[int, int]) -> None:
        """Raises ValueError for frames of a (height, width) that a network at hand does not take."""
        if "lpips" in self._params and min(size) < lpips.MIN_SIZE:
            raise ValueError(
                f"size {size[0]}x{size[1]}: LPIPS takes none below {lpips.MIN_SIZE} pixels on a side; take a larger "
                "--size, or --weights without lpips.safetensors"
            )

    def policy(self) -> dict[str, dict[str, Any]]:
        """As `metrics.policy`; "weights" is the sha256 of the file, or "unavailable"."""
        told = {
            "lpips_interior": ("lpips", "LPIPS v0.1, AlexNet, JAX port; mean over frames", "1 .. T-2"),
            "fid": (
                "inception",
                "Frechet distance of Inception pool3 features, nuclear-norm form, JAX port",
                "1 .. T-2",
            ),
            "fvd": ("i3d", "Frechet distance of I3D Kinetics-400 logits, nuclear-norm form, JAX port", "all"),
        }
        return {
            metric: {"implementation": words, "resize": RESIZE, "frames": frames,
                     "weights": self._digests.get(network, "unavailable")}
            for metric, (network, words, frames) in told.items()
        }  # fmt: skip

    def measure(self, key: Key, made: np.ndarray, truth: np.ndarray, folder: Path) -> dict[str, float]:
        """LPIPS of one clip if it is available; writes the clip's features for the others.

        Args:
          key: of the clip.
          made, truth: uint8 [T, H, W, 3].
          folder: of the results.
        """
        found = {}
        if "lpips" in self._params:
            pairs = (made[1:-1], truth[1:-1])
            values = _in_batches(partial(_lpips, self._params["lpips"]), *pairs)
            found["lpips_interior"] = round(float(values.mean()), 6)
        if "inception" in self._params:
            _store(feature_file(folder, "inception", key),
                   _in_batches(partial(_inception, self._params["inception"]), made[1:-1]))  # fmt: skip
        if "i3d" in self._params and len(made) >= i3d.MIN_FRAMES:
            _store(feature_file(folder, "i3d", key), np.asarray(_i3d(self._params["i3d"], made[None])))
        return found


_lpips = jax.jit(lpips.distance)
_inception = jax.jit(inception.features)
_i3d = jax.jit(i3d.features)


def _in_batches(function: Callable[..., jax.Array], *frames: np.ndarray) -> np.ndarray:
    """The function over frames, a fixed number at a time; the last ones are filled up and cut off again."""
    total = len(frames[0])
    parts = []
    for start in range(0, total, BATCH):
        rows = np.minimum(np.arange(start, start + BATCH), total - 1)
        parts.append(np.asarray(function(*(part[rows] for part in frames))))
    return np.concatenate(parts)[:total]


def feature_file(folder: Path, network: str, key: Key) -> Path:
    return folder / "features" / network / str(key.length) / key.arm / f"{key.name}.npy"


def _store(file: Path, features: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, features.astype(np.float32))
    write_bytes(file, content.getvalue(), overwrite=True, anything=True)


def distances(scores: Scores, length: int, arms: Sequence[str], draws: int = 200) -> dict[str, dict[str, Any]]:
    """FID and FVD of each arm against the truth: arm -> metric -> {"distance", "low", "high", "samples"} or a reason.

    "unavailable": the run had no such weights, or not the arm `truth`. "undefined": fewer than 2 samples, or fewer
    frames than the network takes. One video of a clip counts, of its lowest seed: the distance falls with the number of
    samples, which must not differ between arms.
    """
    return {arm: {metric: _distance(scores, length, arm, metric, draws) for metric in SETS} for arm in arms}


def _distance(scores: Scores, length: int, arm: str, metric: str, draws: int) -> dict[str, Any] | str:
    network = SETS[metric]
    if scores.config["metrics"].get(metric, {}).get("weights", "unavailable") == "unavailable":
        return "unavailable"
    if network == "i3d" and length < i3d.MIN_FRAMES:
        return "undefined"
    true = _features(scores, length, "truth", network)
    made = _features(scores, length, arm, network)
    if not true or not made:
        return "unavailable"
    clips = sorted(made.keys() & true.keys())
    a, groups_a = _stacked(true, clips)
    b, groups_b = _stacked(made, clips)
    try:
        distance = frechet.distance(a, b)
    except frechet.Undefined:
        return "undefined"
    ends = frechet.bootstrap(a, b, draws, 0, 0.95, groups_a, groups_b)
    low, high = (None if np.isnan(end) else end for end in ends)  # a single clip has no interval
    return {"distance": distance, "low": low, "high": high, "samples": len(b), "clips": len(clips)}


def _features(scores: Scores, length: int, arm: str, network: str) -> dict[str, np.ndarray]:
    keys = [key for key in scores.done if key.length == length and key.arm == arm]
    lowest = {key.clip: key for key in sorted(keys, key=lambda key: -(key.seed or 0))}
    return {clip: np.load(feature_file(scores.folder, network, key)) for clip, key in lowest.items()}


def _stacked(features: Mapping[str, np.ndarray], clips: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all clips, and the number of each row's clip."""
    rows = [features[clip] for clip in clips]
    groups = np.concatenate([np.full(len(row), n) for n, row in enumerate(rows)])
    return np.concatenate(rows), groups
