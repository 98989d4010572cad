"""Scaled dot-product attention with an additive bias, in three implementations with the same numbers.

"xla" holds all logits; "chunked" goes over blocks of queries, so that its memory is bounded on every backend;
"cudnn" is the fused kernel of NVIDIA GPUs (bfloat16 or float16).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from wanjax.config import FLOAT32, Precision

CHUNK_BYTES = 256 * 2**20
"""Logits larger than this are computed in blocks of queries."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    *,
    scale: float | None = None,
    precision: Precision = FLOAT32,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(scale * q k^T + bias) v.

    Args:
      q: [B, S, N, head_dim].
      k, v: [B, K, N, head_dim].
      bias: additive, on the scaled logits, broadcastable to [B, N, S, K]; None adds nothing.
      scale: default 1 / sqrt(head_dim).
      precision: compute dtype of the products, softmax dtype of logits and probabilities.
      implementation: "auto", "xla", "chunked" or "cudnn".

    Returns:
      [B, S, N, head_dim] in the compute dtype.

    Raises:
      ValueError: unknown implementation.
    """
    if implementation == "auto":
        implementation = _choose(q, k, bias, precision)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dtype = jnp.dtype(precision.compute)
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    if implementation == "xla":
        return _attend(q, k, v, bias, scale, precision)
    if implementation == "chunked":
        return _attend_in_chunks(q, k, v, bias, scale, precision)
    if implementation == "cudnn":
        bias = None if bias is None else bias.astype(dtype)
        return jax.nn.dot_product_attention(q, k, v, bias, scale=scale, implementation="cudnn")
    raise ValueError(f"unknown attention implementation {implementation!r}: choose auto, xla, chunked, cudnn")


def _choose(q: jax.Array, k: jax.Array, bias: jax.Array | None, precision: Precision) -> str:
    half = precision.compute in ("bfloat16", "float16")
    # cuDNN wants head widths that are multiples of 8 up to 128, and refuses biases that broadcast over queries.
    # Its partitioning rule refuses queries that are sharded along the sequence.
    fused = half and bias is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and not _sequence_parallel()
    if jax.default_backend() == "gpu" and fused:
        return "cudnn"
    return "chunked" if _logit_bytes(q, k) > CHUNK_BYTES else "xla"


def _sequence_parallel() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and dict(mesh.shape).get("sequence", 1) > 1


def _logit_bytes(q: jax.Array, k: jax.Array) -> int:
    return 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]


def _attend(q, k, v, bias, scale: float, precision: Precision) -> jax.Array:
    softmax = jnp.dtype(precision.softmax)
    logits = jnp.einsum("BSND,BKND->BNSK", q, k, precision=precision.matmul, preferred_element_type=jnp.float32)
    logits = logits.astype(softmax) * scale
    if bias is not None:
        logits = logits + bias.astype(softmax)
    probabilities = jax.nn.softmax(logits, -1).astype(q.dtype)
    out = jnp.einsum(
        "BNSK,BKND->BSND", probabilities, v, precision=precision.matmul, preferred_element_type=jnp.float32
    )
    return out.astype(q.dtype)


def _attend_in_chunks(q, k, v, bias, scale: float, precision: Precision) -> jax.Array:
    batch, length, heads, width = q.shape
    chunks = -(-_logit_bytes(q, k) // CHUNK_BYTES)
    size = -(-length // chunks)
    padded = size * chunks

    def blocks(x: jax.Array, axis: int) -> jax.Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, padded - length)
        x = jnp.pad(x, pad)
        x = x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    rows = bias is not None and bias.ndim > 1 and bias.shape[-2] == length
    xs = (blocks(q, 1), blocks(bias, bias.ndim - 2) if rows else None)

    def block(x):
        q_block, bias_block = x
        return _attend(q_block, k, v, bias_block if rows else bias, scale, precision)

    out = lax.map(block, xs)
    return jnp.moveaxis(out, 0, 1).reshape(batch, padded, heads, width)[:, :length]
