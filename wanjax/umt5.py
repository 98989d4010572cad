"""UMT5 text encoder: prompts' token ids to the text conditioning of the diffusion transformer.

Axis letters: B batch, L text tokens, N heads, D width. Differs from T5 in that every layer has its own
relative position bias. Facts: the UMT5 paper (arXiv:2304.09151) and T5 (arXiv:1910.10683).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from wanjax.attention import attention
from wanjax.config import UMT5Config
from wanjax.layers import Dense, RMSNorm


def position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of the distance from every query to every key (T5, bidirectional).

    Half of the buckets are for keys after the query. In each half, the first half holds one distance each and
    the rest grow logarithmically up to `max_distance`, beyond which all distances share the last one.

    Returns:
      [L query, L key] int32 in 0..num_buckets-1.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    distance = np.abs(offset)
    half = num_buckets // 2
    exact = half // 2
    # float32 as in the published model: it decides which side of a boundary a distance falls on.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    coarse = np.minimum(exact + ratio.astype(np.int64), half - 1)
    bucket = np.where(distance < exact, distance, coarse)
    return (bucket + half * (offset > 0)).astype(np.int32)


class UMT5Attention(nn.Module):
    """Self-attention with unscaled logits and this layer's position bias `position_bias` [buckets, N]."""

    config: UMT5Config

    @nn.compact
    def __call__(self, x: jax.Array, buckets: jax.Array, padding: jax.Array) -> jax.Array:
        """x [B, L, D], buckets [L, L] int32, padding [B, 1, 1, L] float32 -> [B, L, D]."""
        config = self.config
        precision = config.precision
        heads = (*x.shape[:-1], config.num_heads, config.head_dim)
        width = config.num_heads * config.head_dim
        q, k, v = (Dense(width, precision, use_bias=False, name=n)(x).reshape(heads) for n in "qkv")
        table = self.param(
            "position_bias",
            nn.initializers.normal(config.dim**-0.5),
            (config.num_buckets, config.num_heads),
            jnp.dtype(precision.param),
        )
        bias = jnp.moveaxis(table.astype(jnp.float32)[buckets], -1, 0)[None] + padding
        out = attention(q, k, v, bias, scale=1.0, precision=precision)
        return Dense(config.dim, precision, use_bias=False, name="o")(out.reshape(*x.shape[:-1], width))


class UMT5Block(nn.Module):
    """Pre-norm block: attention, then a gated tanh-GELU feed-forward."""

    config: UMT5Config

    @nn.compact
    def __call__(self, x: jax.Array, buckets: jax.Array, padding: jax.Array) -> tuple[jax.Array, None]:
        """x [B, L, D] in the residual dtype -> the same, and no scan output."""
        config = self.config
        precision = config.precision
        y = RMSNorm(config.eps, name="attn_norm")(x)
        x = x + UMT5Attention(config, name="attn")(y, buckets, padding).astype(x.dtype)
        y = RMSNorm(config.eps, name="ffn_norm")(x)
        gate = Dense(config.ffn_dim, precision, use_bias=False, name="ffn_gate")(y)
        value = Dense(config.ffn_dim, precision, use_bias=False, name="ffn_in")(y)
        y = nn.gelu(gate, approximate=True) * value
        return x + Dense(config.dim, precision, use_bias=False, name="ffn_out")(y).astype(x.dtype), None


class UMT5Encoder(nn.Module):
    """The text encoder. UMT5-XXL has 5,680,910,336 parameters.

    Parameters: `token_embed` [vocab, D], `blocks/...` with a leading layer axis, `final_norm`.
    """

    config: UMT5Config

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes padded prompts.

        Args:
          ids: [B, L] int32 token ids; must lie in the vocabulary (out-of-range ids cannot be noticed here).
          mask: [B, L], nonzero at tokens, 0 at padding. Padding is never attended to.

        Returns:
          [B, L, D] in the residual dtype. Positions of padding hold numbers without meaning.

        Raises:
          ValueError: ids and mask are not two equal [B, L] shapes.
        """
        config = self.config
        precision = config.precision
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise ValueError(f"umt5: ids {ids.shape} and mask {mask.shape} must both be [batch, length]")
        table = self.param(
            "token_embed",
            nn.initializers.normal(1.0),
            (config.vocab_size, config.dim),
            jnp.dtype(precision.param),
        )
        x = table[ids].astype(jnp.dtype(precision.residual))
        # Finite, so that padding alone gives numbers too; another dtype's limit would round to inf.
        lowest = float(jnp.finfo(precision.softmax).min)
        padding = jnp.where(mask[:, None, None, :] != 0, 0.0, lowest).astype(jnp.float32)
        buckets = jnp.asarray(position_buckets(ids.shape[1], config.num_buckets, config.max_distance))
        blocks = nn.scan(
            UMT5Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
        )
        x, _ = blocks(config, name="blocks")(x, buckets, padding)
        return RMSNorm(config.eps, name="final_norm")(x).astype(x.dtype)
