"""KAB, keyframe-anchored attention bias: middle frames attend to text and keyframes as the keyframes' own do.

Source: "Anchoring and Rescaling Attention for Semantically Coherent Inbetweening", arXiv 2603.17651, with the
constants of its released code. The strength beta[step, layer, frame] is known before a run; the bias is made of
each layer's own queries and keys, as a pure function, and then added to the logits of cross-attention.

Axis letters: B batch, F latent frames, Q queries (video tokens) of one frame, K keys of a branch, N heads,
D head width, L layers.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from wanjax.config import FLOAT32, Precision, floats, make_plain
from wanjax.layers import constrain
from wanjax.types import Branches, CrossBias, CrossControl

CURVES: MappingProxyType[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType(
    {
        "linear": lambda t: t,
        "ease-in": lambda t: t**2,
        "ease-out": lambda t: 1 - (1 - t) ** 2,
        "ease-in-out": lambda t: t**2 * (3 - 2 * t),
    }
)
"""Anchor curves: share of the last keyframe in the target of relative time t. The paper's is linear."""


@dataclass(frozen=True)
class KAB:
    """Settings of KAB; the defaults are the paper's.

    Attributes:
      beta_end, beta_mid: strength towards the keyframes, and half-way between them.
      eps: attention below this counts as this.
      layers: first and last layer, counted from 0, both included; None takes 5 to 12 of 40 layers and the same
        part of another depth.
      steps: (low, high); active where low < step / number of steps <= high, so the first step never is.
      curve: a name in CURVES, or one number in 0..1 for each latent frame.
    """

    beta_end: float = 0.7
    beta_mid: float = 0.3
    eps: float = 5e-4
    layers: tuple[int, int] | None = None
    steps: tuple[float, float] = (0.0, 0.4)
    curve: str | tuple[float, ...] = "linear"

    def __post_init__(self) -> None:
        for field, label in (("beta_end", "beta_end"), ("beta_mid", "beta_mid"), ("eps", "kab eps")):
            make_plain(self, field, float, label, "a number")
        make_plain(self, "steps", floats, "kab steps", "two shares of the run, 0 <= low <= high <= 1")
        if self.layers is not None:
            make_plain(self, "layers", lambda layers: tuple(map(operator.index, layers)), "kab layers",
                       "the first and the last one, whole numbers from 0")  # fmt: skip
        if not isinstance(self.curve, str):
            make_plain(self, "curve", floats, "anchor curve", "a number in 0..1 for each latent frame")
        for name, value in (("beta_end", self.beta_end), ("beta_mid", self.beta_mid)):
            if not (math.isfinite(value) and 0 <= value <= 1e3):
                raise ValueError(f"{name} {value}: give a number from 0 to 1000; 0 switches it off")
        if not (math.isfinite(self.eps) and 0 < self.eps <= 1):
            raise ValueError(f"kab eps {self.eps}: give a number above 0, at most 1")
        if len(self.steps) != 2 or not (0 <= self.steps[0] <= self.steps[1] <= 1):
            text = "-".join(f"{share:g}" for share in self.steps)
            raise ValueError(f"kab steps {text}: give two shares of the run, 0 <= low <= high <= 1")
        if self.layers is not None and len(self.layers) != 2:
            text = "-".join(str(layer) for layer in self.layers)
            raise ValueError(f"kab layers {text}: give the first and the last one, whole numbers from 0")
        if isinstance(self.curve, str) and self.curve not in CURVES:
            raise ValueError(f"anchor curve {self.curve!r}: choose {', '.join(CURVES)}, or give a number a frame")


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


