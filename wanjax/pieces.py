"""Videos piece by piece: in time by chunks with a memory, in space by windows that overlap.

Lengths of windows are in latents, of which each stands for `spatial_stride` pixels. Axis letters as in `types`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wanjax.config import VAEConfig
from wanjax.layers import constrain

PICTURE = (None, None, "rows", "columns", None)
"""Mesh axes of [B, T, H, W, C], see `sharding.picture_mesh`."""


def decode_reach(config: VAEConfig) -> int:
    """How many latents away a pixel sees what goes into the decoder's first upsampling.

    A residual block has two convolutions of one position each way, an upsampling one convolution at the finer
    resolution, where a coarse position is two.
    """
    reach = 1  # the head
    for _ in config.dim_mult[1:]:
        reach += 2 * (config.num_res_blocks + 1) + 1
        reach = -(-reach // 2)
    return reach


def encode_reach(config: VAEConfig) -> int:
    """How many latents beyond its own pixels what comes out of the encoder's last downsampling sees.

    A downsampling sees one position more behind, none before: the way behind is the longer one.
    """
    reach = 0
    for _ in config.dim_mult[1:]:
        reach = 2 * reach + 1 + 2 * config.num_res_blocks
    reach += 1  # the first convolution
    return -(-reach // config.spatial_stride)


@dataclass(frozen=True)
class Windows:
    """Windows of equal size along the longer side of a picture, one after the other.

    They lie within the picture, so that its borders are theirs; each begins 2 * reach before the end of the one before,
    and what is written of it is all but its first `reach` (of the first window, all but its last): the part of a
    window that its other end spoils is written over by the next one.

    Attributes:
      axis: of [B, T, H, W, C].
      size: of a window.
      starts: of each.
      reach: how far a position sees.
    """

    axis: int
    size: int
    starts: tuple[int, ...]
    reach: int

    @classmethod
    def of(cls, grid: tuple[int, int], tiles: int, reach: int) -> "Windows | None":
        """Cuts a picture of (h, w) latents into `tiles` windows, as small as they can be; None is the picture whole.

        A picture of at most 2 * reach + 1 latents across is not cut, and no more windows are made than it has latents
        beyond 2 * reach.
        """
        length, around = max(grid), 2 * reach
        if tiles == 1 or length <= around + 1:
            return None
        size = -(-(length + (tiles - 1) * around) // tiles)
        count = -(-(length - around) // (size - around))
        starts = tuple(min(i * (size - around), length - size) for i in range(count))
        return cls(3 if grid[1] == length else 2, size, starts, reach)

    def cut(self, x: jax.Array, start: jax.Array, stride: int = 1) -> jax.Array:
        """The window that starts there, of x with `stride` positions a latent."""
        return lax.dynamic_slice_in_dim(x, start * stride, self.size * stride, self.axis)

    def kept(self, x: jax.Array, start: jax.Array, stride: int = 1) -> jax.Array:
        """What is written of a window's result."""
        size = (self.size - self.reach) * stride
        return lax.dynamic_slice_in_dim(x, self._skipped(start) * stride, size, self.axis)

    def corner(self, start: jax.Array, stride: int = 1) -> tuple[jax.Array | int, jax.Array | int]:
        """(row, column) where it goes."""
        place = (start + self._skipped(start)) * stride
        return (place, 0) if self.axis == 2 else (0, place)

    def _skipped(self, start: jax.Array) -> jax.Array:
        return jnp.where(start == 0, 0, self.reach)

    def over(self, out: jax.Array, write: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        """`write(out, start)` -> out, for each window in turn."""
        starts = np.asarray(self.starts, np.int32)
        return lax.scan(lambda out, start: (write(out, start), None), out, starts)[0]


def windows_of(config: VAEConfig, grid: tuple[int, int], reach: int) -> Windows | None:
    """As the config wants them; devices that share the picture have small parts of it already, which are not cut."""
    mesh = jax.sharding.get_abstract_mesh()
    shared = not mesh.empty and any(dict(mesh.shape).get(axis, 1) > 1 for axis in PICTURE if axis)
    return None if shared else Windows.of(grid, config.tiles, reach)


def run_chunks(
    run: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    size_in: int,
    out: jax.Array,
    size_out: int,
    corner: tuple[Any, Any] = (0, 0),
) -> jax.Array:
    """Runs `run(chunk, cache)` over time: one frame first, then `size_in` frames to `size_out` at a time.

    Chunks are cut from x and written into `out` in place, from (row, column) `corner` on, which the loop carries beside
    the cache: stacked scan inputs and outputs would each cost a transposed copy of the whole video.
    """

    def run_split(chunk: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Pictures over the devices; convolutions swap the borders of neighbours."""
        y, cache = run(constrain(chunk, *PICTURE), cache)
        return constrain(y, *PICTURE), cache

    def put(out: jax.Array, y: jax.Array, frame: jax.Array | int) -> jax.Array:
        return lax.dynamic_update_slice(out, y, (0, frame, *corner, 0))

    first, cache = run_split(x[:, :1], None)
    out = put(out, first, 0)
    later = (x.shape[1] - 1) // size_in
    if later == 0:
        return out

    def step(carry: tuple[Any, jax.Array], index: jax.Array) -> tuple[tuple[Any, jax.Array], None]:
        cache, out = carry
        chunk = lax.dynamic_slice_in_dim(x, 1 + index * size_in, size_in, 1)
        y, cache = run_split(chunk, cache)
        return (cache, put(out, y, 1 + index * size_out)), None

    (_, out), _ = lax.scan(step, (cache, out), jnp.arange(later))
    return out


def check_video(config: VAEConfig, shape: tuple[int, ...]) -> None:
    """Raises ValueError, with the nearest numbers that it can take, for a video that the encoder cannot."""
    if len(shape) != 5 or shape[-1] != 3:
        raise ValueError(f"video: got shape {shape}, give [B, T, H, W, 3]")
    frames, step = shape[1], config.temporal_stride
    if frames < 1 or (frames - 1) % step:
        below = max(1, (frames - 1) // step * step + 1)
        raise ValueError(f"video: {frames} frames are not a multiple of {step} plus 1; use {below} or {below + step}")
    stride = config.spatial_stride
    if shape[2] % stride or shape[3] % stride or 0 in shape:
        raise ValueError(f"video: {shape[2]}x{shape[3]} pixels are not multiples of {stride}")
