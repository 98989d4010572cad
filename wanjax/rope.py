"""Rotary position embedding over (frame, height, width), Wan2.1's `rope_params` and `rope_apply`."""

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.types import RopeTable


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Rotary pairs given to (frame, height, width): 22, 21, 21 for a head of 128."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def table(
    grid: tuple[int, int, int],
    head_dim: int,
    temporal_scale: np.ndarray | None = None,
    theta: float = 10000.0,
) -> RopeTable:
    """Rotary factors of a token grid, computed in float64 on the host and given to the model as an input.

    Args:
      grid: (frames, height, width) in tokens.
      head_dim: width of one attention head, even.
      temporal_scale: [frames] positive factors; frame i is rotated by `scale[i] * i * omega` in its
        temporal pairs (ReTRo, frequency form). None, or ones, changes nothing, bit for bit.
      theta: base of the frequencies; each axis uses its own width as the base dimension.

    Returns:
      RopeTable with cos, sin float32 [frames * height * width, head_dim / 2]; pairs ordered frame, height,
      width; tokens in row-major order of the grid.

    Raises:
      ValueError: temporal_scale of the wrong length, not finite, or not positive.
    """
    positions = [np.arange(n, dtype=np.float64) for n in grid]
    if temporal_scale is not None:
        scale = np.asarray(temporal_scale, np.float64)
        if scale.shape != (grid[0],):
            raise ValueError(f"temporal_scale has shape {scale.shape}; it needs one number for each of the "
                             f"{grid[0]} latent frames")  # fmt: skip
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError("temporal_scale must be finite and positive in every latent frame")
        positions[0] = positions[0] * scale
    angles = []
    for axis, (position, pairs) in enumerate(zip(positions, axis_pairs(head_dim), strict=True)):
        omega = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
        shape = [1, 1, 1, pairs]
        shape[axis] = grid[axis]
        angles.append(np.broadcast_to((position[:, None] * omega).reshape(shape), (*grid, pairs)))
    angle = np.concatenate(angles, -1).reshape(-1, head_dim // 2)
    return RopeTable(cos=np.cos(angle).astype(np.float32), sin=np.sin(angle).astype(np.float32))


def apply(x: jax.Array, rope: RopeTable) -> jax.Array:
    """Rotates interleaved pairs (0, 1), (2, 3), ... of x [B, S, N, head_dim] in float32; x's dtype out."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = jnp.asarray(rope.cos)[None, :, None], jnp.asarray(rope.sin)[None, :, None]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return rotated.reshape(x.shape).astype(x.dtype)
