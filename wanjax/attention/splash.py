"""The fused attention of TPUs: jax's own splash kernel (`jax.experimental.pallas.ops.tpu.splash_attention`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.attention import xla
from wanjax.precision import Precision

BLOCK = 1024
"""Most queries, and most keys, of one block where nothing else is said: what fits every generation."""
LANES = 128


@dataclass(frozen=True)
class Blocks:
    """Most queries and keys that are in VMEM at once, and most keys that are multiplied at once."""

    queries: int
    keys: int
    compute: int


BLOCKS: Mapping[str, Blocks] = MappingProxyType(
    {
        "v5e": Blocks(1024, 1024, 512),
        "v5p": Blocks(1024, 1024, 512),
        "v6e": Blocks(2048, 2048, 1024),
        "tpu7x": Blocks(2048, 2048, 1024),
    }
)
"""By generation, as `config` names kernels ("splash-v6e"); docs/accelerators.md has the reasons."""


def attend(
    q,
    k,
    v,
    bias,
    valid: np.ndarray | None,
    scale: float,
    precision: Precision,
    residual: bool,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, xla.Residual | None]:
    """The kernel "splash", or with `blocks` that of a generation; the log sum of its residual holds the whole
    log-sum-exp beside a maximum of 0.

    Lengths and widths that its blocks and lanes do not divide are padded, padded keys hidden by segment ids. Left to
    "xla" are biases, and float32, whose products the kernel would round. It computes logits and softmax in float32.
    It runs on TPUs, or anywhere under `jax.experimental.pallas.tpu.force_tpu_interpret_mode`.
    """
    if bias is not None or precision.compute == "float32":
        return xla.attend(q, k, v, bias, valid, scale, precision, residual)
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    queries, keys, width = q.shape[1], k.shape[1], q.shape[-1]
    blocks = blocks or Blocks(BLOCK, BLOCK, BLOCK // 2)
    block_q, block_k = block(queries, blocks.queries), block(keys, blocks.keys)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel has no scale
    q, k, v = (_pad(x, size) for x, size in ((q, block_q), (k, block_k), (v, block_k)))
    counts = np.pad(np.ones(keys, bool) if valid is None else valid, (0, k.shape[1] - keys))
    segments = splash.SegmentIds(np.zeros(q.shape[1], np.int32), np.where(counts, 0, 1).astype(np.int32))
    compute = block_k // 2 if block_k % (2 * LANES) == 0 and block_k > blocks.compute else block_k
    batch, _, heads, _ = q.shape
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((q.shape[1], k.shape[1]))] * (batch * heads)),
        block_sizes=splash.BlockSizes(block_q, block_k, compute), head_shards=1, q_seq_shards=1,
        save_residuals=residual,
    )  # fmt: skip
    rows = (jnp.moveaxis(x, 1, 2).reshape(batch * heads, -1, x.shape[-1]) for x in (q, k, v))
    found = kernel(*rows, None if counts.all() else segments)
    out, log_sum_exp = (found[0], found[1][0]) if residual else (found, None)
    out = jnp.moveaxis(out.reshape(batch, heads, *out.shape[1:]), 1, 2)[:, :queries, :, :width]
    if not residual:
        return out, None
    log_sum_exp = jnp.moveaxis(log_sum_exp.reshape(batch, heads, -1), 1, 2)[:, :queries].astype(jnp.float32)
    return out, (jnp.zeros_like(log_sum_exp), log_sum_exp)


def block(length: int, most: int | None = None) -> int:
    """The multiple of LANES, at most `most` (BLOCK), that costs least: of padding, and of loading, which each block
    does as for LANES more rows."""
    sizes = range(LANES, (most or BLOCK) + 1, LANES)
    return min(sizes, key=lambda size: -(-length // size) * (size + LANES))


def unit(kernel: str) -> int:
    """What a kernel wants the tokens of a video padded to multiples of; 1 of kernels that are not these."""
    name, _, generation = kernel.partition("-")
    if name != "splash":
        return 1
    return max(BLOCKS[generation].queries, BLOCKS[generation].keys) if generation else BLOCK


def _pad(x: jax.Array, size: int) -> jax.Array:
    """[B, S, N, D] to multiples of the block and of the lanes."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, -x.shape[3] % LANES)))
