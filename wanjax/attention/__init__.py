"""Scaled dot-product attention with an additive bias: one function, kernels by name.

A kernel is a module of its own and one entry of KERNELS: `kernel(q, k, v, bias, valid, scale, precision, residual)`
takes q [B, S, N, D], k and v [B, K, N, D] in the compute dtype, a bias that broadcasts to [B, N, S, K] or None and
which keys count, bool [K] or None, and returns (out [B, S, N, D] in the compute dtype, the residual or None). What a
kernel cannot do it leaves to "xla".
"""

import math
from collections.abc import Callable
from functools import partial
from types import MappingProxyType

import chex
import jax
import jax.numpy as jnp
import numpy as np

from wanjax.attention import cudnn, splash, xla
from wanjax.attention.xla import Residual
from wanjax.precision import FLOAT32, Precision

__all__ = ["KERNELS", "Residual", "attention"]

KERNELS: MappingProxyType[str, Callable[..., tuple[jax.Array, Residual | None]]] = MappingProxyType(
    {"xla": xla.attend, "chunked": xla.attend_in_chunks, "cudnn": cudnn.attend, "splash": splash.attend}
    | {f"splash-{name}": partial(splash.attend, blocks=blocks) for name, blocks in splash.BLOCKS.items()}
)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    *,
    valid: np.ndarray | None = None,
    scale: float | None = None,
    precision: Precision = FLOAT32,
    kernel: str = "xla",
    residual: bool = False,
) -> jax.Array | tuple[jax.Array, Residual]:
    """softmax(scale * q k^T + bias) v.

    Args:
      q: [B, S, N, D].
      k, v: [B, K, N, D].
      bias: additive, on the scaled logits, broadcastable to [B, N, S, K]; None adds nothing. -inf hides a key; where
        all are hidden the output is zero.
      valid: bool [K], which keys count at all; None counts all. Cheaper than a bias: it is known while tracing.
      scale: default 1 / sqrt(D).
      precision: compute dtype of the products, softmax dtype of logits and probabilities.
      kernel: a name in KERNELS, or "auto", which is "xla" here (`ModelConfig.for_platform` resolves it).
      residual: also return the softmax's (max, log sum), see `xla.Residual`.

    Returns:
      [B, S, N, D] in the compute dtype; with `residual` (that, (max, log sum) float32 [B, S, N] each).

    Raises:
      ValueError: unknown kernel.
    """
    kernel = "xla" if kernel == "auto" else kernel
    if kernel not in KERNELS:
        raise ValueError(f"unknown attention kernel {kernel!r}: choose one of auto, {', '.join(KERNELS)}")
    chex.assert_rank([q, k, v], 4)
    chex.assert_equal_shape([k, v])
    chex.assert_equal_shape([q, k], dims=(0, 2, 3))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, k, v = (x.astype(jnp.dtype(precision.compute)) for x in (q, k, v))
    with jax.named_scope("attention_kernel"):  # tells profiles and compiled modules it from what is around it
        out, found = KERNELS[kernel](q, k, v, bias, valid, scale, precision, residual)
    return (out, found) if residual else out
