"""Wan2.1's video diffusion transformer (`wan/modules/model.py`), for FLF2V, I2V and T2V shapes.

Axis letters as in `types`. Blocks are stacked on a leading layer axis of their parameters and run by one `nn.scan`.
"""

import dataclasses
import math
from functools import partial

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from wanjax import rope, sharding
from wanjax.accepted import check_conditions, check_cross
from wanjax.attention import parallel
from wanjax.config import DiTConfig
from wanjax.cross import CrossReport, cross_attention
from wanjax.layers import TOKENS, Dense, LayerNorm, RMSNorm, constrain, layer_norm
from wanjax.layout import TokenLayout
from wanjax.precision import Precision
from wanjax.types import Branches, Conditions, CrossBias, CrossControl, RopeTable

IMAGE_EPS = 1e-5
"""Epsilon of the image embedder's norms; the rest of the model uses `DiTConfig.eps`."""


def sinusoid(timestep: jax.Array, width: int) -> jax.Array:
    """Sinusoidal features of a timestep in 0..1000, cosines before sines, base 10000.

    The original computes them in float64, for a plain float32 product `timestep * omega` is off by up to 6e-5
    radians. Here the integer part of the timestep times the leading 12 bits of omega is exact in float32, and
    the small remainder is added by the angle sum.

    Args:
      timestep: [B] float32.
      width: even.

    Returns:
      [B, width] float32.
    """
    omega = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width // 2))
    mantissa, exponent = np.frexp(omega)
    leading = np.ldexp(np.round(mantissa * 4096) / 4096, exponent)
    t = timestep.astype(jnp.float32)[:, None]
    whole = jnp.round(t)
    exact = whole * np.float32(leading)
    rest = whole * np.float32(omega - leading) + (t - whole) * np.float32(omega)
    cos = jnp.cos(exact) * jnp.cos(rest) - jnp.sin(exact) * jnp.sin(rest)
    sin = jnp.sin(exact) * jnp.cos(rest) + jnp.cos(exact) * jnp.sin(rest)
    return jnp.concatenate([cos, sin], -1)


def patchify(x: jax.Array, patch_size: tuple[int, int, int]) -> jax.Array:
    """[B, F, h, w, C] -> [B, S, pt * ph * pw * C], the channel fastest within a patch."""
    pt, ph, pw = patch_size
    pattern = "B (F pt) (h ph) (w pw) C -> B (F h w) (pt ph pw C)"
    return rearrange(x, pattern, pt=pt, ph=ph, pw=pw)


def unpatchify(x: jax.Array, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> jax.Array:
    """[B, S, pt * ph * pw * C] -> [B, F, h, w, C] for a token grid (frames, height, width)."""
    (pt, ph, pw), (frames, height, width) = patch_size, grid
    pattern = "B (F h w) (pt ph pw C) -> B (F pt) (h ph) (w pw) C"
    return rearrange(x, pattern, F=frames, h=height, w=width, pt=pt, ph=ph, pw=pw)


class SelfAttention(nn.Module):
    """Full attention over all video tokens, q and k normalised over the whole width, then rotated."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: jax.Array, table: RopeTable, layout: TokenLayout) -> jax.Array:
        c, p = self.config, self.config.precision
        q = RMSNorm(c.eps, name="norm_q")(Dense(c.dim, p, name="q")(x))
        k = RMSNorm(c.eps, name="norm_k")(Dense(c.dim, p, name="k")(x))
        v = Dense(c.dim, p, name="v")(x)
        q, k, v = (rearrange(a, "B S (N D) -> B S N D", N=c.num_heads) for a in (q, k, v))
        rotation = "pairs" if c.rotation == "auto" else c.rotation
        q, k = (rope.apply(a, table, rotation, p.compute) for a in (q, k))
        out = parallel.self_attention(q, k, v, layout.valid(), p, c.attention)
        return Dense(c.dim, p, name="o")(rearrange(out, "B S N D -> B S (N D)"))


class CrossAttention(nn.Module):
    """Attention to the text and to the images' vision tokens; k and v of all images have one set of weights."""

    config: DiTConfig
    inspect: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: Branches,
        bias: CrossBias | None,
        control: CrossControl | None,
        strength: jax.Array | None,
        layout: TokenLayout,
    ) -> tuple[jax.Array, CrossReport | None]:
        c, p = self.config, self.config.precision

        def heads(a: jax.Array) -> jax.Array:
            return rearrange(a, "... (N D) -> ... N D", N=c.num_heads)

        def columns(name: str, a: jax.Array) -> jax.Array:
            # Of the few tokens of a condition each device computes some columns: less travels than weights would.
            y = Dense(c.dim, p, name=name)(a)
            return constrain(y, *[None] * (a.ndim - 1), ("tensor", *TOKENS))

        def keys(a: jax.Array, suffix: str = "") -> jax.Array:
            return heads(RMSNorm(c.eps, name=f"norm_k{suffix}")(columns(f"k{suffix}", a)))

        def values(a: jax.Array, suffix: str = "") -> jax.Array:
            return heads(columns(f"v{suffix}", a))

        q = heads(RMSNorm(c.eps, name="norm_q")(Dense(c.dim, p, name="q")(x)))
        k, v = Branches(keys(context.text)), Branches(values(context.text))
        if context.images is not None:
            k = k.replace(images=keys(context.images, "_image"))
            v = v.replace(images=values(context.images, "_image"))
        out, seen = cross_attention(q, k, v, bias, control, strength, p, c.attention, self.inspect, layout)
        return Dense(c.dim, p, name="o")(rearrange(out, "B S N D -> B S (N D)")), seen


