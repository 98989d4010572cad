"""Classifier-free guidance: velocity = unconditional + scale * (conditional - unconditional).

The two passes differ in the text, and in the attention biases, which the conditional pass alone gets (docs/method.md);
keyframes, isolation and the rotary table are the same for both. Axis letters as in `types`.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from wanjax.types import Conditions, CrossBias

GuidanceMode = Literal["sequential", "batched"]
MODES: tuple[str, ...] = get_args(GuidanceMode)

Model = Callable[[jax.Array, jax.Array, Conditions, jax.Array | None, CrossBias | None], jax.Array]
"""(latents [B, F, h, w, C], timestep [B], conditions, KAB's strength [L, B, F], bias) -> velocity [B, F, h, w, C]."""


def guided(
    model: Model,
    conditions: Conditions,
    negative_text: ArrayLike,
    scale: ArrayLike,
    mode: GuidanceMode = "sequential",
    cross_bias: CrossBias | None = None,
) -> Callable[..., jax.Array]:
    """The model with guidance: (latents, timestep [], strength [L, F]) -> velocity float32.

    In "batched" mode KAB's work is done for both halves of the batch, to no effect in the second.

    Args:
      model: the conditional model.
      conditions: of the positive pass.
      negative_text: [B, L, text_dim], what replaces `conditions.text` in the other pass.
      scale: float32 [], traced; at exactly 1 the second pass is not run.
      mode: "sequential" runs the passes one after the other through one copy of the model (least memory);
        "batched" stacks them on the batch axis, positive first (fewer, larger products; the batch axis can
        be sharded).
      cross_bias: a caller's, leaves [layers, B, F, K]. The unconditional pass gets zeros of it.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"guidance mode {mode!r}: choose one of {', '.join(MODES)}")
    scale = jnp.asarray(scale, jnp.float32)
    run = _sequential if mode == "sequential" else _batched

    def denoise(latents: jax.Array, timestep: jax.Array, strength: jax.Array | None = None) -> jax.Array:
        batch = latents.shape[0]
        timesteps = jnp.broadcast_to(timestep, (batch,)).astype(jnp.float32)
        if strength is not None:
            layers, frames = strength.shape
            strength = jnp.broadcast_to(strength[:, None], (layers, batch, frames))
        own = strength, cross_bias
        return run(model, latents, timesteps, conditions, jnp.asarray(negative_text), scale, own)

    return denoise


def _sequential(model, latents, timesteps, conditions, negative_text, scale, own) -> jax.Array:
    """A loop whose length is traced: one pass at scale 1, else two, weighted scale and 1 - scale."""
    texts = jnp.stack([conditions.text, negative_text])
    weights = jnp.stack([scale, 1 - scale])

    def add_pass(index: jax.Array, velocity: jax.Array) -> jax.Array:
        def conditional_only(leaf: jax.Array) -> jax.Array:
            return jnp.where(index == 0, leaf, 0)  # not a product: a bias may be -inf

        told = conditions.replace(text=texts[index])
        one = model(latents, timesteps, told, *jax.tree.map(conditional_only, own))
        return velocity + weights[index] * one.astype(jnp.float32)

    passes = jnp.where(scale == 1, 1, 2)
    return lax.fori_loop(0, passes, add_pass, jnp.zeros(latents.shape, jnp.float32))


def _batched(model, latents, timesteps, conditions, negative_text, scale, own) -> jax.Array:
    def with_zeros(leaf: jax.Array) -> jax.Array:
        return jnp.concatenate([leaf, jnp.zeros_like(leaf)], 1)  # [layers, 2B, ...]

    def both() -> jax.Array:
        negative = conditions.replace(text=negative_text)
        twice = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), conditions, negative)
        pair = (jnp.concatenate([x] * 2) for x in (latents, timesteps))
        out = model(*pair, twice, *jax.tree.map(with_zeros, own))
        conditional, unconditional = jnp.split(out.astype(jnp.float32), 2)
        return unconditional + scale * (conditional - unconditional)

    def one() -> jax.Array:
        return model(latents, timesteps, conditions, *own).astype(jnp.float32)

    return lax.cond(scale == 1, one, both)
