"""KAB, keyframe-anchored attention bias: frames between keyframes attend to text and images as the keyframes' own do.

Source: "Anchoring and Rescaling Attention for Semantically Coherent Inbetweening", arXiv 2603.17651, with the
constants of its released code. The strength [steps, L, F] (the paper's beta) and the anchors are known before a run;
the bias is made of each layer's own queries and keys (`cross`), and then added to the logits of cross-attention.

The paper's anchors are the first and the last frame. Here there may be any number: between two neighbours all is as in
a clip of its own; before the first and after the last anchor that one alone is the target, and the strength falls off
towards the end of the clip. Axis letters as in `types`.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.settings import check_settings, floats, setting

CURVES: MappingProxyType[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType(
    {
        "linear": lambda t: t,
        "ease-in": lambda t: t**2,
        "ease-out": lambda t: 1 - (1 - t) ** 2,
        "ease-in-out": lambda t: t**2 * (3 - 2 * t),
    }
)
"""Anchor curves (the paper's tau): part of the following anchor in the target, at relative time t from the one before.
The paper's is linear."""

_STRENGTH = {
    "kind": float,
    "wanted": "give a number from 0 to 1000; 0 switches it off",
    "good": lambda x: 0 <= x <= 1e3,
}


@dataclass(frozen=True)
class KAB:
    """Settings of KAB; the defaults are the paper's.

    Attributes:
      strength_end, strength_mid: strength towards the anchors, and half-way between them.
      floor: attention below this counts as this.
      layers: first and last layer, counted from 0, both included; None takes 5 to 12 of 40 layers and the same
        part of another depth.
      steps: (low, high); active where low < step / number of steps <= high, so the first step never is.
      curve: a name in CURVES, or one number in 0..1 for each latent frame: the part of the following anchor.
    """

    strength_end: float = setting(0.7, **_STRENGTH)
    strength_mid: float = setting(0.3, **_STRENGTH)
    floor: float = setting(5e-4, float, "give a number above 0, at most 1", lambda x: 0 < x <= 1, "kab floor")
    layers: tuple[int, int] | None = setting(
        None, lambda x: tuple(map(operator.index, x)), "give the first and the last one, whole numbers from 0",
        lambda x: len(x) == 2, "kab layers",
    )  # fmt: skip
    steps: tuple[float, float] = setting(
        (0.0, 0.4), floats, "give two shares of the run, 0 <= low <= high <= 1",
        lambda x: len(x) == 2 and 0 <= x[0] <= x[1] <= 1, "kab steps",
    )  # fmt: skip
    curve: str | tuple[float, ...] = setting(
        "linear", lambda x: x if isinstance(x, str) else floats(x),
        f"choose {', '.join(CURVES)}, or give a number in 0..1 for each latent frame",
        lambda x: not isinstance(x, str) or x in CURVES, "anchor curve",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)


def layer_window(kab: KAB, layers: int) -> tuple[int, int]:
    """First and last active layer of a model with `layers`, both included.

    Raises:
      ValueError: a window outside the model.
    """
    if kab.layers is None:
        first = min(round(layers * 5 / 40), layers - 1)
        return first, max(first, round(layers * 13 / 40) - 1)
    first, last = kab.layers
    if not 0 <= first <= last < layers:
        raise ValueError(f"kab layers {first}-{last}: the model has layers 0 to {layers - 1}")
    return first, last


def _neighbours(frames: int, anchors: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """For every frame the anchors before and after it [F], by position; equal in front of the first and behind the
    last. An anchor opens the segment after it, the last anchor closes the one before it."""
    index = np.arange(frames)
    after = np.searchsorted(anchors, index, side="right")
    after[index == anchors[-1]] = len(anchors) - 1
    return np.maximum(after - 1, 0), np.minimum(after, len(anchors) - 1)


def strength(kab: KAB, steps: int, layers: int, frames: int, anchors: Sequence[int] | None = None) -> np.ndarray:
    """How strongly each frame is anchored.

    Args:
      kab: settings.
      steps: denoising steps of the run.
      layers: of the transformer.
      frames: F token frames, at least 2.
      anchors: token frames, sorted and distinct; None is the first and the last.

    Returns:
      float32 [steps, L, F]; zero outside the windows and in the anchors.

    Raises:
      ValueError: a layer window outside the model, fewer than two frames, or no anchor.
    """
    if frames < 2:
        raise ValueError(f"latent frames {frames}: KAB needs a first and a last one")
    anchors = np.asarray((0, frames - 1) if anchors is None else anchors, int)
    if not len(anchors):
        raise ValueError("KAB needs a keyframe to anchor to: give one, or switch it off")
    index, (before, after) = np.arange(frames), _neighbours(frames, anchors)
    distance = np.minimum(abs(index - anchors[before]), abs(anchors[after] - index))
    outside = np.where(index < anchors[0], anchors[0], index[-1] - anchors[-1])
    longest = np.where(before < after, (anchors[after] - anchors[before]) // 2, outside)
    nearness = 1 - distance / np.maximum(1, longest)
    nearness = (1 + np.cos(np.pi * (1 - nearness))) / 2
    row = kab.strength_mid + (kab.strength_end - kab.strength_mid) * nearness
    row[anchors] = 0
    first, last = layer_window(kab, layers)
    share = np.arange(steps) / steps
    low, high = kab.steps
    active = np.zeros((steps, layers, 1))
    active[(share > low) & (share <= high), first : last + 1] = 1
    return (active * row).astype(np.float32)


def anchor_curve(kab: KAB, frames: int, anchors: Sequence[int] | None = None) -> np.ndarray:
    """How much of each anchor's attention is in each frame's target: float32 [F, A], rows of sum 1.

    Args:
      anchors: as in `strength`; without any anchor the result is [F, 0].

    Raises:
      ValueError: a caller's curve of another length, or not within 0..1.
    """
    anchors = np.asarray((0, frames - 1) if anchors is None else anchors, int)
    named = isinstance(kab.curve, str)
    curve = np.zeros(frames) if named else np.asarray(kab.curve)
    if curve.shape != (frames,):
        raise ValueError(f"anchor curve of {curve.size} numbers: give one for each of the {frames} latent frames")
    if not ((curve >= 0) & (curve <= 1)).all():
        raise ValueError("anchor curve: every number must lie within 0..1")
    parts, index = np.zeros((frames, len(anchors)), np.float32), np.arange(frames)
    if len(anchors):
        before, after = _neighbours(frames, anchors)
        time = (index - anchors[before]) / np.maximum(1, anchors[after] - anchors[before])
        if named:
            curve = CURVES[kab.curve](np.clip(time, 0, 1))
        curve = np.where(before < after, curve, 0).astype(np.float32)
        parts[index, before] = 1 - curve
        parts[index, after] += curve
    return parts


def anchor_bias(attention: jax.Array, target: jax.Array, strength: jax.Array, floor: jax.Array) -> jax.Array:
    """The bias that draws frame attention towards a target.

    strength * (log max(target, floor) - log max(attention, floor))

    Args:
      attention, target: float32 [..., K], of one branch.
      strength: float32 [...]; zero gives exactly zero.
      floor: float32 [].

    Returns:
      float32 [..., K].
    """
    return strength[..., None] * (jnp.log(jnp.maximum(target, floor)) - jnp.log(jnp.maximum(attention, floor)))
