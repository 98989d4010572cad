"""Attention by XLA's own products: all logits at once, or block by block of queries where they are large.

Every backend runs it; its memory is bounded. `logits`, `softmax` and `mix` are its three steps, for callers that need
what lies between.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from wanjax.precision import Precision

CHUNK_BYTES = 256 * 2**20
"""Logits larger than this are computed in blocks of queries."""

Residual: TypeAlias = tuple[jax.Array, jax.Array]
"""(max, log sum) float32 of a softmax: the largest logit m, and log(sum(exp(logits - m))).

Their sum is its log-sum-exp, but in one float32 number they would lose what differs between two softmaxes: at logits of
1e4 it has steps of 1e-3."""


def logits(q: jax.Array, k: jax.Array, scale: float, precision: Precision, kept: bool = False) -> jax.Array:
    """scale * q k^T: q [B, S, N, D], k [B, K, N, D] in the compute dtype -> [B, N, S, K] in the softmax dtype.

    Those that are `kept`, for more than one softmax, are in what the policy's products return, where that is less. They
    are summed in float32 either way.
    """
    narrow = kept and precision.product == "compute"
    out = jnp.dtype(precision.compute if narrow else "float32")
    product = jnp.einsum("BSND,BKND->BNSK", q, k, precision=precision.matmul, preferred_element_type=out)
    return product.astype(out if narrow else jnp.dtype(precision.softmax)) * scale


def softmax(logits: jax.Array) -> tuple[jax.Array, Residual]:
    """Probabilities over the last axis, in the dtype of the logits, and what they were divided by.

    Where every logit is -inf the probabilities are zero, the maximum is -inf and the log sum 0.
    """
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    # -inf - -inf is not a number; exp of -inf less any finite number is the zero that is meant.
    weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    residual = tuple(x[..., 0].astype(jnp.float32) for x in (top, total))
    return weights / total, (residual[0], jnp.log(residual[1]))


def mix(probabilities: jax.Array, v: jax.Array, precision: Precision) -> jax.Array:
    """Probabilities [B, N, S, K] times v [B, K, N, D], rounded to v's dtype before -> float32 [B, S, N, D]."""
    return jnp.einsum(
        "BNSK,BKND->BSND",
        probabilities.astype(v.dtype), v, precision=precision.matmul, preferred_element_type=jnp.float32,
    )  # fmt: skip


def attend(
    q, k, v, bias, valid, scale: float, precision: Precision, residual: bool
) -> tuple[jax.Array, Residual | None]:
    """The kernel "xla": whole up to CHUNK_BYTES of logits, in blocks above."""
    run = attend_in_chunks if _logit_bytes(q, k) > CHUNK_BYTES else _attend
    return run(q, k, v, bias, valid, scale, precision, residual)


def _attend(
    q, k, v, bias, valid, scale: float, precision: Precision, residual: bool
) -> tuple[jax.Array, Residual | None]:
    scores = logits(q, k, scale, precision)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    if valid is not None:
        scores = jnp.where(valid, scores, -jnp.inf)
    probabilities, found = softmax(scores)
    out = mix(probabilities, v, precision).astype(q.dtype)
    return out, tuple(jnp.moveaxis(x, 1, 2) for x in found) if residual else None


def attend_in_chunks(q, k, v, bias, valid, scale: float, precision: Precision, residual: bool):
    """The kernel "chunked": blocks of queries of at most CHUNK_BYTES of logits, one after the other."""
    length = q.shape[1]
    chunks = -(-_logit_bytes(q, k) // CHUNK_BYTES)
    size = -(-length // chunks)

    def blocks(x: jax.Array, axis: int) -> jax.Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, size * chunks - length)
        x = jnp.pad(x, pad)
        x = x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def whole(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], chunks * size, *x.shape[3:])[:, :length]

    rows = bias is not None and bias.ndim > 1 and bias.shape[-2] == length
    xs = (blocks(q, 1), blocks(bias, bias.ndim - 2) if rows else None)

    def block(x):
        q_block, bias_block = x
        return _attend(q_block, k, v, bias_block if rows else bias, valid, scale, precision, residual)

    return jax.tree.map(whole, lax.map(block, xs))


def _logit_bytes(q: jax.Array, k: jax.Array) -> int:
    return 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
