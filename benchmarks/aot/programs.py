"""The sampler's own programs, lowered for devices that are not there: `samplers.ahead`'s calls with shardings."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from benchmarks import flops
from samplers.ahead import CALLS, Call
from samplers.plan import Plan
from wanjax import sharding

PARTS: tuple[str, ...] = ("denoise", "text", "images", "keyframes", "decode")
"""Programs that take time; a guided step is one call of "denoise"."""

_VIDEO = ("carry", "conditions", "latents")
"""Arguments whose arrays [B, F, h, w, C] are put by `sharding.video_spec`; other arrays are whole on every device."""


def call(part: str, plan: Plan, devices: Sequence[Any], mesh: Mesh | None) -> Call:
    """One of PARTS as the pipeline calls it, its arrays on the mesh, or without one on the first device."""
    plain = CALLS[part](plan, 1)
    bound = inspect.signature(plain.function).bind_partial(*plain.args)
    placed = {name: _placed(name, value, devices, mesh) for name, value in bound.arguments.items()}
    return plain._replace(args=tuple(placed.values()))


def lower(call: Call, mesh: Mesh | None) -> jax.stages.Lowered:
    """Traces and lowers as the pipeline does, on the mesh."""
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        return call.lower()


def _placed(name: str, value: Any, devices: Sequence[Any], mesh: Mesh | None) -> Any:
    whole = P()

    def one(leaf: Any, spec: P = whole) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        place = SingleDeviceSharding(devices[0]) if mesh is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def video(leaf: Any) -> Any:
        rows = mesh is not None and getattr(leaf, "ndim", 0) == 5
        return one(leaf, sharding.video_spec(leaf.shape, mesh)) if rows else one(leaf)

    if name == "params" and mesh is not None:
        return jax.tree.map(one, value, sharding.specs(value, mesh=mesh))
    return jax.tree.map(video if name in _VIDEO else one, value)


def operations(part: str, plan: Plan) -> int | None:
    """Matrix products and convolutions of the whole call by formula, on however many devices; None without a formula.

    KAB's own are not in it: outside its window they are not done.
    """
    formula = _FORMULAS.get(part)
    return None if formula is None else flops.total(formula(plan))


_FORMULAS: Mapping[str, Callable[[Plan], flops.Count]] = MappingProxyType(
    {
        "denoise": lambda plan: flops.dit(plan.config.dit, plan.latent_shape[:3], batch=2),
        "keyframes": lambda plan: flops.vae_encode(plan.config.vae, plan.settings.frames, plan.settings.size),
        "decode": lambda plan: flops.vae_decode(plan.config.vae, plan.settings.frames, plan.settings.size),
    }
)
