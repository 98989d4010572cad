"""Causal video autoencoder of Wan2.1: encode and decode chunk by chunk in time, with an explicit cache.

Axis letters as in `types`; inside this file x is [B, T, H, W, C] at whatever resolution the level has. Every
module with a memory takes `(x, cache)` and returns `(x, cache)`. A cache is a nested dict, named like the
parameters, of the last input frames of each temporal convolution. None means the first chunk: it holds one
frame, sees zeros as its past and skips the temporal (de)convolutions of the resamplers. Later chunks hold
`temporal_stride` frames (encoder) or one latent frame (decoder).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from wanjax.attention import attention
from wanjax.config import VAEConfig
from wanjax.layers import Dense, conv3d, dot
from wanjax.pieces import check_video, decode_reach, encode_reach, run_chunks, windows_of
from wanjax.precision import Precision

Cache = dict[str, Any]
ALL, COARSE, FINE = "all", "coarse", "fine"
"""Parts of the encoder and the decoder: at the latents' resolution, with attention among all positions of a frame, and
above it, where everything is near."""

SAME_2D, NO_2D = ((1, 1), (1, 1)), ((0, 0), (0, 0))
STREAM = 2.0**-6
"""What the stream that blocks add to is scaled by in float16, so that it may reach four million: all that reads it is
linear, or a norm, which does not care."""


def _stream(precision: Precision) -> float:
    return STREAM if precision.residual == "float16" else 1.0


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    return x if scale == 1 else x * scale


def _part(cache: Cache | None, name: str) -> Any:
    """The named entry; every part of a first chunk is itself on its first chunk."""
    return None if cache is None else cache[name]


class Conv(nn.Module):
    """Convolution that looks only back in time; parameters `kernel` [kt, kh, kw, I, O] and `bias` [O].

    Attributes:
      kernel_size, strides: per (time, height, width).
      spatial_padding: zeros before and after, per (height, width).
      scale: of the bias; that of what goes in and comes out.
    The cache is its last `kt - time stride` input frames, in the compute dtype.
    """

    features: int
    config: VAEConfig
    kernel_size: tuple[int, int, int] = (3, 3, 3)
    strides: tuple[int, int, int] = (1, 1, 1)
    spatial_padding: tuple[tuple[int, int], tuple[int, int]] = SAME_2D
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, cache: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        precision = self.config.precision
        param, compute = jnp.dtype(precision.param), jnp.dtype(precision.compute)
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, param)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), param)
        x = x.astype(compute)
        past = self.kernel_size[0] - self.strides[0]
        if cache is None:
            cache = jnp.zeros((x.shape[0], past, *x.shape[2:]), compute)
        x = jnp.concatenate([cache, x], 1) if past else x
        padding = ((0, 0), *self.spatial_padding)
        y = conv3d(x, kernel, precision, self.strides, padding, self.config.conv3d)
        return y + _scaled(bias, self.scale).astype(compute), x[:, x.shape[1] - past :]


class SpatialConv(nn.Module):
    """3x3 convolution of every frame of the stream; parameters `kernel` [3, 3, I, O] and `bias` [O]."""

    features: int
    precision: Precision
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = SAME_2D

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        param = jnp.dtype(self.precision.param)
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, param)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), param)
        strides = (1, self.stride, self.stride)
        y = conv3d(x, kernel[None], self.precision, strides, ((0, 0), *self.padding))
        return y + _scaled(bias, _stream(self.precision)).astype(y.dtype)


class Linear(nn.Module):
    """A product at every position that gives the stream; parameters as `Dense` has them."""

    features: int
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        param = jnp.dtype(self.precision.param)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), param)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), param)
        y = dot(x, kernel, self.precision)
        return y + _scaled(bias, _stream(self.precision)).astype(y.dtype)


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels; parameter `gamma` [C]; float32 out."""

    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.precision.param))
        x = x.astype(jnp.float32)
        # |x| is kept from below at 1e-12; on its square, so that the gradient is finite at x = 0.
        square = jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24)
        return x * lax.rsqrt(square) * (x.shape[-1] ** 0.5 * gamma.astype(jnp.float32))


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the skip is projected where the width changes."""

    features: int
    config: VAEConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        precision, new = self.config.precision, {}
        residual, skip, scale = jnp.dtype(precision.residual), x, _stream(precision)
        if x.shape[-1] != self.features:
            skip = Linear(self.features, precision, name="shortcut")(x)
        for i in ("1", "2"):
            x = _scaled(nn.silu(ChannelNorm(precision, name=f"norm{i}")(x)), scale)
            conv = Conv(self.features, self.config, scale=scale, name=f"conv{i}")
            x, new[f"conv{i}"] = conv(x, _part(cache, f"conv{i}"))
        return x.astype(residual) + skip.astype(residual), new


class FrameAttention(nn.Module):
    """Single-head self-attention among the positions of one frame."""

    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, frames, height, width, dim = x.shape
        tokens = ChannelNorm(self.precision, name="norm")(x).reshape(batch * frames, height * width, 1, dim)
        q, k, v = jnp.split(Dense(3 * dim, self.precision, name="qkv")(tokens), 3, -1)
        # In blocks of queries where the logits are large; heads this wide have no fused kernel.
        y = attention(q, k, v, precision=self.precision)
        y = Linear(dim, self.precision, name="proj")(_scaled(y, _stream(self.precision))).reshape(x.shape)
        return x + y.astype(x.dtype)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        new, dim = {}, x.shape[-1]
        x, new["res_0"] = ResBlock(dim, self.config, name="res_0")(x, _part(cache, "res_0"))
        x = FrameAttention(self.config.precision, name="attention")(x)
        x, new["res_1"] = ResBlock(dim, self.config, name="res_1")(x, _part(cache, "res_1"))
        return x, new


class Downsample(nn.Module):
    """Halves height and width, then, if `temporal`, the number of frames; a first chunk keeps its frame."""

    config: VAEConfig
    temporal: bool

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        dim, residual = x.shape[-1], jnp.dtype(self.config.precision.residual)
        conv = SpatialConv(dim, self.config.precision, 2, ((0, 1), (0, 1)), name="spatial")
        x = conv(x)
        if not self.temporal:
            return x.astype(residual), {}
        if cache is None:
            return x.astype(residual), {"temporal": x[:, -1:]}
        scale = _stream(self.config.precision)
        x, last = Conv(dim, self.config, (3, 1, 1), (2, 1, 1), NO_2D, scale, name="temporal")(x, cache["temporal"])
        return x.astype(residual), {"temporal": last}


class Upsample(nn.Module):
    """If `temporal`, doubles the frames of all but a first chunk; then doubles height and width.

    The first chunk is no past to the temporal convolution: after it the cache holds zeros.
    """

    config: VAEConfig
    temporal: bool

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        batch, _, height, width, dim = x.shape
        precision, new = self.config.precision, {}
        if self.temporal and cache is None:
            new["temporal"] = jnp.zeros((batch, 2, height, width, dim), jnp.dtype(precision.compute))
        elif self.temporal:
            conv = Conv(2 * dim, self.config, (3, 1, 1), (1, 1, 1), NO_2D, _stream(precision), name="temporal")
            x, new["temporal"] = conv(x, cache["temporal"])
            x = jnp.moveaxis(x.reshape(batch, -1, height, width, 2, dim), 4, 2)  # [B, T, 2, H, W, C]
        x = x.reshape(batch, -1, height, 1, width, 1, dim)
        x = jnp.broadcast_to(x, (*x.shape[:3], 2, width, 2, dim))
        x = x.reshape(batch, -1, 2 * height, 2 * width, dim)
        x = SpatialConv(dim // 2, precision, name="spatial")(x)
        return x.astype(jnp.dtype(precision.residual)), new


class Level(nn.Module):
    """The residual blocks of one resolution and the way to the next.

    Attributes:
      blocks: number of residual blocks.
      resample: `Downsample`, `Upsample`, or None for the last level.
      temporal: whether the resampler changes the frame rate as well.
    """

    features: int
    config: VAEConfig
    blocks: int
    resample: type[Downsample] | type[Upsample] | None
    temporal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        new = {}
        for i in range(self.blocks):
            name = f"res_{i}"
            x, new[name] = ResBlock(self.features, self.config, name=name)(x, _part(cache, name))
        if self.resample is not None:
            resample = self.resample(self.config, self.temporal, name="resample")
            x, new["resample"] = resample(x, _part(cache, "resample"))
        return x, new


class Head(nn.Module):
    """Norm, SiLU and the last convolution."""

    features: int
    config: VAEConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        x = nn.silu(ChannelNorm(self.config.precision, name="norm")(x))
        x, last = Conv(self.features, self.config, name="conv")(x, _part(cache, "conv"))
        return x, {"conv": last}


def _conv_in(features: int, config: VAEConfig, x: jax.Array, cache: Cache | None) -> tuple[jax.Array, jax.Array]:
    """What begins the stream; to be called in a compact method."""
    scale = _stream(config.precision)
    x, last = Conv(features, config, scale=scale, name="conv_in")(_scaled(x, scale), _part(cache, "conv_in"))
    return x.astype(jnp.dtype(config.precision.residual)), last


class Encoder(nn.Module):
    """Video chunk to features of 2 * latent_channels; or its fine part, behind that its coarse one."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None, part: str = ALL) -> tuple[jax.Array, Cache]:
        c, new = self.config, {}
        if part != COARSE:
            x, new["conv_in"] = _conv_in(c.base_dim, c, x, cache)
        flags = (*c.temporal_downsample, None)
        for i, (mult, temporal) in enumerate(zip(c.dim_mult, flags, strict=True)):
            if part == (FINE if temporal is None else COARSE):
                continue
            resample = None if temporal is None else Downsample
            name = f"level_{i}"
            level = Level(c.base_dim * mult, c, c.num_res_blocks, resample, bool(temporal), name=name)
            x, new[name] = level(x, _part(cache, name))
        if part == FINE:
            return x, new
        x, new["middle"] = Middle(c, name="middle")(x, _part(cache, "middle"))
        x, new["head"] = Head(2 * c.latent_channels, c, name="head")(x, _part(cache, "head"))
        return x, new


