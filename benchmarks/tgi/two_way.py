"""Inbetweening with a model that sees one keyframe: forwards from the first, backwards from the last.

Time-reversal fusion (TRF, arXiv 2403.14611) evaluates both directions in every step and fuses them frame by frame
with linear weights; some steps are repeated after noise is put back. ViBiDSampler (arXiv 2410.05651) takes each step
forwards, puts the noise back, and takes it again backwards; its guidance (CFG++, DDS) is not part of this. Both are
Euler rows of the one sampler (`samplers.sample`) here, so TRF's weights on velocities are weights on the denoised
estimates, as in the paper. How often TRF repeats is set here by `Options` and not taken from its release, and CFG++ and
DDS are part of what ViBiDSampler reports. Neither paper's model takes text: here each direction is told what it shows.

Reversing time in Wan's latents is not reversing them: a latent frame holds 1 pixel frame at first and 4 later, and
sees only earlier ones. Flip "latent" reverses the latent frames all the same, as a port of these methods would do
first; flip "pixel" decodes the data estimate, reverses the frames, encodes again, and reverses only the estimated
noise as it is.

Axis letters as in `wanjax.types`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import samplers.sample
from samplers import schedule
from samplers.plan import Plan, Settings
from samplers.programs import evaluator
from samplers.run import check
from samplers.sample import Carry, Row, start
from samplers.solvers import StepTable
from wanjax import vae
from wanjax.checkpoint import Model
from wanjax.config import ModelConfig
from wanjax.guidance import guided
from wanjax.method import MethodArrays
from wanjax.types import Conditions

Scheme = Literal["trf", "vibid"]
Flip = Literal["latent", "pixel"]
SCHEMES: tuple[Scheme, ...] = ("trf", "vibid")
FLIPS: tuple[Flip, ...] = ("latent", "pixel")


@dataclasses.dataclass(frozen=True)
class Options:
    """How the two directions are joined.

    Attributes:
      scheme: "trf" or "vibid".
      flip: what is reversed in time, "latent" or "pixel" frames.
      repeats: of TRF, how often a step is taken again from renewed noise.
      repeat_share: of TRF, share of the run, from its start, whose steps are repeated.
    """

    scheme: Scheme
    flip: Flip = "latent"
    repeats: int = 2
    repeat_share: float = 0.5

    def __post_init__(self) -> None:
        for name, value, allowed in (("scheme", self.scheme, SCHEMES), ("flip", self.flip, FLIPS)):
            if value not in allowed:
                raise ValueError(f"{name} {value!r}: choose {' or '.join(allowed)}")
        if self.repeats < 0 or not 0 <= self.repeat_share <= 1:
            raise ValueError(f"repeats {self.repeats} in {self.repeat_share} of the run: give 0 or more, in 0 to 1")


def rows(options: Options, levels: np.ndarray) -> Row:
    """The order of evaluations on noise levels float64 [steps + 1], as a table; none is repeated from the last, at 0.

    A row is an Euler step from one level to the next, after which fresh noise may bring the latents back to a higher
    one: one linear update, with the noise's deviation in `StepTable.renoise`. `Row.extra` is 1 where ViBiD takes the
    step in reversed time.
    """
    made = []
    steps = len(levels) - 1
    for i in range(steps):
        here, after = levels[i], levels[i + 1]
        if options.scheme == "vibid":
            made += [(here, after, here, 0), (here, after, after, 1)]
            continue
        again = options.repeats if i < options.repeat_share * steps else 0
        made += [(here, after, here, 0)] * again + [(here, after, after, 0)]
    sigma, following, back, backwards = np.array(made).T
    keep, deviation = renoise(following, back)
    ratio = following / sigma
    corrector = np.tile([1.0, 0, 0, 0, 0], (len(made), 1))
    predictor = np.stack([keep * ratio, keep * (1 - ratio), np.zeros_like(ratio)], 1)
    columns = (sigma, schedule.TRAIN_TIMESTEPS * sigma, corrector, predictor, deviation)
    step = StepTable(*(np.asarray(column, np.float32) for column in columns))
    return samplers.sample.rows(step, extra=backwards.astype(np.float32))


def renoise(level: np.ndarray, higher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What brings latents at noise `level` to a `higher` one: their factor, and the deviation of fresh noise.

    1 and 0 where the two agree; factor 1 from level 1, where there is nothing but noise.
    """
    keep = np.where(level < 1, (1 - higher) / np.maximum(1 - level, 1e-12), 1.0)
    return keep, np.sqrt(np.maximum(higher**2 - (keep * level) ** 2, 0))


