"""Pytrees that travel between the parts of wanjax.

Axis letters, here and in every other module: B batch, T pixel frames, H W pixel height and width, F latent
frames, h w latent height and width, S video tokens (F * h/2 * w/2 for Wan2.1), K keys of one cross-attention
branch, N heads, D width, L layers.
"""

from flax import struct
from jax.typing import ArrayLike


@struct.dataclass
class Conditions:
    """All that the diffusion transformer is told besides the noisy latents and the time.

    Attributes:
      text: [B, text_length, text_dim] text encoder output, zero after the prompt's true length.
      first: [B, K, image_dim] vision tokens of the first keyframe, or None for a text-to-video model.
      last: [B, K, image_dim] vision tokens of the last keyframe, or None for a model that sees one image.
      latent: [B, F, h, w, temporal_stride + latent_channels] mask channels, then the normalised latent of
        the keyframe video; None for a text-to-video model.
    """

    text: ArrayLike
    first: ArrayLike | None = None
    last: ArrayLike | None = None
    latent: ArrayLike | None = None


@struct.dataclass
class Branches:
    """One array for each branch of cross-attention; None where a model lacks the branch.

    Keys or values are [B, K, N, head_dim], embedded conditions [B, K, D], frame attention [B, F, K].
    """

    text: ArrayLike
    first: ArrayLike | None = None
    last: ArrayLike | None = None


@struct.dataclass
class CrossBias:
    """Additive bias on the scaled logits of cross-attention, one number per latent frame and key.

    The same for all heads and all queries of a frame (METHOD: KAB). Leaves are [B, F, K] where one layer is
    meant and [L, B, F, K] where the whole model is; None leaves a branch unbiased.
    """

    text: ArrayLike | None = None
    first: ArrayLike | None = None
    last: ArrayLike | None = None


@struct.dataclass
class CrossControl:
    """How one evaluation of the model changes its cross-attention (METHOD: KAB, isolation). All leaves are
    traced: other values, or zeros, do not recompile. `wanjax.method.arrays(...).at(step)` makes it.

    Attributes:
      strength: float32 [L, B, F] (inside a block [B, F]), KAB's beta; where a layer has none but zeros it
        computes no bias.
      curve: float32 [F], KAB's tau: share of the last keyframe in a frame's target.
      floor: float32 [], KAB's epsilon: attention below it counts as it.
      isolated: bool [], whether the two keyframes have a softmax each instead of a joint one.
      weights: float32 [3], of (text, first, last) in the sum of isolated branches.
    """

    strength: ArrayLike
    curve: ArrayLike
    floor: ArrayLike
    isolated: ArrayLike
    weights: ArrayLike


@struct.dataclass
class RopeTable:
    """Rotary embedding factors of every video token.

    Attributes:
      cos: [S, head_dim/2] float32.
      sin: [S, head_dim/2] float32.
    """

    cos: ArrayLike
    sin: ArrayLike