class Decoder(nn.Module):
    """Latent chunk to video chunk; or its coarse part, behind that its fine one, from the first upsampling on."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None, part: str = ALL) -> tuple[jax.Array, Cache]:
        c, new = self.config, {}
        if part != FINE:
            x, new["conv_in"] = _conv_in(c.base_dim * c.dim_mult[-1], c, x, cache)
            x, new["middle"] = Middle(c, name="middle")(x, _part(cache, "middle"))
        flags = (*c.temporal_downsample[::-1], None)
        for i, (mult, temporal) in enumerate(zip(c.dim_mult[::-1], flags, strict=True)):
            resample = None if temporal is None else Upsample
            name, blocks = f"level_{i}", c.num_res_blocks + 1
            if i == 0 and part != ALL:
                blocks, resample = (0, resample) if part == FINE else (blocks, None)
            level = Level(c.base_dim * mult, c, blocks, resample, bool(temporal), name=name)
            x, new[name] = level(x, _part(cache, name))
            if part == COARSE:
                return x, new
        x, new["head"] = Head(3, c, name="head")(x, _part(cache, "head"))
        return x, new


class WanVAE(nn.Module):
    """The autoencoder; `encode_chunk` and `decode_chunk` are methods for `apply`."""

    config: VAEConfig

    def setup(self) -> None:
        c = self.config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant = Dense(2 * c.latent_channels, c.precision)
        self.post_quant = Dense(c.latent_channels, c.precision)

    def encode_chunk(self, video: jax.Array, cache: Cache | None, part: str = ALL) -> tuple[jax.Array, Cache]:
        """[B, 1 or temporal_stride, H, W, 3] -> ([B, 1, h, w, 2C] mean and log-variance, cache); between the fine and
        the coarse part of it [B, 1, h, w, width of the last level but one]."""
        x, cache = self.encoder(video, cache, part)
        return x if part == FINE else self.quant(x), cache

    def decode_chunk(self, latents: jax.Array, cache: Cache | None, part: str = ALL) -> tuple[jax.Array, Cache]:
        """[B, 1, h, w, C] raw latents -> ([B, 1 or temporal_stride, H, W, 3], cache); between the coarse and the fine
        part of it [B, 1, h, w, width of the last level]."""
        return self.decoder(latents if part == FINE else self.post_quant(latents), cache, part)

    def __call__(self, video: jax.Array) -> jax.Array:
        """Reconstructs two chunks, [B, 1 + temporal_stride, H, W, 3]: touches every parameter once."""
        out, encoder_cache, decoder_cache = [], None, None
        for chunk in (video[:, :1], video[:, 1:]):
            moments, encoder_cache = self.encode_chunk(chunk, encoder_cache)
            mean = moments[..., : self.config.latent_channels]
            frames, decoder_cache = self.decode_chunk(mean, decoder_cache)
            out.append(frames)
        return jnp.concatenate(out, 1)


def init(config: VAEConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters as a nested dict in `config.precision.param`; works under `jax.eval_shape`.

    A key of `impl="rbg"` compiles several times faster than the default one: there are 71 kernels to draw.
    """
    shape = (1, 1 + config.temporal_stride, config.spatial_stride, config.spatial_stride, 3)
    return jax.jit(lambda key: WanVAE(config).init(key, jnp.zeros(shape))["params"])(key)


