"""The programs of a run: each stage is one jitted function of (config, params, arrays).

So a second run with other values compiles nothing. Each says whether its result is finite. Axis letters as in
`wanjax.types`; A keyframes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from samplers import sample
from samplers.plan import Plan
from samplers.sample import Carry, Row
from wanjax import conditioning, vae
from wanjax.clip import CLIPVision
from wanjax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from wanjax.dit import WanDiT
from wanjax.guidance import GuidanceMode, guided
from wanjax.method import MethodArrays
from wanjax.types import Conditions, CrossBias
from wanjax.umt5 import UMT5Encoder

Program = Callable[..., Any]
"""From params and arrays to arrays."""


@dataclass(frozen=True)
class Programs:
    """The programs of one plan: `Programs.of` gives the jitted functions, `ahead` puts compiled ones in their place.

    Attributes:
      text, images, keyframes, decode: (params, array...) -> (value, whether it is finite).
      noise: (seed) -> latents of one clip.
      denoise: (params, carry, table, first row, conditions, negative text, method, bias) -> carry.
    """

    text: Program
    images: Program
    keyframes: Program
    noise: Program
    denoise: Program
    decode: Program

    @classmethod
    def of(cls, plan: Plan, chunk: int = 1) -> "Programs":
        """Jitted, for so many rows of the table in a call of `denoise`."""
        c, s = plan.config, plan.settings
        return cls(
            text=partial(encode_text, c.umt5),
            images=partial(encode_images, c.clip),
            keyframes=partial(encode_keyframes, c.vae, at=plan.at, frames=s.frames),
            noise=partial(noise, (1, *plan.latent_shape)),
            denoise=partial(denoise, c.dit, n=chunk, guidance_mode=s.guidance_mode),
            decode=partial(decode, c.vae),
        )


@partial(jax.jit, static_argnums=0, static_argnames=("guidance_mode", "n"))
def denoise(
    config: DiTConfig,
    params: Any,
    carry: Carry,
    table: Row,
    first: jax.Array,
    conditions: Conditions,
    negative_text: jax.Array,
    method: MethodArrays,
    cross_bias: CrossBias | None,
    *,
    n: int,
    guidance_mode: GuidanceMode,
) -> Carry:
    def model(latents: jax.Array, timestep: jax.Array, conditions: Conditions, control, bias) -> jax.Array:
        return WanDiT(config).apply({"params": params}, latents, timestep, conditions, method.table, bias, control)

    def denoise(latents: jax.Array, row: Row, state: Any) -> tuple[jax.Array, Any]:
        run = guided(model, conditions, negative_text, row.guidance, guidance_mode, method.control, cross_bias)
        return run(latents, row.step.timestep, row.strength), state

    return sample.sample(denoise, carry, table, first, n)


@partial(jax.jit, static_argnums=0)
def noise(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def _with_finite(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    return value, jnp.isfinite(value).all()


@partial(jax.jit, static_argnums=0)
def encode_text(config: UMT5Config, params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _with_finite(conditioning.pad_text(UMT5Encoder(config).apply({"params": params}, ids, mask), mask))


@partial(jax.jit, static_argnums=0)
def encode_images(config: CLIPConfig, params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _with_finite(CLIPVision(config).apply({"params": params}, pixels))


@partial(jax.jit, static_argnums=0, static_argnames=("at", "frames"))
def encode_keyframes(
    config: VAEConfig, params: Any, images: jax.Array, *, at: tuple[int, ...], frames: int
) -> tuple[jax.Array, jax.Array]:
    """Mask and latent [B, F, h, w, s + 16] of keyframes [B, A, H, W, 3] in [-1, 1]."""
    latent = vae.encode(config, params, conditioning.keyframe_video(images, at, frames))
    return _with_finite(conditioning.latent_condition(latent, conditioning.mask(frames, config.temporal_stride, at)))


@partial(jax.jit, static_argnums=0)
def decode(config: VAEConfig, params: Any, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _with_finite(vae.decode(config, params, latents))
