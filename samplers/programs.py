"""The programs of a run: each stage is one function of (config, params, arrays), and says whether its result is finite.

Jitted, a second run with other values compiles nothing. Axis letters as in `wanjax.types`; A keyframes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from samplers import sample
from samplers.jit import Program, jitted
from samplers.plan import Plan
from samplers.sample import Carry, Row
from samplers.streamed import Loop
from wanjax import conditioning, guidance, vae
from wanjax.clip import CLIPVision
from wanjax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from wanjax.dit import WanDiT
from wanjax.method import MethodArrays
from wanjax.types import Conditions, CrossBias
from wanjax.umt5 import UMT5Encoder


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
    def of(cls, plan: Plan, chunk: int = 1, platform: str | None = None) -> "Programs":
        """Jitted, for so many rows of the table in a call of `denoise`; the platform is the default device's."""
        c, s, jit = plan.config, plan.settings, partial(jitted, platform=platform or jax.default_backend())
        return cls(
            text=partial(jit(encode_text), c.umt5),
            images=partial(jit(encode_images), c.clip),
            keyframes=partial(jit(encode_keyframes), c.vae, at=plan.at, frames=s.frames),
            noise=partial(jit(noise), (1, *plan.latent_shape)),
            denoise=Loop.of(plan, chunk, jit)
            if c.dit.stream == "loop"
            else partial(jit(denoise), c.dit, n=chunk, guidance_mode=s.guidance_mode),
            decode=partial(jit(decode), c.vae),
        )


def evaluator(config: DiTConfig, params: Any, method: MethodArrays) -> guidance.Model:
    """The transformer under a method, as `guidance.guided` takes it."""

    def model(latents: jax.Array, timestep: jax.Array, conditions: Conditions, strength, bias) -> jax.Array:
        inputs = (latents, timestep, conditions, method.table, bias, method.control, strength)
        return WanDiT(config).apply({"params": params}, *inputs)

    return model


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
    guidance_mode: guidance.GuidanceMode,
) -> Carry:
    """`n` rows of a plan's table from row `first` on.

    Without control and strength no code of the methods is in it, without skip flags none of skipping.
    """
    model = evaluator(config, params, method)

    def denoise(latents: jax.Array, row: Row, state: Any) -> tuple[jax.Array, Any]:
        evaluate = guidance.skippable(model, conditions, negative_text, row.guidance, guidance_mode, cross_bias)
        skip = None if row.skip is None else guidance.Skip(row.skip, row.step.sigma, state)
        velocity, past = evaluate(latents, row.step.timestep, row.strength, skip)
        return velocity, state if skip is None else past

    return sample.sample(denoise, carry, table, first, n)


def state(plan: Plan, latents: jax.Array) -> guidance.Past | None:
    """What `denoise` keeps from step to step, before the first one (`Carry.state`)."""
    return None if plan.table.skip is None else guidance.Past.empty(latents)


def noise(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Standard normal latents float32 of a shape [1, F, h, w, C], from a seed uint32 []."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def _with_finite(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    return value, jnp.isfinite(value).all()


def encode_text(config: UMT5Config, params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Embeddings [B, K, D] of token ids and their mask int32 [B, K], zero after each text's end."""
    return _with_finite(conditioning.pad_text(UMT5Encoder(config).apply({"params": params}, ids, mask), mask))


def encode_images(config: CLIPConfig, params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vision tokens [B, K, D] of normalised images float32 [B, size, size, 3]."""
    return _with_finite(CLIPVision(config).apply({"params": params}, pixels))


def encode_keyframes(
    config: VAEConfig, params: Any, images: jax.Array, *, at: tuple[int, ...], frames: int
) -> tuple[jax.Array, jax.Array]:
    """Mask and latent [B, F, h, w, s + 16] of keyframes [B, A, H, W, 3] in [-1, 1]."""
    latent = vae.encode(config, params, conditioning.keyframe_video(images, at, frames))
    return _with_finite(conditioning.latent_condition(latent, conditioning.mask(frames, config.temporal_stride, at)))


def decode(config: VAEConfig, params: Any, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Video float32 [B, T, H, W, 3] in [-1, 1] of normalised latents [B, F, h, w, C]."""
    return _with_finite(vae.decode(config, params, latents))