def encode(config: VAEConfig, params: Any, video: jax.Array) -> jax.Array:
    """Normalised latent mean of a video; a pure function meant to run under `jax.jit`.

    Args:
      config: of the model.
      params: nested dict as from `init`.
      video: [B, T, H, W, 3] in [-1, 1]; T = n * temporal_stride + 1, H and W multiples of spatial_stride.

    Returns:
      (mean - latent_mean) / latent_std, [B, n + 1, h, w, C] float32.

    Raises:
      ValueError: a shape the model cannot take; names the nearest that it can.
    """
    check_video(config, video.shape)
    batch, frames, height, width, _ = video.shape
    chunk, stride, channels = config.temporal_stride, config.spatial_stride, config.latent_channels
    shift, scale = (jnp.asarray(x, jnp.float32) for x in (config.latent_mean, config.latent_std))
    apply = functools.partial(WanVAE(config).apply, {"params": params}, method="encode_chunk")

    def run(x: jax.Array, cache: Cache | None, part: str = ALL) -> tuple[jax.Array, Cache]:
        moments, cache = apply(x, cache, part=part)
        return (moments[..., :channels].astype(jnp.float32) - shift) / scale, cache

    grid = (height // stride, width // stride)
    out = jnp.zeros((batch, 1 + (frames - 1) // chunk, *grid, channels), jnp.float32)
    windows = windows_of(config, grid, encode_reach(config))
    if windows is None:
        return run_chunks(run, video, chunk, out, 1)

    def write(features: jax.Array, start: jax.Array) -> jax.Array:
        def fine(x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
            x, cache = apply(windows.cut(x, start, stride), cache, part=FINE)
            return windows.kept(x, start), cache

        return run_chunks(fine, video, chunk, features, 1, windows.corner(start))

    width = config.base_dim * (1, *config.dim_mult)[-2]
    features = jnp.zeros((*out.shape[:-1], width), jnp.dtype(config.precision.residual))
    return run_chunks(functools.partial(run, part=COARSE), windows.over(features, write), 1, out, 1)


def decode(config: VAEConfig, params: Any, latents: jax.Array) -> jax.Array:
    """Video of normalised latents; a pure function meant to run under `jax.jit`.

    Args:
      config: of the model.
      params: nested dict as from `init`.
      latents: [B, F, h, w, C], normalised as `encode` gives them.

    Returns:
      [B, (F - 1) * temporal_stride + 1, H, W, 3] float32, clipped to [-1, 1].

    Raises:
      ValueError: latents of another rank or number of channels, or without frames.
    """
    if latents.ndim != 5 or latents.shape[-1] != config.latent_channels or latents.shape[1] < 1:
        raise ValueError(f"latents: got shape {latents.shape}, give [B, F, h, w, {config.latent_channels}] with F >= 1")
    chunk, stride = config.temporal_stride, config.spatial_stride
    batch, frames, height, width, _ = latents.shape
    shift, scale = (jnp.asarray(x, jnp.float32) for x in (config.latent_mean, config.latent_std))
    apply = functools.partial(WanVAE(config).apply, {"params": params}, method="decode_chunk")

    def coarse(x: jax.Array, cache: Cache | None, part: str = COARSE) -> tuple[jax.Array, Cache]:
        return apply(x.astype(jnp.float32) * scale + shift, cache, part=part)

    def run(x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        x, cache = coarse(x, cache, ALL)
        return jnp.clip(x.astype(jnp.float32), -1, 1), cache

    out = jnp.zeros((batch, 1 + (frames - 1) * chunk, height * stride, width * stride, 3), jnp.float32)
    windows = windows_of(config, (height, width), decode_reach(config))
    if windows is None:
        return run_chunks(run, latents, 1, out, chunk)
    features = jnp.zeros((*latents.shape[:-1], config.dim_mult[-1] * config.base_dim),
                         jnp.dtype(config.precision.residual))  # fmt: skip
    features = run_chunks(coarse, latents, 1, features, 1)

    def write(out: jax.Array, start: jax.Array) -> jax.Array:
        def fine(x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
            x, cache = apply(windows.cut(x, start), cache, part=FINE)
            return jnp.clip(windows.kept(x, start, stride).astype(jnp.float32), -1, 1), cache

        return run_chunks(fine, features, 1, out, chunk, windows.corner(start, stride))

    return windows.over(out, write)
