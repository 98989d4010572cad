"""Pytrees that travel between the parts of wanjax.

Axis letters, here and in every other module: B batch, T pixel frames, H W pixel height and width, F latent
frames, h w latent height and width, S video tokens (F * h/2 * w/2 for Wan2.1), K keys of one cross-attention
branch, N heads, D width, L layers, M images whose vision tokens the transformer sees, A anchors: keyframes that a
method anchors to. M and A differ: a model may see one image and still be given two keyframes in its latent.
"""

from flax import struct
from jax.typing import ArrayLike


@struct.dataclass
class Conditions:
    """All that the diffusion transformer is told besides the noisy latents and the time.

    Attributes:
      text: [B, text_length, text_dim] text encoder output, zero after the prompt's true length.
      images: [B, M, K, image_dim] vision tokens of the keyframes in order of time; None for a text-to-video model.
      latent: [B, F, h, w, temporal_stride + latent_channels] mask channels, then the normalised latent of
        the keyframe video; None for a text-to-video model.
    """

    text: ArrayLike
    images: ArrayLike | None = None
    latent: ArrayLike | None = None


@struct.dataclass
class Branches:
    """What each branch of cross-attention has: the text, and each of M images (None without any).

    Embedded conditions: text [B, K, D], images [B, M, K, D]. Keys or values: text [B, K, N, d], images
    [B, M, K, N, d]. Frame attention: text [B, F, K], images [B, F, M, K].
    """

    text: ArrayLike
    images: ArrayLike | None = None


@struct.dataclass
class CrossBias:
    """Additive bias on the scaled logits of cross-attention, one number per latent frame and key.

    The same for all heads and all queries of a frame (docs/method.md); -inf hides a key. Leaves are text [B, F, K] and
    images [B, F, M, K] where one layer is meant, with L in front where the whole model is; None adds nothing.
    """

    text: ArrayLike | None = None
    images: ArrayLike | None = None


@struct.dataclass
class CrossControl:
    """How one evaluation of the model changes its cross-attention (docs/method.md). All leaves are
    traced: other values do not recompile. `wanjax.method.arrays` makes it. KAB's strength, which differs from layer to
    layer and step to step, travels beside it.

    Attributes:
      anchors: int32 [A], token frames, ascending.
      curve: float32 [F, A], how much of each anchor's attention is in a frame's target; rows sum to 1.
      floor: float32 []; for KAB attention below it counts as it.
      isolated: bool [], whether the images have a softmax each instead of a joint one.
      weights: float32 [1 + M], of (text, image 1, ... image M) in the sum of isolated branches.
    """

    anchors: ArrayLike
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
