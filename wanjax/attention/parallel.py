"""Attention over the devices of a mesh; the only place with `shard_map`.

Video tokens lie on all devices of the mesh axes TOKENS (`layout`), heads on `tensor`, the batch on `data`.

- Self-attention needs all keys. Over `sequence`, devices swap tokens for heads (Ulysses, arXiv 2309.14509): an
  all-to-all gives each of them all tokens of its group and its share of the heads, another one undoes it. Over `fsdp`
  the keys and values of those heads are gathered. With one group no device ever holds more than its share.
- Cross-attention has few keys, whole on every device: each one attends from its own tokens.

Without a mesh both are the plain functions.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from wanjax.attention import attention, splash
from wanjax.layers import TOKENS, mesh_axes
from wanjax.layout import TokenLayout
from wanjax.precision import Precision

SUMMED = (*TOKENS, "tensor")
"""Axes over which the queries and heads of one sample lie."""


def layout(frames: int, queries: int, kernel: str) -> TokenLayout:
    """How F frames of Q tokens lie on the present mesh, for a kernel; plain without a mesh and without its blocks."""
    mesh = jax.sharding.get_abstract_mesh()
    groups, split = (1, 1) if mesh.empty else (dict(mesh.shape).get(axis, 1) for axis in TOKENS)
    # Of the keys of all devices, and the queries of one group, whole blocks.
    unit = splash.unit(kernel)
    return TokenLayout.of(frames, queries, groups * split, unit // math.gcd(unit, split))


def scaled(q: jax.Array, dtype: str) -> tuple[jax.Array, float]:
    """Queries [..., d] in the compute dtype, and what is left to scale their logits by.

    Float32 is divided by sqrt(d) before it is rounded, which costs nothing; what is rounded already is left alone.
    """
    scale = q.shape[-1] ** -0.5
    return ((q * scale).astype(dtype), 1.0) if q.dtype == jnp.float32 else (q.astype(dtype), scale)


def self_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: np.ndarray | None, precision: Precision, kernel: str
) -> jax.Array:
    """Attention of all tokens to all tokens.

    Args:
      q, k, v: [B, S, N, d], S as a `TokenLayout` lays it.
      valid: bool [S], which keys count; None counts all.
      precision, kernel: as `attention`.

    Returns:
      [B, S, N, d] in the compute dtype.

    Raises:
      ValueError: heads that `tensor` x `sequence` does not divide.
    """
    q, scale = scaled(q, precision.compute)
    k, v = (x.astype(precision.compute) for x in (k, v))  # before they travel
    attend = partial(attention, valid=valid, scale=scale, precision=precision, kernel=kernel)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q, k, v)
    groups, split = (dict(mesh.shape).get(axis, 1) for axis in TOKENS)
    heads = q.shape[2] // dict(mesh.shape).get("tensor", 1)
    if heads % split:
        raise ValueError(f"mesh sequence={split}: does not divide the {heads} heads of each device; "
                         f"give sequence={math.gcd(heads, split)}, and the rest to fsdp")  # fmt: skip

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if split > 1:
            q, k, v = (lax.all_to_all(x, "sequence", 2, 1, tiled=True) for x in (q, k, v))
        if groups > 1:
            k, v = (lax.all_gather(x, "fsdp", axis=1, tiled=True) for x in (k, v))
        out = attend(q, k, v)
        return lax.all_to_all(out, "sequence", 1, 2, tiled=True) if split > 1 else out

    spec = _spec(mesh, q, 1)
    return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def cross_attention(run: Callable[..., Any], q: jax.Array, keys: Any, values: Any, rows: Any, whole: Any) -> Any:
    """`run` on every device, for its own tokens, heads and samples.

    Args:
      run: (q, keys, values, rows, whole, part, axes) -> (out like q, pytree of leaves [B, ...] or None), where `part`
        is the device's number in TOKENS and `axes` what sums over tokens and heads go over.
      q: [B, S, N, d].
      keys, values: pytrees of [B, ..., K, N, d].
      rows: pytree of leaves [B, ...].
      whole: pytree that is the same for all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(q, keys, values, rows, whole, 0, ())
    sizes = dict(mesh.shape)
    axes = tuple(axis for axis in SUMMED if sizes.get(axis, 1) > 1)

    def local(q: jax.Array, keys: Any, values: Any, rows: Any, whole: Any) -> Any:
        part = 0
        for axis in TOKENS:
            part = part * sizes.get(axis, 1) + (lax.axis_index(axis) if sizes.get(axis, 1) > 1 else 0)
        return run(q, keys, values, rows, whole, part, axes)

    spec, batch = _spec(mesh, q, 1), P(mesh_axes(mesh, "data", q.shape[0]))
    heads = jax.tree.map(lambda x: _spec(mesh, x, None), (keys, values))
    specs = (spec, *heads, jax.tree.map(lambda _: batch, rows), jax.tree.map(lambda _: P(), whole))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(spec, batch), check_vma=False)(
        q, keys, values, rows, whole
    )


def _spec(mesh: AbstractMesh, x: jax.Array, tokens: int | None) -> P:
    """Of [B, ..., N, d]: batch over `data`, heads over `tensor`, the axis `tokens` over TOKENS."""
    axes = [None] * x.ndim
    axes[0], axes[-2] = mesh_axes(mesh, "data", x.shape[0]), mesh_axes(mesh, "tensor", x.shape[-2])
    if tokens is not None:
        axes[tokens] = mesh_axes(mesh, TOKENS, x.shape[tokens])
    return P(*axes)
