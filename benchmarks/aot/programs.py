"""The sampler's own programs, lowered for devices that are not there: from shapes with shardings."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from samplers import ahead, flops
from samplers.plan import Plan
from samplers.programs import Programs, evaluator
from samplers.streamed import Loop
from wanjax import sharding
from wanjax.config import DiTConfig
from wanjax.method import MethodArrays
from wanjax.types import Conditions

PARTS: tuple[str, ...] = ("denoise", "text", "images", "keyframes", "decode", "forward")
"""Programs that take time; a guided step is one call of "denoise", or of a transformer whose layers the host calls in
turn, one layer of one pass. "forward" is no program of a run but one pass of the transformer alone, under a method."""

PICTURES = ("keyframes", "decode")
"""Those that run on `sharding.picture_mesh`."""


def lower(part: str, plan: Plan, devices: Sequence[Any], mesh: Mesh | None) -> jax.stages.Lowered:
    """Traces and lowers one of PARTS as the pipeline does: weights by `sharding.specs`, all else whole, as is right for
    one clip, on the mesh, or without one on the first device."""
    if part == "forward":
        program, arguments = partial(jax.jit(forward, static_argnums=0), plan.config.dit), _of_forward(plan)
    else:
        program, arguments = getattr(Programs.of(plan, platform=devices[0].platform), part), ahead.shapes(plan)[part]
    if isinstance(program, Loop):  # the host calls several programs: the one that takes the time
        program, arguments = program.layer, arguments["layer"]
    params, *arrays = arguments
    if mesh is None:
        params, arrays = jax.tree.map(partial(_alone, devices[0]), (params, arrays))
    else:
        params = jax.tree.map(lambda leaf, spec: _on(leaf, NamedSharding(mesh, spec)), params,
                              sharding.specs(params, mesh=mesh))  # fmt: skip
        arrays = jax.tree.map(lambda leaf: _on(leaf, NamedSharding(mesh, P())), arrays)
    used = mesh if mesh is None or part not in PICTURES else sharding.picture_mesh(mesh, plan.latent_shape[1:3])
    with jax.set_mesh(used) if used is not None else nullcontext():
        return program.func.lower(*program.args, params, *arrays, **program.keywords)


def forward(
    config: DiTConfig,
    params: Any,
    latents: jax.Array,
    timestep: jax.Array,
    conditions: Conditions,
    method: MethodArrays,
    strength: jax.Array | None,
) -> jax.Array:
    """One pass of the transformer."""
    return evaluator(config, params, method)(latents, timestep, conditions, strength, None)


def _of_forward(plan: Plan) -> tuple:
    """What `forward` is called with for one clip, as shapes."""
    if plan.config.dit.stream != "no":
        raise ValueError("forward: a streamed transformer has no pass of its own; take denoise")
    params, carry, table, _, conditions, _, method, _ = ahead.shapes(plan)["denoise"]
    row = None if table.strength is None else jax.ShapeDtypeStruct(
        (table.strength.shape[1], 1, table.strength.shape[2]), table.strength.dtype)  # fmt: skip
    return params, carry.sample, jax.ShapeDtypeStruct((1,), jnp.float32), conditions, method, row


def _alone(device: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """On one device, or in host memory beside it."""
    kind = None if leaf.sharding is None else leaf.sharding.memory_kind
    return _on(leaf, SingleDeviceSharding(device, memory_kind=kind))


def _on(leaf: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def operations(part: str, plan: Plan) -> int | None:
    """Matrix products and convolutions of the whole call by formula, on however many devices; None without a formula.

    KAB's own are not in it: outside its window they are not done.
    """
    formula = None if part == "denoise" and plan.config.dit.stream == "loop" else _FORMULAS.get(part)
    return None if formula is None else flops.total(formula(plan))


_FORMULAS: Mapping[str, Callable[[Plan], flops.Count]] = MappingProxyType(
    {
        "forward": lambda plan: flops.dit(plan.config.dit, plan.latent_shape[:3]),
        "denoise": lambda plan: flops.dit(plan.config.dit, plan.latent_shape[:3], batch=2),
        "keyframes": lambda plan: flops.vae_encode(plan.config.vae, plan.settings.frames, plan.settings.size),
        "decode": lambda plan: flops.vae_decode(plan.config.vae, plan.settings.frames, plan.settings.size),
    }
)
