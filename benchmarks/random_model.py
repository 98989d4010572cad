"""Random weights and inputs of any size, made on the device in the dtype they are kept in.

No host copy and no float32 copy exists at any time: stacked weights are drawn layer by layer.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from wanjax.config import DiTConfig
from wanjax.types import Conditions

POOL = 1_048_583
"""Length of the pool of random numbers; a prime, so that no width of a matrix divides it."""


def count(shapes: Any) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def params(shapes: Any, seed: int = 0) -> Any:
    """Random parameters on the default device.

    Kernels keep the variance of their inputs (8-bit ones roughly), scales are near 1, the rest is small. Zeros would
    be unfair to measure with: products of them draw less power and run faster. The numbers are windows of one pool of
    normal ones, for a random generator per parameter takes XLA most of a minute to compile.

    Args:
      shapes: tree of `jax.ShapeDtypeStruct`, of `wanjax.shapes`.
    """
    flat = flatten_dict(shapes, sep="/")
    starts = np.random.default_rng(seed).integers(POOL, size=(len(flat), _layers(shapes)), dtype=np.int32)

    @jax.jit
    def draw(key: jax.Array, starts: jax.Array) -> Any:
        pool = jax.random.normal(key, (POOL,))
        return {path: _leaf(path, leaf, pool, start) for (path, leaf), start in zip(flat.items(), starts, strict=True)}

    return unflatten_dict(draw(jax.random.key(seed), starts), sep="/")


def _layers(shapes: Any) -> int:
    stacked = jax.tree.leaves(shapes.get("blocks", {}))
    return stacked[0].shape[0] if stacked else 1


def _leaf(path: str, leaf: jax.ShapeDtypeStruct, pool: jax.Array, starts: jax.Array) -> jax.Array:
    stacked = path.startswith("blocks/")
    shape = leaf.shape[1:] if stacked else leaf.shape
    name, size = path.rsplit("/", 1)[-1], math.prod(shape)
    spread = 32.0 if leaf.dtype.itemsize == 1 else 1 / math.sqrt(math.prod(shape[:-1]))
    offset, scale = {"kernel": (0.0, spread), "factor": (5e-4, 5e-6), "scale": (1.0, 0.1),
                     "gamma": (1.0, 0.1)}.get(name, (0.0, 0.1))  # fmt: skip
    values = jnp.clip(offset + scale * pool, -127, 127).astype(leaf.dtype)

    def one(start: jax.Array) -> jax.Array:
        window = jnp.roll(values, start)
        return jnp.tile(window, -(-size // POOL))[:size].reshape(shape)

    return lax.map(one, starts) if stacked else one(starts[0])


def inputs(
    config: DiTConfig, grid: tuple[int, int, int], batch: int, seed: int
) -> tuple[np.ndarray, Conditions, np.ndarray]:
    """Random inputs of the transformer for latents (F, h, w).

    Returns:
      latents [B, F, h, w, out_channels], conditions, and the text [B, L, text_dim] of the unguided pass;
      float32, on the host.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    text = (batch, config.text_length, config.text_dim)
    images = (batch, config.num_images, config.image_tokens, config.image_dim)
    channels = config.condition_channels
    conditions = Conditions(
        normal(*text),
        normal(*images) if config.num_images else None,
        normal(batch, *grid, channels) if channels else None,
    )
    return normal(batch, *grid, config.out_channels), conditions, normal(*text)
