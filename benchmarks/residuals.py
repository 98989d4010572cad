"""Caching the block stack's residual, for comparison with guessed velocities: what `benchmarks.skipping` adds by it.

The rule is MagCache's (arXiv 2506.09045): a skipped pass adds the last real residual of all blocks to its own embedded
tokens. Which are skipped follows from the ratios of the residual's norm from step to step: while a skip lasts, the
distance of their running product from 1 is added up, and a threshold ends it, as do four in a row; the first fifth of
the steps and the last are real.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from samplers import sample
from samplers.pipeline import Encoded
from samplers.plan import Plan
from samplers.sample import Carry, Row
from wanjax.checkpoint import Model
from wanjax.config import DiTConfig
from wanjax.dit import Blocks, Embed, Head, token_grid
from wanjax.method import MethodArrays
from wanjax.types import Conditions

MOST = 4
"""Skipped steps in a row."""
RETAINED = 0.2
"""Share of steps at the start that are real."""


@partial(jax.jit, static_argnums=0)
def _run(
    config: DiTConfig,
    params: Any,
    carry: Carry,
    table: Row,
    conditions: Conditions,
    negative: jax.Array,
    method: MethodArrays,
) -> tuple[Carry, jax.Array]:
    """All rows, and the norm of each pass's residual after each [rows, 2]; `carry.state`: residuals [2, B, S', D]."""
    variables = {"params": params}

    def denoise(latents: jax.Array, row: Row, residuals: jax.Array) -> tuple[jax.Array, jax.Array]:
        grid, batch = token_grid(config, latents.shape), latents.shape[0]
        strength = jnp.broadcast_to(row.strength[:, None], (config.num_layers, batch, grid[0]))
        total, kept = jnp.zeros(latents.shape, jnp.float32), []
        for which, (text, weight) in enumerate(((conditions.text, row.guidance), (negative, 1 - row.guidance))):
            told, own = conditions.replace(text=text), strength * (which == 0)
            timesteps = jnp.broadcast_to(row.step.timestep, (batch,))
            embedded = Embed(config).apply(variables, latents, timesteps, told, method.table)

            def real(embedded: Any = embedded, own: jax.Array = own) -> jax.Array:
                x = Blocks(config).apply(variables, embedded, grid, config.num_layers, None, method.control, own)
                return x - embedded.x

            residual = lax.cond(row.skip[which], lambda which=which: residuals[which], real)
            kept.append(residual)
            total += weight * Head(config).apply(variables, embedded.x + residual, embedded.embedding, grid)
        return total, jnp.stack(kept)

    def step(carry: Carry, index: jax.Array) -> tuple[Carry, jax.Array]:
        carry = sample.sample(denoise, carry, table, index, 1)
        return carry, jnp.sqrt(jnp.square(carry.state).mean((1, 2, 3)))

    return lax.scan(step, carry, jnp.arange(len(table.live)))


def denoise(
    model: Model, plan: Plan, clips: Sequence[tuple[Encoded, jax.Array]], skipped: Sequence[int]
) -> tuple[list[jax.Array], np.ndarray]:
    """Latents of batches of clips, the residual kept in steps that are skipped; its norms [steps, 2] in the last."""
    steps, config = plan.settings.steps, plan.config.dit
    flags = np.zeros((len(plan.table.live), 2), bool)
    flags[list(skipped)] = True
    found, norms = [], None
    for encoded, noise in clips:
        tokens = int(np.prod(token_grid(config, noise.shape)))
        empty = jnp.zeros((2, noise.shape[0], tokens, config.dim), jnp.dtype(config.precision.residual))
        carry, norms = _run(config, model.part("dit"), sample.start(noise, empty), plan.table.replace(skip=flags),
                            encoded.conditions, encoded.negative, plan.method)  # fmt: skip
        found.append(carry.sample)
    return found, np.asarray(norms)[:steps]


def schedule(norms: np.ndarray, count: int) -> tuple[int, ...]:
    """So many steps by the rule, or the next fewer that a threshold gives.

    Args:
      norms: [steps, 2] of a run with all passes.
    """
    ratios = np.append(1, (norms[1:] / norms[:-1]).mean(1))

    def at(threshold: float) -> list[int]:
        found, product, error, row = [], 1.0, 0.0, 0
        for step in range(len(ratios)):
            product, row = product * ratios[step], row + 1
            error += abs(1 - product)
            if RETAINED * len(ratios) <= step < len(ratios) - 1 and row <= MOST and error <= threshold:
                found.append(step)
            else:
                product, error, row = 1.0, 0.0, 0
        return found

    tried = [at(threshold) for threshold in np.linspace(0, 2, 4001)]
    return tuple(max((one for one in tried if len(one) <= count), key=len))