class Block(nn.Module):
    """One transformer block, in the form that `nn.scan` wants: (carry, inputs...) -> (carry, report or None)."""

    config: DiTConfig
    layout: TokenLayout
    inspect: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: CrossBias | None,
        strength: jax.Array | None,
        modulation: jax.Array,
        context: Branches,
        table: RopeTable,
        control: CrossControl | None,
    ) -> tuple[jax.Array, CrossReport | None]:
        c, p = self.config, self.config.precision
        stddev = 1 / math.sqrt(c.dim)
        own = self.param("modulation", nn.initializers.normal(stddev), (6, c.dim), jnp.float32)
        six = own + modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = (six[:, i, None] for i in range(6))

        def add(x: jax.Array, y: jax.Array) -> jax.Array:
            x = (x.astype(jnp.float32) + y).astype(jnp.dtype(p.residual))
            return constrain(x, "data", TOKENS, None)

        y = layer_norm(x, c.eps) * (1 + scale1) + shift1
        x = add(x, gate1 * SelfAttention(c, name="self_attn")(y, table, self.layout).astype(jnp.float32))
        y = LayerNorm(c.eps, name="cross_norm")(x)
        attend = CrossAttention(c, self.inspect, name="cross_attn")
        y, seen = attend(y, context, bias, control, strength, self.layout)
        x = add(x, y.astype(jnp.float32))
        y = layer_norm(x, c.eps) * (1 + scale2) + shift2
        y = nn.gelu(Dense(c.ffn_dim, p, name="ffn_in")(y), approximate=True)
        x = add(x, gate2 * Dense(c.dim, p, name="ffn_out")(y).astype(jnp.float32))
        return x, seen


class ImageEmbed(nn.Module):
    """Vision tokens [B, M, K, image_dim] to the model's width; FLF2V adds `position`, which tells first from last."""

    config: DiTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        c, p = self.config, self.config.precision.plain
        chex.assert_shape(images, (None, None, c.image_tokens, c.image_dim))
        tokens = images.astype(jnp.float32)
        if c.num_images == 2:
            shape = (2 * c.image_tokens, c.image_dim)
            position = self.param("position", nn.initializers.zeros, shape, jnp.dtype(p.param))
            tokens = tokens + position.astype(jnp.float32).reshape(2, *tokens.shape[2:])
        y = LayerNorm(IMAGE_EPS, name="norm_in")(tokens)
        y = nn.gelu(Dense(c.image_dim, p, name="in")(y), approximate=False)
        return LayerNorm(IMAGE_EPS, name="norm_out")(Dense(c.dim, p, name="out")(y))


