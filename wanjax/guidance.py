"""Classifier-free guidance: velocity = unconditional + scale * (conditional - unconditional).

The two passes differ in the text, and in the attention biases, which the conditional pass alone gets (docs/method.md);
keyframes, isolation and the rotary table are the same for both. A pass may be skipped: its velocity is then guessed
from its last two. Axis letters as in `types`.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.typing import ArrayLike

from wanjax.settings import one_of
from wanjax.types import Conditions, CrossBias

GuidanceMode = Literal["sequential", "batched"]
MODES: tuple[str, ...] = get_args(GuidanceMode)

Model = Callable[[jax.Array, jax.Array, Conditions, jax.Array | None, CrossBias | None], jax.Array]
"""(latents [B, F, h, w, C], timestep [B], conditions, KAB's strength [L, B, F], bias) -> velocity [B, F, h, w, C]."""


CONDITIONAL, UNCONDITIONAL = 0, 1
"""The passes' places on the leading axis of a `Past` and of skip flags."""


@struct.dataclass
class Past:
    """The last two velocities that the model gave in each pass, and where.

    Attributes:
      last, before: float32 [2, B, F, h, w, C], by pass.
      last_sigma, before_sigma: float32 [2], noise levels at which they were evaluated.
    """

    last: jax.Array
    before: jax.Array
    last_sigma: jax.Array
    before_sigma: jax.Array

    @classmethod
    def empty(cls, latents: jax.Array) -> "Past":
        """Of a run that has evaluated nothing, beside latents, whose placement it takes; a guess from it is finite."""
        none = jnp.stack([jnp.zeros_like(latents, jnp.float32)] * 2)
        return cls(none, none, jnp.zeros(2, jnp.float32), jnp.ones(2, jnp.float32))

    def guess(self, index: ArrayLike, sigma: ArrayLike) -> jax.Array:
        """The velocity of a pass at a noise level, float32 [B, F, h, w, C], on the line through its last two; the last
        where both were at one level."""
        last, before, s1, s0 = (lax.dynamic_index_in_dim(leaf, index, keepdims=False)
                                for leaf in (self.last, self.before, self.last_sigma, self.before_sigma))  # fmt: skip
        return last + (sigma - s1) / jnp.where(s1 == s0, jnp.inf, s1 - s0) * (last - before)

    def after(self, index: ArrayLike, velocity: jax.Array, sigma: ArrayLike) -> "Past":
        """With the velocity that the model gave in a pass at a noise level."""

        def put(stack: jax.Array, leaf: ArrayLike) -> jax.Array:
            return lax.dynamic_update_index_in_dim(stack, leaf, index, 0)

        def old(stack: jax.Array) -> jax.Array:
            return lax.dynamic_index_in_dim(stack, index, keepdims=False)

        return Past(put(self.last, velocity.astype(jnp.float32)), put(self.before, old(self.last)),
                    put(self.last_sigma, jnp.asarray(sigma, jnp.float32)),
                    put(self.before_sigma, old(self.last_sigma)))  # fmt: skip


@struct.dataclass
class Skip:
    """What one step needs to skip passes.

    Attributes:
      passes: bool [2]; in "batched" mode, where there is guidance, both or none.
      sigma: float32 [], the noise level.
      past: before the step.
    """

    passes: ArrayLike
    sigma: ArrayLike
    past: Past


def guided(
    model: Model,
    conditions: Conditions,
    negative_text: ArrayLike,
    scale: ArrayLike,
    mode: GuidanceMode = "sequential",
    cross_bias: CrossBias | None = None,
) -> Callable[..., jax.Array]:
    """The model with guidance: (latents, timestep [], strength [L, F]) -> velocity float32. See `skippable`."""
    run = skippable(model, conditions, negative_text, scale, mode, cross_bias)
    return lambda *inputs: run(*inputs)[0]


def skippable(
    model: Model,
    conditions: Conditions,
    negative_text: ArrayLike,
    scale: ArrayLike,
    mode: GuidanceMode = "sequential",
    cross_bias: CrossBias | None = None,
) -> Callable[..., tuple[jax.Array, Past | None]]:
    """The model with guidance: (latents, timestep [], strength [L, F], skip) -> (velocity float32, past).

    Without a `Skip` every pass is run, no code of skipping is in the program, and the past is None.

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
    scale = jnp.asarray(scale, jnp.float32)
    run = {"sequential": _sequential, "batched": _batched}[one_of("guidance mode", mode, MODES, "choose one of")]

    def denoise(
        latents: jax.Array, timestep: jax.Array, strength: jax.Array | None = None, skip: Skip | None = None
    ) -> tuple[jax.Array, Past | None]:
        batch = latents.shape[0]
        timesteps = jnp.broadcast_to(timestep, (batch,)).astype(jnp.float32)
        if strength is not None:
            layers, frames = strength.shape
            strength = jnp.broadcast_to(strength[:, None], (layers, batch, frames))
        own = strength, cross_bias
        return run(model, latents, timesteps, conditions, jnp.asarray(negative_text), scale, own, skip)

    return denoise


def _evaluated(
    skip: Skip | None, past: Past | None, passes: Sequence[ArrayLike], evaluate: Callable[[], jax.Array]
) -> tuple[jax.Array, Past | None]:
    """Velocities of passes that are evaluated or skipped together, one after the other on the batch axis."""
    if skip is None:
        return evaluate(), None

    def guess(past: Past) -> tuple[jax.Array, Past]:
        return jnp.concatenate([past.guess(index, skip.sigma) for index in passes]), past

    def real(past: Past) -> tuple[jax.Array, Past]:
        velocities = evaluate().astype(jnp.float32)
        for index, one in zip(passes, jnp.split(velocities, len(passes)), strict=True):
            past = past.after(index, one, skip.sigma)
        return velocities, past

    return lax.cond(jnp.asarray(skip.passes)[passes[0]], guess, real, past)


def _sequential(model, latents, timesteps, conditions, negative_text, scale, own, skip) -> tuple:
    """A loop whose length is traced: one pass at scale 1, else two, weighted scale and 1 - scale."""
    texts = jnp.stack([conditions.text, negative_text])
    weights = jnp.stack([scale, 1 - scale])

    def add_pass(index: jax.Array, so_far: tuple[jax.Array, Past | None]) -> tuple[jax.Array, Past | None]:
        def conditional_only(leaf: jax.Array) -> jax.Array:
            return jnp.where(index == 0, leaf, 0)  # not a product: a bias may be -inf

        def evaluate() -> jax.Array:
            told = conditions.replace(text=texts[index])
            return model(latents, timesteps, told, *jax.tree.map(conditional_only, own))

        velocity, past = so_far
        one, past = _evaluated(skip, past, [index], evaluate)
        return velocity + weights[index] * one.astype(jnp.float32), past

    passes = jnp.where(scale == 1, 1, 2)
    start = jnp.zeros(latents.shape, jnp.float32), None if skip is None else skip.past
    return lax.fori_loop(0, passes, add_pass, start)


def _batched(model, latents, timesteps, conditions, negative_text, scale, own, skip) -> tuple:
    def with_zeros(leaf: jax.Array) -> jax.Array:
        return jnp.concatenate([leaf, jnp.zeros_like(leaf)], 1)  # [layers, 2B, ...]

    def pair() -> jax.Array:
        negative = conditions.replace(text=negative_text)
        twice = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), conditions, negative)
        inputs = (jnp.concatenate([x] * 2) for x in (latents, timesteps))
        return model(*inputs, twice, *jax.tree.map(with_zeros, own))

    past = None if skip is None else skip.past

    def both() -> tuple[jax.Array, Past | None]:
        out, after = _evaluated(skip, past, (CONDITIONAL, UNCONDITIONAL), pair)
        conditional, unconditional = jnp.split(out.astype(jnp.float32), 2)
        return unconditional + scale * (conditional - unconditional), after

    def one() -> tuple[jax.Array, Past | None]:
        alone = lambda: model(latents, timesteps, conditions, *own)  # noqa: E731
        out, after = _evaluated(skip, past, [CONDITIONAL], alone)
        return out.astype(jnp.float32), after

    return lax.cond(scale == 1, one, both)