def sample(
    model: Model,
    forwards: Conditions,
    backwards: Conditions,
    negative: jax.Array,
    settings: Settings,
    options: Options,
    noise: jax.Array,
    keys: jax.Array,
) -> jax.Array:
    """Latents [B, F, h, w, 16] between two keyframes.

    Args:
      model: conditioned on one image: I2V, or one trained with the last keyframe withheld at times.
      forwards, backwards: conditions that hold the first, and the last keyframe as if it were the first.
      negative: text [B, L, text_dim] of the pass without the prompt.
      settings: steps, shift, schedule, guidance; the solver is Euler.
      options: see `Options`.
      noise: standard normal, in the latents' shape.
      keys: [B] of the noise that is put back, as `jax.random.key` makes them; a sample's depends on its own alone.
    """
    plan = Plan.of(model.config, settings)
    table = rows(options, schedule.sigmas(settings.schedule, settings.steps, settings.shift))
    params = {part: model.part(part) for part in ("dit", "vae")}
    carry = start(noise, state=jnp.zeros(noise.shape, jnp.float32), keys=keys)
    carry = _sample(plan.config, options, params, forwards, backwards, negative, np.float32(settings.guidance),
                    plan.method, np.zeros_like(plan.strength[0]), carry, table)  # fmt: skip
    check(carry)
    return carry.sample


@partial(jax.jit, static_argnums=(0, 1))
def _sample(
    config: ModelConfig,
    options: Options,
    params: Any,
    forwards: Conditions,
    backwards: Conditions,
    negative: jax.Array,
    guidance: jax.Array,
    method: MethodArrays,
    strength: jax.Array,
    carry: Carry,
    table: Row,
) -> Carry:
    model = evaluator(config.dit, params["dit"], method)

    def velocity(conditions: Conditions) -> Callable[[jax.Array, jax.Array], jax.Array]:
        run = guided(model, conditions, negative, guidance, "sequential")
        return lambda latents, sigma: run(latents, schedule.TRAIN_TIMESTEPS * sigma, strength)

    def reverse(data: jax.Array) -> jax.Array:
        if options.flip == "latent":
            return data[:, ::-1]
        return vae.encode(config.vae, params["vae"], vae.decode(config.vae, params["vae"], data)[:, ::-1])

    def in_reverse(latents: jax.Array, data: jax.Array, sigma: jax.Array) -> jax.Array:
        """The data estimate of the other direction, in forward time, from latents and their own data estimate."""
        fresh = (latents - (1 - sigma) * data) / sigma
        turned = (1 - sigma) * reverse(data) + sigma * fresh[:, ::-1]
        return reverse(turned - sigma * velocity(backwards)(turned, sigma))

    frames = carry.sample.shape[1]
    weight = jnp.linspace(1.0, 0.0, frames)[None, :, None, None, None]  # of the forward direction

    def estimate(latents: jax.Array, sigma: jax.Array, reversed_time: jax.Array, last: jax.Array) -> jax.Array:
        def ahead() -> jax.Array:
            return latents - sigma * velocity(forwards)(latents, sigma)

        if options.scheme == "vibid":
            return lax.cond(reversed_time > 0, lambda: in_reverse(latents, last, sigma), ahead)
        data = ahead()
        return weight * data + (1 - weight) * in_reverse(latents, data, sigma)

    def denoise(latents: jax.Array, row: Row, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The state is the data estimate of the evaluation before."""
        data = estimate(latents, row.step.sigma, row.extra, last)
        return (latents - data) / row.step.sigma, data

    return samplers.sample.sample(denoise, carry, table, 0, len(table.live))
