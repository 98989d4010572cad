"""What the DiT is told about the keyframes and the text: mask, conditioning latent, padded text.

Pure functions on arrays, for any temporal stride s and any pixel frame count T = s n + 1, which the VAE turns
into F = n + 1 latent frames. Axis letters: B batch, T pixel frames, F latent frames, H W pixels, h w latent
pixels, C = s + 16 condition channels, L text positions, D text width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.settings import check_frames, pixel_frames, refuse


def mask(frames: int, temporal_stride: int, at: Sequence[int] = (0, -1)) -> jax.Array:
    """Which pixel frames are given, folded into latent frames: float32 [F, temporal_stride].

    1 where a keyframe is given, 0 where the model has to invent. The first pixel frame is a latent frame of
    its own, so it fills all of that latent frame's channels; every later latent frame holds `temporal_stride`
    pixel frames in order, so the last keyframe is the last channel of the last latent frame alone.

    at: pixel frames of the keyframes, negative ones counted from the end.

    Raises ValueError when frames is not temporal_stride * n + 1 with n >= 1, or a place is outside or given twice.
    """
    check_frames(frames, temporal_stride)
    given = np.zeros(frames, np.float32)
    given[list(pixel_frames(at, frames))] = 1
    return jnp.asarray(np.concatenate([np.repeat(given[:1], temporal_stride), given[1:]]).reshape(-1, temporal_stride))


def keyframe_video(images: jax.Array, at: Sequence[int], frames: int) -> jax.Array:
    """The video the VAE encodes as conditioning: the keyframes at their places, mid-gray everywhere else.

    images: [B, A, H, W, 3] in [-1, 1]; at: pixel frames of the A of them, negative ones counted from the end.
    Returns [B, T, H, W, 3] in the dtype of `images`; gray is 0.0, the middle of the range.

    Raises ValueError when places and images differ in number, or a place is outside or given twice.
    """
    batch, count, *size = images.shape
    refuse((len(at) != count, f"{count} keyframes at {len(at)} places: give a place for each"))
    gray = jnp.zeros((batch, frames, *size), images.dtype)
    return gray.at[:, np.asarray(pixel_frames(at, frames), int)].set(images)


def latent_condition(latent: jax.Array, mask: jax.Array) -> jax.Array:
    """The channels that join the noisy latent at the DiT's input: mask first, then the conditioning latent.

    latent: [B, F, h, w, 16], the normalised latent of `keyframe_video`; mask: [F, s]. Returns
    [B, F, h, w, s + 16] in the latent's dtype.

    Raises ValueError when the two differ in the number of latent frames.
    """
    own, given = latent.shape[1], mask.shape[0]
    refuse((own != given, f"latent of {own} frames, mask of {given}: make both for the same frame count"))
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
