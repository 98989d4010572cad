"""The host loop over the sampler: one compiled program, called for a few rows at a time.

Between two calls the host moves a bar, looks at the latents, saves them, or stops: so the program holds no callback and
can be kept in JAX's compilation cache, and Ctrl-C is heard after one step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from tqdm import tqdm

from samplers.sample import Carry, Row, padded

Part = Callable[[Carry, Row, np.int32, int], Carry]
"""The compiled sampler: (carry, table, first row, number of rows, static) -> carry."""

OnStep = Callable[[int, Carry], None]
"""Called between two parts with the number of steps done and their carry, before the first step too (0)."""


def run(
    part: Part, carry: Carry, table: Row, steps: int, *, chunk: int = 1, first: int = 0, on_step: OnStep | None = None
) -> Carry:
    """Runs the rows ``first`` .. ``steps`` - 1, ``chunk`` at a time; any chunk gives the same bits.

    Args:
      part: see `Part`; one program for all calls.
      carry: before row ``first``.
      table: of `sample.rows`, in host memory.
      steps: where to stop; a number below the run's gives the carry that enters that step, without recompiling.
      chunk: rows a call; all of them at once where nothing has to be done in between.
      on_step: see `OnStep`.

    Raises:
      FloatingPointError: NaN or inf in the latents; names the step.
    """
    # Rows from `steps` on are passed over, and the last part may reach beyond the table: so every call is one program.
    table = table.replace(live=table.live & (np.arange(len(table.live)) < steps))
    table = padded(table, chunk - 1)
    if on_step is not None:
        on_step(first, carry)
    for begin in range(first, steps, chunk):
        carry = part(carry, table, np.int32(begin), chunk)
        check(carry)
        if on_step is not None:
            on_step(min(begin + chunk, steps), carry)
    return carry


def check(carry: Carry) -> None:
    """Waits for a carry. FloatingPointError, with the step, if its run failed."""
    failed = np.asarray(carry.failed_step)
    failed = failed[failed >= 0]
    if failed.size:
        raise FloatingPointError(
            f"latents: NaN or inf after denoising step {failed.min()} (from 0); "
            "check the weights, or try float32 or less guidance"
        )


@contextmanager
def bar(steps: int, description: str = "denoise", shown: bool = True) -> Iterator[OnStep]:
    """A progress bar with ETA, as an `OnStep`; only the first process of several hosts draws it.

    Args:
      shown: False for none.
    """
    hidden = not shown or jax.process_index() != 0
    with tqdm(total=steps, desc=description, unit="step", dynamic_ncols=True, disable=hidden) as drawn:
        yield lambda done, carry: drawn.update(done - drawn.n)