@flax.struct.dataclass
class Embedded:
    """What the blocks are given, and pass on but for `x`.

    Attributes:
      x: [B, S', D] video tokens in the residual dtype, as the layout lays them.
      embedding, modulation: of the timestep, float32 [B, D] and [B, 6, D].
      context: conditions in the model's width.
      table: rotary factors, as the layout lays them.
    """

    x: jax.Array
    embedding: jax.Array
    modulation: jax.Array
    context: Branches
    table: RopeTable


class _Steps(nn.Module):
    """The three steps of an evaluation, over one tree of parameters.

    Attributes:
      config: sizes and precision policy.
      inspect: also gather the reports of cross-attention.
    """

    config: DiTConfig
    inspect: bool = False

    def _layout(self, grid: tuple[int, int, int]) -> TokenLayout:
        return parallel.layout(grid[0], math.prod(grid[1:]), self.config.attention)

    def _embed(self, latents: jax.Array, timestep: jax.Array, conditions: Conditions, table: RopeTable) -> Embedded:
        c, p = self.config, self.config.precision.plain  # blocks take their own
        grid = token_grid(c, latents.shape)
        if conditions.latent is not None:
            latents = jnp.concatenate([latents, conditions.latent.astype(latents.dtype)], -1)
        layout = self._layout(grid)
        patches = constrain(layout.lay(patchify(latents, c.patch_size)), "data", TOKENS, None)
        x = Dense(c.dim, p, name="patch_embed")(patches)
        x = constrain(x.astype(jnp.dtype(p.residual)), "data", TOKENS, None)
        table = jax.tree.map(lambda rows: constrain(layout.lay(rows[None])[0], TOKENS, None), table)
        embedding, modulation = self._embed_time(timestep)
        return Embedded(x, embedding, modulation, self._embed_conditions(conditions), table)

    def _embed_time(self, timestep: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B] -> embedding [B, D] and block modulation [B, 6, D], float32 under every policy."""
        c, p = self.config, _float32(self.config.precision)
        embedding = Dense(c.dim, p, name="time_in")(sinusoid(timestep, c.freq_dim))
        embedding = Dense(c.dim, p, name="time_out")(nn.silu(embedding))
        six = Dense(6 * c.dim, p, name="time_modulation")(nn.silu(embedding))
        return embedding, rearrange(six, "B (six D) -> B six D", six=6)

    def _embed_conditions(self, conditions: Conditions) -> Branches:
        c, p = self.config, self.config.precision.plain
        text = nn.gelu(Dense(c.dim, p, name="text_in")(conditions.text), approximate=True)
        text = Dense(c.dim, p, name="text_out")(text)
        if not c.num_images:
            return Branches(text)
        return Branches(text, ImageEmbed(c, name="image_embed")(conditions.images))

    def _blocks(
        self,
        embedded: Embedded,
        grid: tuple[int, int, int],
        cross_bias: CrossBias | None,
        control: CrossControl | None,
        strength: jax.Array | None,
        layers: int,
    ) -> tuple[jax.Array, CrossReport | None]:
        c = self.config
        policy = jax.checkpoint_policies.dots_saveable if c.remat_keeps == "products" else None
        block = nn.remat(Block, prevent_cse=False, policy=policy) if c.remat else Block
        if c.stream == "program" or not jax.sharding.get_abstract_mesh().empty:
            near = partial(sharding.near, stream=c.stream == "program")
            block = nn.map_variables(block, "params", near, init=self.is_initializing())
        axes = (0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast)
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=axes, length=layers)
        return scan(c, self._layout(grid), self.inspect, name="blocks")(
            embedded.x, cross_bias, strength, embedded.modulation, embedded.context, embedded.table, control
        )

    def _head(self, x: jax.Array, embedding: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
        c, p = self.config, self.config.precision
        init = nn.initializers.normal(1 / math.sqrt(c.dim))
        own = self.param("head_modulation", init, (2, c.dim), jnp.float32)
        shift, scale = jnp.split(own + embedding[:, None], 2, axis=1)
        x = layer_norm(x, c.eps) * (1 + scale) + shift
        features = math.prod(c.patch_size) * c.out_channels
        x = Dense(features, _float32(p), kernel_init=nn.initializers.zeros, name="head")(x)
        x = self._layout(grid).restore(constrain(x, "data", None, None))
        return unpatchify(x, grid, c.patch_size)


class WanDiT(_Steps):
    """The diffusion transformer: predicts the flow-matching velocity (noise - data) of latents.

    Attributes:
      config: sizes and precision policy.
      inspect: return (velocity, CrossReport with L in front) instead of the velocity; needs a control.
    """

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        timestep: jax.Array,
        conditions: Conditions,
        table: RopeTable,
        cross_bias: CrossBias | None = None,
        control: CrossControl | None = None,
        strength: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, CrossReport]:
        """One evaluation.

        Args:
          latents: [B, F, h, w, out_channels] noisy latents.
          timestep: [B] float32 in 0..1000 (1000 * sigma).
          conditions: see `Conditions`; text is [B, text_length, text_dim]. A model of two images has learnt which is
            first and which is last and takes those two; a model of one takes any number M >= 1.
          table: rotary factors of the token grid (F, h/2, w/2), from `rope.table`.
          cross_bias: a caller's additive cross-attention bias, text [L, B, F, K], images [L, B, F, M, K]; None adds
            nothing. Frames F are token frames.
          control: KAB and isolation, see `CrossControl`; None is plain Wan2.1. KAB's bias and the caller's are added.
          strength: KAB's, float32 [L, B, F], goes with a control; a layer of zeros computes no bias.

        Returns:
          [B, F, h, w, out_channels] float32 velocity.

        Raises:
          ValueError: conditions, bias, control or strength that are not this model's.
        """
        c, grid = self.config, token_grid(self.config, latents.shape)
        check_conditions(c, conditions, latents.shape)
        images = 0 if conditions.images is None else conditions.images.shape[1]
        check_cross(c, (latents.shape[0], grid[0]), cross_bias, control, strength, images)
        if self.inspect and control is None:
            raise ValueError("inspect: give a control too, such as that of wanjax.method.arrays(...)")
        embedded = self._embed(latents, timestep, conditions, table)
        x, seen = self._blocks(embedded, grid, cross_bias, control, strength, c.num_layers)
        velocity = self._head(x, embedded.embedding, grid)
        return (velocity, seen) if self.inspect else velocity


class Embed(_Steps):
    """The first step of an evaluation by itself, from the same parameters: what comes before the blocks."""

    @nn.compact
    def __call__(self, latents: jax.Array, timestep: jax.Array, conditions: Conditions, table: RopeTable) -> Embedded:
        """As `WanDiT`, of which it takes the first arguments."""
        check_conditions(self.config, conditions, latents.shape)
        return self._embed(latents, timestep, conditions, table)


class Blocks(_Steps):
    """Some consecutive blocks by themselves: parameters `blocks` with as many layers in front."""

    @nn.compact
    def __call__(
        self,
        embedded: Embedded,
        grid: tuple[int, int, int],
        layers: int,
        cross_bias: CrossBias | None = None,
        control: CrossControl | None = None,
        strength: jax.Array | None = None,
    ) -> jax.Array:
        """The tokens [B, S', D] after `layers` blocks.

        Args:
          embedded: by `Embed`, with the `x` that enters them.
          grid: of tokens, `token_grid`.
          others: as `WanDiT`, of these layers.
        """
        return self._blocks(embedded, grid, cross_bias, control, strength, layers)[0]


class Head(_Steps):
    """The last step by itself: tokens to velocity."""

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
        """[B, F, h, w, out_channels] float32 of the tokens that left the last block."""
        return self._head(x, embedding, grid)


def token_grid(config: DiTConfig, latents: tuple[int, ...]) -> tuple[int, int, int]:
    """(frames, height, width) in tokens of latents [B, F, h, w, C]."""
    return tuple(n // size for n, size in zip(latents[1:4], config.patch_size, strict=True))


def _float32(precision: Precision) -> Precision:
    """The policy of what stays float32, stored and computed: time embedding and head."""
    return dataclasses.replace(precision.plain, param="float32", compute="float32")
