"""ReTRo: one scale factor a latent frame for the temporal rotary embedding, large at the keyframes.

Source: "Anchoring and Rescaling Attention for Semantically Coherent Inbetweening", arXiv 2603.17651, and its
released code for the edge rule, the rounding and the smoothing. `rope.table` applies the factors. Axis letters:
F latent frames.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wanjax.rope import MODES, Mode
from wanjax.settings import check_settings, setting

PUBLISHED_EDGE = 8 / 81
"""Edge width over pixel frames. Rounded it gives the paper's 2, 3, 6, 8 for 25, 33, 65, 81 frames."""


def _whole(value: int) -> int:
    if isinstance(value, bool):
        raise TypeError("a truth value is no number of frames")
    return operator.index(value)


_SCALE = {"kind": float, "wanted": "give a number above 0, at most 1000; 1 changes nothing",
          "good": lambda x: 0 < x <= 1e3}  # fmt: skip


@dataclass(frozen=True)
class ReTRo:
    """Settings of ReTRo; the defaults are the paper's.

    Attributes:
      mode: what a factor does, see `rope.table`: "frequency" (the paper's text), "magnitude" (its released
        code) or "position" (frames move on a monotone time axis with fixed ends).
      s_edge, s_mid: factor near the keyframes, and between them, before smoothing.
      w_edge: width of each edge in PIXEL frames, 1 .. frames / 2; None takes 8 for 81 frames and others in
        proportion, at least 1.
      smooth: half width of the box filter in latent frames, 0 for none; the ends are repeated beyond the ends.
    """

    mode: Mode = setting("frequency", str, f"choose {', '.join(MODES)}", lambda x: x in MODES, "retro mode")
    s_edge: float = setting(1.06, **_SCALE)
    s_mid: float = setting(0.94, **_SCALE)
    w_edge: float | None = setting(None, float, "give a number of pixel frames")
    smooth: int = setting(
        2, _whole, "give a whole number from 0 (none) to 1000 latent frames", lambda x: 0 <= x <= 1000, "retro smooth"
    )

    def __post_init__(self) -> None:
        check_settings(self)


def edge_width(retro: ReTRo, frames: int) -> float:
    """Edge width in pixel frames for a video of `frames`.

    Raises:
      ValueError: w_edge outside 1 .. frames / 2.
    """
    if retro.w_edge is None:
        return max(1, round(frames * PUBLISHED_EDGE))
    if not 1 <= retro.w_edge <= frames / 2:
        raise ValueError(f"w_edge {retro.w_edge:g}: must be from 1 to {frames / 2:g} pixel frames, half of {frames}")
    return retro.w_edge


def scale_vector(retro: ReTRo, frames: int, latent_frames: int, anchors: Sequence[int] | None = None) -> np.ndarray:
    """The factors s of every latent frame; at the published widths symmetric in time if the keyframes are.

    Args:
      retro: settings.
      frames: pixel frames, at least 2.
      latent_frames: F of them, at least 2.
      anchors: token frames of the keyframes; None is the first and the last.

    Returns:
      float64 [F]; exactly 1 everywhere when s_edge and s_mid are.

    Raises:
      ValueError: w_edge outside 1 .. frames / 2, or fewer than two latent frames.
    """
    if latent_frames < 2:
        raise ValueError(f"frames {frames}: ReTRo needs at least two latent frames")
    ratio = round(edge_width(retro, frames) / frames, 6)  # to 6 decimals, as the released code does
    time = np.arange(latent_frames) / (latent_frames - 1)
    near = time[[0, -1] if anchors is None else list(anchors)]
    edge = ((time >= near[:, None] - ratio) & (time < near[:, None] + ratio)).any(0)
    # Smoothed as a share of the edge, so that s_edge = s_mid stays that number to the last bit.
    share = np.convolve(np.pad(edge.astype(np.float64), retro.smooth, mode="edge"), np.ones(2 * retro.smooth + 1),
                        mode="valid") / (2 * retro.smooth + 1)  # fmt: skip
    return retro.s_mid + (retro.s_edge - retro.s_mid) * share