def strength(kab: KAB, steps: int, layers: int, frames: int) -> np.ndarray:
    """How strongly each frame is anchored, beta.

    Args:
      kab: settings.
      steps: denoising steps of the run.
      layers: of the transformer.
      frames: F latent frames, at least 2.

    Returns:
      float32 [steps, L, F]; zero outside the windows and in the first and last frame.

    Raises:
      ValueError: a layer window outside the model, or fewer than two frames.
    """
    if frames < 2:
        raise ValueError(f"latent frames {frames}: KAB needs a first and a last one")
    index = np.arange(frames)
    distance = np.minimum(index, frames - 1 - index)
    nearness = 1 - distance / max(1, (frames - 1) // 2)
    nearness = (1 + np.cos(np.pi * (1 - nearness))) / 2
    beta = kab.beta_mid + (kab.beta_end - kab.beta_mid) * nearness
    beta[[0, -1]] = 0
    first, last = layer_window(kab, layers)
    share = np.arange(steps) / steps
    low, high = kab.steps
    active = np.zeros((steps, layers, 1))
    active[(share > low) & (share <= high), first : last + 1] = 1
    return (active * beta).astype(np.float32)


def anchor_curve(kab: KAB, frames: int) -> np.ndarray:
    """tau, the share of the last keyframe's attention in each frame's target: float32 [F].

    Raises:
      ValueError: a caller's curve of another length, or not within 0..1.
    """
    if isinstance(kab.curve, str):
        return CURVES[kab.curve](np.arange(frames) / max(1, frames - 1)).astype(np.float32)
    curve = np.asarray(kab.curve, np.float64)
    if curve.shape != (frames,):
        raise ValueError(f"anchor curve of {curve.size} numbers: give one for each of the {frames} latent frames")
    if not ((curve >= 0) & (curve <= 1)).all():
        raise ValueError("anchor curve: every number must lie within 0..1")
    return curve.astype(np.float32)


def by_frame(q: jax.Array, frames: int) -> jax.Array:
    """Queries [B, S, N, D], S a multiple of F, as [F, B, Q, N, D].

    Under sequence parallelism frames straddle devices; here each frame's queries are split over all of them.
    """
    if q.shape[1] % frames:
        raise ValueError(f"{q.shape[1]} queries are not {frames} frames of equal size")
    q = rearrange(q, "B (F Q) N D -> F B Q N D", F=frames)
    return constrain(q, None, "data", "sequence", "tensor", None)


def frame_attention(
    q: jax.Array,
    k: jax.Array,
    frames: int,
    bias: jax.Array | None = None,
    *,
    scale: float | None = None,
    precision: Precision = FLOAT32,
) -> jax.Array:
    """Attention of each frame to each key: the mean over heads and the frame's queries of the probabilities.

    Goes frame by frame, so that probabilities of all frames never exist at once.

    Args:
      q: [B, S, N, D], S = F * Q, frame-major.
      k: [B, K, N, D].
      frames: F.
      bias: [B, F, K], added to the scaled logits; None adds nothing.
      scale: default 1 / sqrt(D).
      precision: compute dtype of the product, dtype of the softmax; the mean is float32.

    Returns:
      float32 [B, F, K]; every row sums to 1.

    Raises:
      ValueError: S is not a multiple of frames.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dtype, softmax = jnp.dtype(precision.compute), jnp.dtype(precision.softmax)
    k = k.astype(dtype)

    def one(frame: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        q, bias = frame
        logits = jnp.einsum(
            "BQND,BKND->BNQK", q.astype(dtype), k, precision=precision.matmul, preferred_element_type=jnp.float32
        )
        logits = logits.astype(softmax) * scale
        if bias is not None:
            logits = logits + bias[:, None, None].astype(softmax)
        return jax.nn.softmax(logits, -1).astype(jnp.float32).mean((1, 2))

    rows = None if bias is None else jnp.moveaxis(bias, 1, 0)
    return jnp.moveaxis(lax.map(one, (by_frame(q, frames), rows)), 0, 1)


def anchor_bias(attention: jax.Array, beta: jax.Array, curve: jax.Array, floor: jax.Array) -> jax.Array:
    """The bias that draws frame attention towards an interpolation of the first and the last frame's.

    beta * (log max(target, floor) - log max(attention, floor)), where
    target[i] = (1 - curve[i]) * attention[0] + curve[i] * attention[F - 1].

    Args:
      attention: float32 [B, F, K], of one branch.
      beta: float32 [B, F]; zero gives exactly zero.
      curve: float32 [F].
      floor: float32 [].

    Returns:
      float32 [B, F, K].
    """
    share = curve[None, :, None]
    target = (1 - share) * attention[:, :1] + share * attention[:, -1:]
    return beta[..., None] * (jnp.log(jnp.maximum(target, floor)) - jnp.log(jnp.maximum(attention, floor)))


def bias(q: jax.Array, keys: Branches, control: CrossControl, precision: Precision = FLOAT32) -> CrossBias:
    """KAB's bias of one layer, from its own queries and keys.

    Each branch has a softmax of its own; where the keyframes are not isolated, they share one over their joint
    keys, as in Wan2.1 (the paper's "KAB without isolation").

    Args:
      q: [B, S, N, D], normalised.
      keys: [B, K, N, D] a branch, normalised.
      control: of one layer, strength [B, F].
      precision: as in `frame_attention`.

    Returns:
      CrossBias with float32 leaves [B, F, K], None for absent branches.
    """
    beta, frames = control.strength, control.strength.shape[1]

    def of(k: jax.Array) -> jax.Array:
        attention = frame_attention(q, k, frames, precision=precision)
        return anchor_bias(attention, beta, control.curve, control.floor)

    text = of(keys.text)
    if keys.first is None:
        return CrossBias(text)
    if keys.last is None:
        return CrossBias(text, of(keys.first))
    size = keys.first.shape[1]

    def joint() -> tuple[jax.Array, jax.Array]:
        both = of(jnp.concatenate([keys.first, keys.last], 1))
        return both[..., :size], both[..., size:]

    first, last = lax.cond(control.isolated, lambda: (of(keys.first), of(keys.last)), joint)
    return CrossBias(text, first, last)
