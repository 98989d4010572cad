"""What the DiT is told about the keyframes and the text: mask, conditioning latent, padded text.

Pure functions on arrays, for any temporal stride s and any pixel frame count T = s n + 1, which the VAE turns
into F = n + 1 latent frames. Axis letters: B batch, T pixel frames, F latent frames, H W pixels, h w latent
pixels, C = s + 16 condition channels, L text positions, D text width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.keyframes import check_frames


def mask(frames: int, temporal_stride: int, first: bool = True, last: bool = True) -> jax.Array:
    """Which pixel frames are given, folded into latent frames: float32 [F, temporal_stride].

    1 where a keyframe is given, 0 where the model has to invent. The first pixel frame is a latent frame of
    its own, so it fills all of that latent frame's channels; every later latent frame holds `temporal_stride`
    pixel frames in order, so the last keyframe is the last channel of the last latent frame alone.

    Raises ValueError when frames is not temporal_stride * n + 1 with n >= 1.
    """
    check_frames(frames, temporal_stride)
    folded = np.zeros(((frames - 1) // temporal_stride + 1, temporal_stride), np.float32)
    folded[0] = first
    folded[-1, -1] = last
    return jnp.asarray(folded)


def pixel_condition(first: jax.Array, last: jax.Array | None, frames: int) -> jax.Array:
    """The video the VAE encodes as conditioning: the keyframes with mid-gray between them.

    first, last: [B, H, W, 3] in [-1, 1]; last is None for image-to-video. Returns [B, T, H, W, 3] in the
    dtype of `first`; the frames between are 0.0, the middle of the range.

    Raises ValueError when the keyframes differ in shape or do not fit into `frames`.
    """
    if last is not None and last.shape != first.shape:
        raise ValueError(f"keyframes of shapes {first.shape} and {last.shape}: fit both to the same height and width")
    given = [first] if last is None else [first, last]
    if frames < len(given):
        raise ValueError(f"frames {frames}: {len(given)} keyframes need at least {len(given)} frames")
    batch, height, width, channels = first.shape
    gray = jnp.zeros((batch, frames - len(given), height, width, channels), first.dtype)
    parts = [first[:, None], gray] + [frame[:, None].astype(first.dtype) for frame in given[1:]]
    return jnp.concatenate(parts, axis=1)


def latent_condition(latent: jax.Array, mask: jax.Array) -> jax.Array:
    """The channels that join the noisy latent at the DiT's input: mask first, then the conditioning latent.

    latent: [B, F, h, w, 16], the normalised latent of `pixel_condition`; mask: [F, s]. Returns
    [B, F, h, w, s + 16] in the latent's dtype.

    Raises ValueError when the two differ in the number of latent frames.
    """
    if latent.shape[1] != mask.shape[0]:
        raise ValueError(
            f"latent of {latent.shape[1]} frames, mask of {mask.shape[0]}: make both for the same frame count"
        )
    channels = jnp.broadcast_to(mask[None, :, None, None, :], (*latent.shape[:-1], mask.shape[-1]))
    return jnp.concatenate([channels.astype(latent.dtype), latent], axis=-1)


def pad_text(embeddings: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """Zeroes the text encoder's output after each prompt's true length: [B, L, D] to [B, L, D].

    attention_mask: [B, L], 1 for the prompt's tokens (closing token included), then 0. The DiT attends to the
    padding, and was trained with exact zeros there, so the encoder's output for it has to go. A selection and
    not a product: whatever stands in the padding, NaN included, is dropped.
    """
    length = jnp.sum(attention_mask.astype(jnp.int32), axis=-1, keepdims=True)
    inside = jnp.arange(embeddings.shape[1]) < length
    return jnp.where(inside[..., None], embeddings, jnp.zeros((), embeddings.dtype))
