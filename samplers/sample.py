"""The denoising loop: one `lax.scan` over rows of a run's table.

The model is known only as ``denoise(latents, row, state) -> (velocity, state)``. Latents may have any shape (Wan2.1:
[B, F, h, w, 16]) and any sharding; the loop is elementwise but for one all-finite test a row, so it adds no
communication beyond one boolean. `samplers.run` drives it from the host, a few rows at a time.
"""

from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from samplers.solvers import StepTable

LEAST_ROWS = 64
"""A table is padded to this many rows, or to a power of two above, so that step counts share a program."""


@flax.struct.dataclass
class Row:
    """What is particular to one step. In a table every leaf has a leading axis of rows. All of it is traced.

    Attributes:
      step: solver coefficients, sigma and timestep, see `StepTable`.
      live: bool [], False for rows that only pad the table: they are passed over.
      guidance: float32 [], guidance scale; exactly 1 runs no second pass.
      strength: float32 [L, F], KAB's strength; None for a model without control.
      skip: bool [2], whether the pass (conditional, unconditional) is guessed and not run; None where no step of the
        run skips any, and `Carry.state` holds no past then.
      extra: what else a caller's ``denoise`` reads.
    """

    step: StepTable
    live: Any
    guidance: Any = None
    strength: Any = None
    skip: Any = None
    extra: Any = None


@flax.struct.dataclass
class Carry:
    """All that one step hands to the next. float32 in the latents' shape where nothing else is said.

    Attributes:
      sample: x_i, the latents about to be denoised.
      corrected: corrected_{i-1}, the previous step's latents after its corrector (zeros before the first).
      data_1: m_{i-1}, the data estimate of the previous step (zeros before the first step).
      data_2: m_{i-2}, the one before (zeros before the second step).
      failed_step: int32 [], index from 0 of the step that made the latents non-finite; -1 while all is well.
      keys: random keys [B] of solvers that add noise anew (LCM), else None.
      state: ``denoise``'s own, any pytree.
    """

    sample: jax.Array
    corrected: jax.Array
    data_1: jax.Array
    data_2: jax.Array
    failed_step: jax.Array
    keys: jax.Array | None = None
    state: Any = None


class Denoise(Protocol):
    """The model as the sampler sees it."""

    def __call__(self, latents: jax.Array, row: Row, state: Any) -> tuple[jax.Array, Any]:
        """(velocity (noise - data) in the shape of ``latents`` and any float dtype, next state).

        Given float32 latents; broadcasting the row over the batch is the model's side.
        """
        ...


def rows(step: StepTable, **leaves: Any) -> Row:
    """A padded table of a run.

    Args:
      step: of `solvers.table`.
      leaves: `guidance`, `strength`, `skip`, `extra` with a leading axis of steps.
    """
    steps = len(step.sigma)
    table = Row(step=step, live=np.ones(steps, bool), **leaves)
    return padded(table, max(LEAST_ROWS, 1 << (steps - 1).bit_length()) - steps)


def padded(table: Row, more: int) -> Row:
    """A table in host memory with so many dead rows behind its own."""
    return jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros((more, *leaf.shape[1:]), leaf.dtype)]), table)


def start(noise: jax.Array, state: Any = None, keys: jax.Array | None = None) -> Carry:
    """The carry before the first step: ``noise`` in float32, an empty history, no failure.

    Raises:
      ValueError: ``noise`` is not floating.
    """
    if not jnp.issubdtype(noise.dtype, jnp.floating):
        raise ValueError(f"noise: got dtype {noise.dtype}; give floating point latents")
    latents = noise.astype(jnp.float32)
    empty = jnp.zeros_like(latents)
    return Carry(latents, empty, empty, empty, jnp.full((), -1, jnp.int32), keys, state)


def sample(denoise: Denoise, carry: Carry, table: Row, first: jax.Array | int, n: int) -> Carry:
    """Takes ``n`` rows of the table, from row ``first`` on. Pure: jit it with ``denoise`` closed over, ``n`` static.

    ``denoise`` is traced once. ``first`` and the table are ordinary traced input: other schedules, solvers and step
    counts (of tables padded alike) share one compiled program, and so do all parts of a run that are ``n`` rows long.
    Any division of a run into parts gives the same bits. Once the latents hold a NaN or inf no further row is run
    (`lax.cond`; under `vmap` that becomes a select, which evaluates the model to the end: a batch belongs inside the
    latents).

    Raises:
      ValueError: at trace time, when denoise changes the shape.
    """

    def run(carry: Carry, index: jax.Array, row: Row) -> Carry:
        velocity, state = denoise(carry.sample, row, carry.state)
        if velocity.shape != carry.sample.shape:
            raise ValueError(f"denoise: returned shape {velocity.shape} for latents {carry.sample.shape}")
        return step(carry.replace(state=state), velocity, row.step, index)

    def body(carry: Carry, inputs: tuple[jax.Array, Row]) -> tuple[Carry, None]:
        index, row = inputs
        return lax.cond(row.live & (carry.failed_step < 0), run, lambda carry, *_: carry, carry, index, row), None

    first = jnp.asarray(first, jnp.int32)
    part = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, n), table)
    return lax.scan(body, carry, (first + jnp.arange(n, dtype=jnp.int32), part))[0]


def step(carry: Carry, velocity: jax.Array, step: StepTable, index: jax.Array | int) -> Carry:
    """`advance`, and whether the latents are finite still."""
    carry = advance(carry, velocity, step, index)
    return carry.replace(failed_step=jnp.where(jnp.isfinite(carry.sample).all(), carry.failed_step, index))


def advance(carry: Carry, velocity: jax.Array, step: StepTable, index: jax.Array | int = 0) -> Carry:
    """One solver step: ``velocity`` (any float dtype) and one row of the table -> next carry, in float32.

    Where the solver adds noise anew, that of a sample [B, ...] comes from its own key and ``index`` alone.
    """
    x, correct, predict = carry.sample, step.corrector, step.predictor
    data = x - step.sigma * velocity.astype(jnp.float32)
    corrected = (
        correct[0] * x
        + correct[1] * carry.corrected
        + correct[2] * data
        + correct[3] * carry.data_1
        + correct[4] * carry.data_2
    )
    following = predict[0] * corrected + predict[1] * data + predict[2] * carry.data_1
    if step.renoise is not None:
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:], jnp.float32)  # noqa: E731
        following += step.renoise * jax.vmap(draw)(carry.keys)
    return carry.replace(sample=following, corrected=corrected, data_1=data, data_2=carry.data_1)
