"""The denoising loop: one `lax.scan` over the rows of a solver table.

The model is known only as ``denoise(latents, timestep) -> velocity``. Latents may have any shape (Wan2.1:
[B, F, h, w, 16]) and any sharding; the loop is elementwise but for one all-finite test a step, so it adds no
communication beyond one boolean.
"""

from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from samplers.solvers import StepTable


class Denoise(Protocol):
    """The model as the sampler sees it."""

    def __call__(self, latents: jax.Array, timestep: jax.Array, *per_step: Any) -> jax.Array:
        """Velocity (noise - data), shape of ``latents``, any float dtype.

        Given float32 latents and a float32 scalar timestep [], ``1000 * sigma``; broadcasting over the batch
        is the model's side. Where `sample` has a ``per_step``, its row of this step follows.
        """
        ...


@flax.struct.dataclass
class Carry:
    """State between two steps. All float32 in the latents' shape, but for ``failed_step``.

    Attributes:
      sample: x_i, the latents about to be denoised.
      corrected: corrected_{i-1}, the previous step's latents after its corrector (zeros before the first).
      data_1: m_{i-1}, the data estimate of the previous step (zeros before the first step).
      data_2: m_{i-2}, the one before (zeros before the second step).
      failed_step: int32 [], index from 0 of the step that made the latents non-finite; -1 while all is well.
    """

    sample: jax.Array
    corrected: jax.Array
    data_1: jax.Array
    data_2: jax.Array
    failed_step: jax.Array


def sample(
    denoise: Denoise,
    noise: jax.Array,
    table: StepTable,
    on_step: Callable[[int], None] | None = None,
    per_step: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Integrates the flow from noise to data. Pure: jit it, both functions static or closed over.

    ``denoise`` is traced once. The table is ordinary traced input: schedules and solvers of the same step
    count share one compiled program. Once the latents hold a NaN or inf no further step runs (`lax.cond`;
    under `vmap` that becomes a select, which evaluates the model to the end: a batch belongs inside the
    latents).

    Args:
      denoise: the model, see `Denoise`.
      noise: [...] standard normal, float; computed on in float32.
      table: rows of `solvers.table`, float32, leading axis = steps.
      on_step: host function called with each executed step's index once its latents exist (order is not
        guaranteed). It is part of the compiled program: pass the same object every time, such as one
        `Progress`.
      per_step: pytree of arrays [steps, ...] whose row of a step ``denoise`` gets as a third argument (KAB's
        strength); traced. None: it is called with two.

    Returns:
      (latents float32 in the shape of ``noise``, failed_step int32 []). After a failure the latents are those
      of the failed step; give ``failed_step`` to `check` on the host.

    Raises:
      ValueError: at trace time, when noise is not floating or denoise changes the shape.
    """
    if not jnp.issubdtype(noise.dtype, jnp.floating):
        raise ValueError(f"noise: got dtype {noise.dtype}; give floating point latents")

    def run(carry: Carry, step: jax.Array, row: StepTable, extra: tuple) -> Carry:
        velocity = denoise(carry.sample, row.timestep, *extra)
        if velocity.shape != carry.sample.shape:
            raise ValueError(f"denoise: returned shape {velocity.shape} for latents {carry.sample.shape}")
        carry = advance(carry, velocity, row)
        finite = jnp.isfinite(carry.sample).all()
        if on_step is not None:
            _tell(on_step, step, finite)
        return carry.replace(failed_step=jnp.where(finite, carry.failed_step, step))

    def scan_body(carry: Carry, inputs: tuple[jax.Array, StepTable, tuple]) -> tuple[Carry, None]:
        return lax.cond(carry.failed_step < 0, run, lambda carry, *_: carry, carry, *inputs), None

    steps = jnp.arange(len(table.sigma), dtype=jnp.int32)
    extra = () if per_step is None else (per_step,)
    carry, _ = lax.scan(scan_body, start(noise), (steps, table, extra))
    return carry.sample, carry.failed_step


def start(noise: jax.Array) -> Carry:
    """The carry before the first step: ``noise`` in float32, an empty history, no failure."""
    latents = noise.astype(jnp.float32)
    empty = jnp.zeros_like(latents)
    return Carry(latents, empty, empty, empty, jnp.full((), -1, jnp.int32))


def advance(carry: Carry, velocity: jax.Array, row: StepTable) -> Carry:
    """One solver step: ``velocity`` (any float dtype) and one row of the table -> next carry, in float32."""
    x, correct, predict = carry.sample, row.corrector, row.predictor
    data = x - row.sigma * velocity.astype(jnp.float32)
    corrected = (
        correct[0] * x
        + correct[1] * carry.corrected
        + correct[2] * data
        + correct[3] * carry.data_1
        + correct[4] * carry.data_2
    )
    following = predict[0] * corrected + predict[1] * data + predict[2] * carry.data_1
    return carry.replace(sample=following, corrected=corrected, data_1=data, data_2=carry.data_1)


def check(failed_step: jax.Array | np.ndarray | int) -> None:
    """Raises FloatingPointError if a run failed. Waits for ``failed_step`` (int32, [] or a batch of runs)."""
    failed = np.asarray(failed_step)
    failed = failed[failed >= 0]
    if failed.size:
        raise FloatingPointError(
            f"latents: NaN or inf after denoising step {failed.min()} (from 0); "
            "check the weights, or try float32 or less guidance"
        )


class Progress:
    """A progress bar with ETA that a compiled program can keep a hold of.

    The callback of a jitted function is part of its cache key, so a fresh closure for every run would
    recompile. Make ONE Progress, pass it as ``on_step`` (static; it hashes by identity), and open a bar for
    each run:

        with progress.open(total=len(table.sigma)):
            latents, failed_step = run(noise, table, on_step=progress)

    Leaving the block normally waits for the outstanding callbacks, so the bar of a finished run is complete;
    leaving it by an exception (Ctrl-C) closes the bar at once. Calls that arrive while no bar is open do
    nothing. Only the first process of a multi-host run draws. Not for two runs at the same time.
    """

    def __init__(self, description: str = "denoise") -> None:
        self._description = description
        self._bar: tqdm | None = None

    def open(self, total: int) -> "Progress":
        """Draws a bar of ``total`` steps; use as a context manager. ValueError if one is open already."""
        if self._bar is not None:
            raise ValueError("progress: a bar is already open; close it, or make another Progress")
        jax.effects_barrier()  # late calls of an interrupted run must not move the new bar
        self._bar = tqdm(
            total=total,
            desc=self._description,
            unit="step",
            dynamic_ncols=True,
            disable=jax.process_index() != 0,
        )
        return self

    def close(self) -> None:
        """Closes the bar where it stands. Harmless when none is open."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def __call__(self, step: int) -> None:
        """Step ``step`` (from 0) is done. Calls may come out of order: the bar never goes back."""
        bar = self._bar
        if bar is not None and step >= bar.n:
            bar.update(step + 1 - bar.n)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        try:
            if exception_type is None:
                jax.effects_barrier()
        finally:
            self.close()


def _tell(on_step: Callable[[int], None], step: jax.Array, finite: jax.Array) -> None:
    """Calls ``on_step`` from inside the program; ``finite`` makes the call wait for the step."""

    def receive(step: np.ndarray, finite: np.ndarray) -> None:
        del finite
        on_step(int(step))

    jax.debug.callback(receive, step, finite)
