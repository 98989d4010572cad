"""Classifier-free guidance: velocity = unconditional + scale * (conditional - unconditional).

The two passes differ in the text alone; keyframes stay. Axis letters as in `types`.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from wanjax.types import Conditions

GuidanceMode = Literal["sequential", "batched"]
MODES: tuple[str, ...] = get_args(GuidanceMode)

Model = Callable[[jax.Array, jax.Array, Conditions], jax.Array]
"""(latents [B, F, h, w, C], timestep [B], conditions) -> velocity [B, F, h, w, C]."""


def guided(
    model: Model,
    conditions: Conditions,
    negative_text: ArrayLike,
    scale: ArrayLike,
    mode: GuidanceMode = "sequential",
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The model with guidance, as the sampler wants it: (latents, timestep []) -> velocity float32.

    Args:
      model: the conditional model.
      conditions: of the positive pass.
      negative_text: [B, L, text_dim], what replaces `conditions.text` in the other pass.
      scale: float32 [], traced; at exactly 1 the second pass is not run.
      mode: "sequential" runs the passes one after the other through one copy of the model (least memory);
        "batched" stacks them on the batch axis, positive first (fewer, larger products; the batch axis can
        be sharded).

    Raises:
      ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"guidance mode {mode!r}: choose one of {', '.join(MODES)}")
    scale = jnp.asarray(scale, jnp.float32)
    run = _sequential if mode == "sequential" else _batched

    def denoise(latents: jax.Array, timestep: jax.Array) -> jax.Array:
        timesteps = jnp.broadcast_to(timestep, latents.shape[:1]).astype(jnp.float32)
        return run(model, latents, timesteps, conditions, jnp.asarray(negative_text), scale)

    return denoise


def _sequential(model, latents, timesteps, conditions, negative_text, scale) -> jax.Array:
    """A loop whose length is traced: one pass at scale 1, else two, weighted scale and 1 - scale."""
    texts = jnp.stack([conditions.text, negative_text])
    weights = jnp.stack([scale, 1 - scale])

    def add_pass(index: jax.Array, velocity: jax.Array) -> jax.Array:
        one = model(latents, timesteps, conditions.replace(text=texts[index]))
        return velocity + weights[index] * one.astype(jnp.float32)

    passes = jnp.where(scale == 1, 1, 2)
    return lax.fori_loop(0, passes, add_pass, jnp.zeros(latents.shape, jnp.float32))


def _batched(model, latents, timesteps, conditions, negative_text, scale) -> jax.Array:
    def both() -> jax.Array:
        negative = conditions.replace(text=negative_text)
        twice = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), conditions, negative)
        out = model(jnp.concatenate([latents] * 2), jnp.concatenate([timesteps] * 2), twice)
        conditional, unconditional = jnp.split(out.astype(jnp.float32), 2)
        return unconditional + scale * (conditional - unconditional)

    def one() -> jax.Array:
        return model(latents, timesteps, conditions).astype(jnp.float32)

    return lax.cond(scale == 1, one, both)
