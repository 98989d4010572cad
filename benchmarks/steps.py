"""One denoising step of `samplers.pipeline`, on random weights: what `throughput` and `method_cost` time.

The program is the sampler's scan over one row of a run's table, guidance, solver and test for finite numbers included,
as it is compiled for the command line. Axis letters as in `wanjax.types`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks import random_model
from samplers import programs, sample, schedule, solvers
from samplers.sample import Carry, Row
from wanjax import rope, shapes
from wanjax.config import DiTConfig, ModelConfig, VAEConfig
from wanjax.method import MethodArrays
from wanjax.types import Conditions

GUIDANCE_SCALE = 5.0
STEP = np.int32(1)
"""Which row is run: the first has no history and no KAB."""


@dataclass(frozen=True)
class Shape:
    """What is computed: batch, pixel frames, and (height, width) in pixels."""

    batch: int
    frames: int
    size: tuple[int, int]

    def latent_grid(self, config: VAEConfig) -> tuple[int, int, int]:
        """(F, h, w)."""
        height, width = (side // config.spatial_stride for side in self.size)
        return config.latent_frames(self.frames), height, width


def part(config: DiTConfig, mode: str = "sequential", n: int = 1) -> Callable[..., Carry]:
    """The sampler over `n` rows: (params, conditions, negative text, carry, first row, table, method) -> carry.

    Args:
      mode: of guidance, "sequential" or "batched".
    """

    def run(
        params: Any,
        conditions: Conditions,
        negative: jax.Array,
        carry: Carry,
        first: jax.Array,
        table: Row,
        method: MethodArrays,
    ) -> Carry:
        inputs = (params, carry, table, first, conditions, negative, method, None)
        return programs.denoise(config, *inputs, n=n, guidance_mode=mode)

    return run


def velocity(before: Carry, after: Carry, table: Row) -> jax.Array:
    """What the model gave in row `STEP`: [B, F, h, w, C]."""
    return (before.sample - after.data_1) / table.step.sigma[STEP]


class RandomModel:
    """A transformer with random weights and inputs, on the device.

    Attributes:
      parameters: number of them.
      arguments: the first ones of `part`, which every step shares.
    """

    def __init__(self, config: DiTConfig, grid: tuple[int, int, int], batch: int) -> None:
        tree = shapes.dit(config)
        self.config, self.grid, self.batch = config, grid, batch
        self.parameters = random_model.count(tree)
        latents, conditions, negative = jax.device_put(random_model.inputs(config, grid, batch, 1))
        params = jax.block_until_ready(random_model.params(tree))
        self.arguments = (params, conditions, negative, sample.start(latents), STEP)

    @property
    def carry(self) -> Carry:
        """Before the step."""
        return self.arguments[3]

    def plain(self) -> MethodArrays:
        """Wan2.1 without any code of the methods in the program."""
        tokens = tuple(n // size for n, size in zip(self.grid, self.config.patch_size, strict=True))
        return jax.device_put(MethodArrays(rope.table(tokens, self.config.head_dim), None, None))


def rows(model: ModelConfig, guidance: float) -> Row:
    """The table of a run as the model is usually sampled, also of one without keyframes; no KAB.

    Args:
      guidance: scale; 1 runs one pass.
    """
    usual = model.sampling
    levels = schedule.sigmas("wan", usual.steps, usual.shift)
    scale = np.full(usual.steps, guidance, np.float32)
    return sample.rows(solvers.table(usual.solver, levels), guidance=scale)
