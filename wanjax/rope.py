"""Rotary position embedding over (frame, height, width), Wan2.1's `rope_params` and `rope_apply`."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.settings import one_of
from wanjax.types import RopeTable

Mode = Literal["frequency", "magnitude", "position"]
MODES: tuple[str, ...] = get_args(Mode)
ROTATIONS = ("pairs", "product")


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Rotary pairs given to (frame, height, width): 22, 21, 21 for a head of 128."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def table(
    grid: tuple[int, int, int],
    head_dim: int,
    temporal_scale: np.ndarray | None = None,
    mode: Mode = "frequency",
    theta: float = 10000.0,
) -> RopeTable:
    """Rotary factors of a token grid, computed in float64 on the host and given to the model as an input.

    Args:
      grid: (frames, height, width) in tokens.
      head_dim: width of one attention head, even.
      temporal_scale: s [frames], positive factors of the temporal pairs (ReTRo). None, or ones, changes
        nothing, bit for bit, in every mode.
      mode: what they do to the factor exp(1j * i * omega) of frame i. "frequency": the angle becomes
        s[i] * i * omega. "magnitude": the whole factor is multiplied by s[i], angles stay, so the temporal
        part of a logit between frames i and j gains s[i] * s[j]. "position": i becomes p[i], the integral of
        s from the first frame (trapezoids), scaled so that the last frame keeps its place.
      theta: base of the frequencies; each axis uses its own width as the base dimension.

    Returns:
      RopeTable with cos, sin float32 [frames * height * width, head_dim / 2]; pairs ordered frame, height,
      width; tokens in row-major order of the grid.

    Raises:
      ValueError: temporal_scale of the wrong length, not finite, or not positive; unknown mode.
    """
    positions = [np.arange(n, dtype=np.float64) for n in grid]
    scale = np.ones(grid[0]) if temporal_scale is None else np.asarray(temporal_scale, np.float64)
    _check_scale(scale, grid[0], mode)
    if mode == "frequency":
        positions[0] = positions[0] * scale
    if mode == "position" and grid[0] > 1:
        positions[0] = warped(scale)
    angles = []
    for axis, (position, pairs) in enumerate(zip(positions, axis_pairs(head_dim), strict=True)):
        omega = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
        shape = [1, 1, 1, pairs]
        shape[axis] = grid[axis]
        angles.append(np.broadcast_to((position[:, None] * omega).reshape(shape), (*grid, pairs)))
    angle = np.concatenate(angles, -1)
    factor = np.ones_like(angle)
    if mode == "magnitude":
        factor[..., : axis_pairs(head_dim)[0]] = scale[:, None, None, None]
    rows = [(factor * wave(angle)).reshape(-1, head_dim // 2).astype(np.float32) for wave in (np.cos, np.sin)]
    return RopeTable(cos=rows[0], sin=rows[1])


def _check_scale(scale: np.ndarray, frames: int, mode: str) -> None:
    one_of("temporal rope mode", mode, MODES)
    if scale.shape != (frames,):
        raise ValueError(f"temporal_scale has shape {scale.shape}; it needs one number for each of the "
                         f"{frames} latent frames")  # fmt: skip
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("temporal_scale must be finite and positive in every latent frame")


def warped(scale: np.ndarray) -> np.ndarray:
    """Positions whose speed is `scale` [F], from 0 to F - 1; exactly 0, 1, ..., F - 1 for equal speeds of 1."""
    moved = np.concatenate([[0.0], np.cumsum((scale[1:] + scale[:-1]) / 2)])
    return moved * ((len(scale) - 1) / moved[-1])


def apply(x: jax.Array, rope: RopeTable, rotation: str = "pairs", dtype: str = "float32") -> jax.Array:
    """Rotates the pairs (0, 1), (2, 3), ... of every head; float32 out.

    Args:
      x: [B, S, N, head_dim].
      rope: rows of the S tokens.
      rotation: "pairs" takes them apart and puts them together again. "product" swaps partners by a product with a
        matrix of 0, 1 and -1, which is exact: on a TPU, whose layouts end in 128 lanes, projection, norm and rotation
        of a query take 0.49 ms of cycles that way, 1.71 with pairs, and 0.98 where the weights' columns are permuted
        so that halves are rotated (v6e, 4352 tokens, compiled, not run).
      dtype: to which x is rounded before, as Wan2.1 does.

    Raises:
      ValueError: unknown rotation.
    """
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation {rotation!r}: choose auto, {', '.join(ROTATIONS)}")
    cos, sin = (jnp.asarray(rows)[None, :, None] for rows in (rope.cos, rope.sin))
    x = x.astype(jnp.dtype(dtype))
    if rotation == "product":
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        partner = jnp.einsum("BSND,DE->BSNE", x, _swap(x.shape[-1]).astype(x.dtype), precision=precision)
        cos, sin = (jnp.repeat(rows, 2, -1) for rows in (cos, sin))
        return x.astype(jnp.float32) * cos + partner.astype(jnp.float32) * sin
    # XLA would take the rounding for an excess and keep a query in float32 between its norm and its rotation.
    x = x if dtype == "float32" else jax.lax.optimization_barrier(x)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return rotated.reshape(x.shape)


def _swap(width: int) -> np.ndarray:
    """[width, width]: x @ it has -x[1], x[0], -x[3], x[2], ..."""
    matrix = np.zeros((width, width), np.float32)
    even = np.arange(0, width, 2)
    matrix[even + 1, even], matrix[even, even + 1] = -1, 1
    return matrix
