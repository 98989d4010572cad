"""CLIP vision tower: keyframes to the image conditioning of the diffusion transformer.

Axis letters: B batch, K tokens (class token, then patches row by row), N heads, D width. Only the blocks
whose output Wan2.1 reads are here: all but the last, and no final norm. Facts: CLIP (arXiv:2103.00020).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from wanjax.attention import attention
from wanjax.config import CLIPConfig
from wanjax.layers import Dense, LayerNorm


class CLIPAttention(nn.Module):
    """Self-attention with biases in all four projections."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, K, D] -> [B, K, D]."""
        config = self.config
        q, k, v = (Dense(config.dim, config.precision, name=n)(x) for n in "qkv")
        q, k, v = (rearrange(y, "B K (N d) -> B K N d", N=config.num_heads) for y in (q, k, v))
        out = attention(q, k, v, precision=config.precision)
        return Dense(config.dim, config.precision, name="o")(rearrange(out, "B K N d -> B K (N d)"))


class CLIPBlock(nn.Module):
    """Pre-norm block: attention, then an exact-GELU feed-forward."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """x [B, K, D] in the residual dtype -> the same, and no scan output."""
        config = self.config
        precision = config.precision
        y = LayerNorm(config.eps, name="attn_norm")(x)
        x = x + CLIPAttention(config, name="attn")(y).astype(x.dtype)
        y = LayerNorm(config.eps, name="ffn_norm")(x)
        y = nn.gelu(Dense(config.ffn_dim, precision, name="ffn_in")(y), approximate=False)
        return x + Dense(config.dim, precision, name="ffn_out")(y).astype(x.dtype), None


class CLIPVision(nn.Module):
    """The vision tower. The used part of ViT-H/14 has 611,086,080 of the published
    630,766,080 parameters.

    Parameters: `patch_embed/kernel` [patch * patch * 3, D], `class_embed` [D], `position_embed` [K, D],
    `pre_norm`, `blocks/...` with a leading layer axis.
    """

    config: CLIPConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encodes images.

        Args:
          pixels: [B, image_size, image_size, 3] float32, normalised by CLIP's mean and standard deviation.

        Returns:
          [B, K, D] in the residual dtype: the output of the last used block, class token first.

        Raises:
          ValueError: another image size or channel count.
        """
        config = self.config
        precision = config.precision
        size = config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"clip: pixels {pixels.shape} must be [batch, {size}, {size}, 3]")
        param, residual = jnp.dtype(precision.param), jnp.dtype(precision.residual)
        patch = config.patch_size
        patches = rearrange(pixels, "B (h p) (w q) C -> B (h w) (p q C)", p=patch, q=patch)
        x = Dense(config.dim, precision, use_bias=False, name="patch_embed")(patches).astype(residual)
        init = nn.initializers.normal(config.dim**-0.5)
        first = self.param("class_embed", init, (config.dim,), param)
        position = self.param("position_embed", init, (config.num_tokens, config.dim), param)
        first = jnp.broadcast_to(first.astype(residual), (x.shape[0], 1, config.dim))
        x = jnp.concatenate([first, x], 1) + position.astype(residual)
        x = LayerNorm(config.eps, name="pre_norm")(x).astype(residual)
        blocks = nn.scan(CLIPBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.num_layers)
        return blocks(config, name="blocks")(x, None)[0]
