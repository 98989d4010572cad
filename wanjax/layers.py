"""Small layers shared by the models.

Axis letters as in `types`. Every norm computes in float32 and returns float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from wanjax.precision import Precision

Initializer = Callable[..., jax.Array]


def dot(x: jax.Array, kernel: jax.Array, precision: Precision, factor: jax.Array | None = None) -> jax.Array:
    """x [..., I] @ kernel [I, O] -> [..., O] in the compute dtype; times factor [1, O] where one is given."""
    dtype = jnp.dtype(precision.compute)
    out = None if precision.product == "compute" else jnp.float32
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    y = lax.dot_general(
        x.astype(dtype), kernel.astype(dtype), dims, precision=precision.matmul, preferred_element_type=out
    )
    if factor is not None:  # on the product: on the kernel it would make a float32 one
        y = y.astype(jnp.float32) * factor[0]
    return y.astype(dtype)


class Dense(nn.Module):
    """Linear layer: parameters `kernel` [I, O] and `bias` [O]; output in the compute dtype.

    Under `Precision.kernel` the kernel is 8-bit codes, with a parameter `factor` [1, O] float32 beside it. Both come
    from `quantise`: fresh ones are zeros and ones.
    """

    features: int
    precision: Precision
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        param, eight = jnp.dtype(self.precision.param), self.precision.kernel
        init = nn.initializers.zeros if eight else self.kernel_init
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.dtype(eight or param))
        factor = self.param("factor", nn.initializers.ones, (1, self.features), jnp.float32) if eight else None
        y = dot(x, kernel, self.precision, factor)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), param)
            y = y + bias.astype(y.dtype)
        return y


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis without affine part; float32 out."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


def rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis; float32 out."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


class LayerNorm(nn.Module):
    """LayerNorm with parameters `scale` and `bias` [D], float32 under every policy; float32 out."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return layer_norm(x, self.eps) * scale + bias


class RMSNorm(nn.Module):
    """RMSNorm with parameter `scale` [D], float32 under every policy; float32 out."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.eps) * self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)


def conv3d(
    x: jax.Array,
    kernel: jax.Array,
    precision: Precision,
    strides: Sequence[int] = (1, 1, 1),
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0), (0, 0)),
    form: str = "auto",
) -> jax.Array:
    """3D convolution, channels last.

    Args:
      x: [B, T, H, W, I].
      kernel: [kt, kh, kw, I, O].
      strides, padding: per (time, height, width).
      form: "conv3d", "taps" (a sum of 2D convolutions over the temporal taps), or "auto", which is "conv3d" here
        (`ModelConfig.for_platform` resolves it). A kernel of one tap is a 2D convolution in every form.

    Returns:
      [B, T', H', W', O] in the compute dtype.
    """
    dtype = jnp.dtype(precision.compute)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if kernel.shape[0] == 1 or form == "taps":
        return _conv3d_by_taps(x, kernel, precision, strides, padding)
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), precision=precision.matmul
    )


def _conv3d_by_taps(
    x: jax.Array,
    kernel: jax.Array,
    precision: Precision,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """A sum over temporal taps of 2D convolutions with time folded into the batch."""
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    batch, taps, step = x.shape[0], kernel.shape[0], strides[0]
    frames = (x.shape[1] - taps) // step + 1
    total = None
    for tap in range(taps):
        if total is not None:  # one copy of the frames at a time
            x, total = lax.optimization_barrier((x, total))
        frame = x[:, tap : tap + (frames - 1) * step + 1 : step]
        y = lax.conv_general_dilated(
            frame.reshape(batch * frames, *x.shape[2:]), kernel[tap], strides[1:], padding[1:],
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision.matmul,
        )  # fmt: skip
        total = y if total is None else total + y
    return total.reshape(batch, frames, *total.shape[1:])


TOKENS = ("fsdp", "sequence")
"""Mesh axes over which video tokens, rows of pixels and weights are split: all devices of both."""


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Asks for x to be sharded over named mesh axes; does nothing outside `jax.set_mesh`.

    Axes that the present mesh lacks, or that are longer than the dimension, are left out, so that models can
    name all of theirs. A dimension that an axis does not divide is split unevenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    present = [mesh_axes(mesh, axis, n, uneven=True) for n, axis in zip(x.shape, axes, strict=True)]
    return lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*present))


def mesh_axes(mesh: Any, axes: str | tuple[str, ...] | None, n: int, uneven: bool = False) -> Any:
    """`axes` as an entry of a PartitionSpec for a dimension of n, or None where the mesh lacks or n does not allow it.

    Args:
      mesh: `jax.sharding.Mesh` or an abstract one.
      uneven: n need not be a multiple of the devices, only as many.
    """
    if axes is None:
        return None
    sizes = dict(mesh.shape)
    present = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if sizes.get(axis, 1) > 1)
    devices = math.prod(sizes[axis] for axis in present)
    if not present or devices > n or (n % devices and not uneven):
        return None
    return present[0] if len(present) == 1 else present
