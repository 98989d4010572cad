"""Denoising with a transformer whose layers come one after the other: the host calls a program for each of them.

The device holds two layers, the one that computes and the next, which is sent or read meanwhile. What is computed is
what `programs.denoise` computes, in the same order.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from samplers import sample
from samplers.jit import Program
from samplers.plan import Plan
from samplers.sample import Carry, Row
from samplers.solvers import StepTable
from wanjax.config import DiTConfig
from wanjax.dit import Blocks, Embed, Embedded, Head
from wanjax.guidance import CONDITIONAL, UNCONDITIONAL, GuidanceMode, Past
from wanjax.method import MethodArrays
from wanjax.streaming import Streamed
from wanjax.types import Conditions, CrossBias, CrossControl, RopeTable

Own = tuple[Any, Any]
"""What the conditional pass alone has: KAB's strength [L, B, F], a caller's bias; None where there is none."""


@dataclass(frozen=True)
class Loop:
    """`Programs.denoise` for `Streamed` parameters, called as that is.

    Attributes:
      layers: of the transformer.
      chunk: rows of the table in a call.
      guidance_mode: see `wanjax.guidance`.
      embed, layer, head, add, combine, advance, guess, keep: the functions below, jitted.
    """

    layers: int
    chunk: int
    guidance_mode: GuidanceMode
    embed: Program
    layer: Program
    head: Program
    add: Program
    combine: Program
    advance: Program
    guess: Program
    keep: Program

    @classmethod
    def of(cls, plan: Plan, chunk: int, jit: Callable[[Program], Program]) -> "Loop":
        """With the programs of a plan."""
        c, grid = plan.config.dit, plan.grid
        small = {function.__name__: partial(jit(function), None) for function in (add, combine, advance, guess, keep)}
        return cls(
            c.num_layers, chunk, plan.settings.guidance_mode, embed=partial(jit(embed), c),
            layer=partial(jit(layer), c, grid=grid), head=partial(jit(head), c, grid=grid), **small,
        )  # fmt: skip

    def __call__(
        self,
        params: Streamed,
        carry: Carry,
        table: Row,
        first: int,
        conditions: Conditions,
        negative_text: jax.Array,
        method: MethodArrays,
        cross_bias: CrossBias | None,
    ) -> Carry:
        """As `programs.denoise`."""
        evaluate = partial(self._evaluate, params, method)
        for index in range(int(first), int(first) + self.chunk):
            row = jax.tree.map(lambda leaf: np.asarray(leaf)[index], table)  # noqa: B023
            if not row.live or int(carry.failed_step) >= 0:
                break
            velocity, state = self._guided(evaluate, carry, row, conditions, negative_text, cross_bias)
            carry = self.advance(carry.replace(state=state), velocity, row.step, np.int32(index))
        return carry

    def _guided(
        self,
        evaluate: Callable[..., jax.Array],
        carry: Carry,
        row: Row,
        conditions: Conditions,
        negative_text: jax.Array,
        cross_bias: CrossBias | None,
    ) -> tuple[jax.Array, Past | None]:
        """The velocity with guidance, as `guidance.skippable` has it."""
        latents, past, strength, scale = carry.sample, carry.state, row.strength, np.float32(row.guidance)
        batch = latents.shape[0]
        if strength is not None:
            strength = np.repeat(strength[:, None], batch, 1)
        own = strength, cross_bias
        none = jax.tree.map(jnp.zeros_like, own)
        negative = conditions.replace(text=negative_text)
        if self.guidance_mode == "batched" and scale != 1:
            both = partial(jax.tree.map, lambda a, b: jnp.concatenate([a, b]))
            twice = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), own, none)
            pair = partial(evaluate, both(latents, latents), row.step.timestep, both(conditions, negative), twice)
            found, past = self._evaluated(pair, row, past, (CONDITIONAL, UNCONDITIONAL))
            return self.combine(found, scale), past
        velocity = jnp.zeros_like(latents)
        passes = [(scale, conditions, own)] + ([(1 - scale, negative, none)] if scale != 1 else [])
        for index, (weight, told, its) in enumerate(passes):
            one, past = self._evaluated(partial(evaluate, latents, row.step.timestep, told, its), row, past, (index,))
            velocity = self.add(velocity, weight, one)
        return velocity, past

    def _evaluated(
        self, evaluate: Callable[[], jax.Array], row: Row, past: Past | None, passes: tuple[int, ...]
    ) -> tuple[jax.Array, Past | None]:
        """Velocities of passes that are evaluated or skipped together, one after the other on the batch axis."""
        if row.skip is not None and row.skip[passes[0]]:
            found = [self.guess(past, np.int32(index), row.step.sigma) for index in passes]
            return found[0] if len(found) == 1 else jnp.concatenate(found), past
        velocities = evaluate()
        if row.skip is not None:
            ones = [velocities] if len(passes) == 1 else jnp.split(velocities, len(passes))
            for index, one in zip(passes, ones, strict=True):
                past = self.keep(past, np.int32(index), one, row.step.sigma)
        return velocities, past

    def _evaluate(
        self,
        params: Streamed,
        method: MethodArrays,
        latents: jax.Array,
        timestep: Any,
        conditions: Conditions,
        own: Own,
    ) -> jax.Array:
        """One evaluation of the model."""
        embedded = self.embed(params.rest, latents, timestep, conditions, method.table)
        x, embedded = embedded.x, embedded.replace(x=None)
        with _in_turn(params.fetch, self.layers) as kernels:
            for index in range(self.layers):
                x, done = self.layer(
                    params.rest["blocks"], kernels(), np.int32(index), x, embedded, method.control, *own
                )
                done.block_until_ready()  # so that no third layer is fetched before the first is let go
        return self.head(params.rest, x, embedded.embedding)


@contextmanager
def _in_turn(fetch: Callable[[int], Any], count: int) -> Iterator[Callable[[], Any]]:
    """A function that gives the layers in turn, and with each begins to fetch the next. It holds none that it gave."""
    left = iter(range(count))
    with ThreadPoolExecutor(1, thread_name_prefix="layers") as pool:

        def begin() -> list[Future[Any]]:
            return [pool.submit(fetch, index) for index in islice(left, 1)]

        waiting = begin()

        def following() -> Any:
            layer = waiting.pop().result()
            waiting.extend(begin())
            return layer

        yield following


def shapes(
    plan: Plan,
    params: Streamed,
    carry: Carry,
    table: Row,
    conditions: Conditions,
    negative_text: jax.ShapeDtypeStruct,
    method: MethodArrays,
    cross_bias: CrossBias | None,
) -> dict[str, tuple]:
    """What the programs of a `Loop` are called with, where that is called with these: `jax.ShapeDtypeStruct`s.

    Those that a plan never calls, and those that it calls with two shapes, are not there.
    """
    latents, row = carry.sample, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), table)
    guided = plan.table.guidance[: plan.settings.steps] != 1
    twice = plan.settings.guidance_mode == "batched" and guided.any()

    def batched(axis: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = list(leaf.shape)
        shape[axis] *= 2 if twice else 1
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    strength, scale = row.strength, jax.ShapeDtypeStruct((), np.float32)
    if strength is not None:
        strength = jax.ShapeDtypeStruct((strength.shape[0], latents.shape[0], strength.shape[1]), strength.dtype)
    own = jax.tree.map(partial(batched, 1), (strength, cross_bias))
    pair, conditions = jax.tree.map(partial(batched, 0), (latents, conditions))
    given = params.rest, pair, row.step.timestep, conditions, method.table
    embedded = jax.eval_shape(partial(embed, plan.config.dit), *given)
    x, index = embedded.x, jax.ShapeDtypeStruct((), np.int32)
    told = embedded.replace(x=None), method.control, *own
    found = {"advance": (carry, latents, row.step, index)}
    if not twice or guided.all():
        found |= {
            "embed": given,
            "layer": (params.rest["blocks"], params.layers[0], index, x, *told),
            "head": (params.rest, x, embedded.embedding),
        }
    if carry.state is not None:
        found |= {"guess": (carry.state, index, row.step.sigma), "keep": (carry.state, index, latents, row.step.sigma)}
    return found | ({"combine": (pair, scale)} if twice else {"add": (latents, scale, latents)})


def embed(
    config: DiTConfig, rest: Any, latents: jax.Array, timestep: jax.Array, conditions: Conditions, table: RopeTable
) -> Embedded:
    """What comes before the blocks, of latents [B, F, h, w, C] at a timestep []."""
    timesteps = jnp.broadcast_to(timestep, latents.shape[:1]).astype(jnp.float32)
    return Embed(config).apply({"params": rest}, latents, timesteps, conditions, table)


def layer(
    config: DiTConfig,
    blocks: Any,
    kernels: Any,
    index: jax.Array,
    donated: jax.Array,
    embedded: Embedded,
    control: CrossControl | None,
    strength: jax.Array | None,
    bias: CrossBias | None,
    *,
    grid: tuple[int, int, int],
) -> tuple[jax.Array, jax.Array]:
    """One block.

    Args:
      blocks: stacked parameters without the kernels.
      kernels: of this layer, by path.
      index: of the layer, int32 [].
      donated: tokens [B, S', D].
      embedded: without tokens.
      strength, bias: of all layers.

    Returns:
      Tokens, and a number that is there when they are.
    """

    def one(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(leaf, index, 1)

    flat = {f"blocks/{path}": one(leaf) for path, leaf in flatten_dict(blocks, sep="/").items()}
    flat |= {path: leaf[None] for path, leaf in kernels.items()}
    own = jax.tree.map(one, bias), control, jax.tree.map(one, strength)
    params = {"params": unflatten_dict(flat, sep="/")}
    x = Blocks(config).apply(params, embedded.replace(x=donated), grid, 1, *own)
    return x, x[0, 0, 0]


def head(config: DiTConfig, rest: Any, x: jax.Array, embedding: jax.Array, *, grid: tuple[int, int, int]) -> jax.Array:
    """Velocity float32 [B, F, h, w, C] of tokens."""
    return Head(config).apply({"params": rest}, x, embedding, grid)


def add(_: None, velocity: jax.Array, weight: jax.Array, one: jax.Array) -> jax.Array:
    """One pass more in the sum of them."""
    return velocity + weight * one.astype(jnp.float32)


def combine(_: None, pair: jax.Array, scale: jax.Array) -> jax.Array:
    """Guidance of both passes [2B, ...], the conditional first."""
    conditional, unconditional = jnp.split(pair.astype(jnp.float32), 2)
    return unconditional + scale * (conditional - unconditional)


def guess(_: None, past: Past, index: jax.Array, sigma: jax.Array) -> jax.Array:
    """The velocity of a pass that is skipped."""
    return past.guess(index, sigma)


def keep(_: None, past: Past, index: jax.Array, velocity: jax.Array, sigma: jax.Array) -> Past:
    """The past with the velocity of a pass that was run."""
    return past.after(index, velocity, sigma)


def advance(_: None, carry: Carry, velocity: jax.Array, step: StepTable, index: jax.Array) -> Carry:
    """One step of the solver."""
    return sample.step(carry, velocity, step, index)
