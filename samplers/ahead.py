"""The programs of one clip, compiled or found in the background while its weights are read."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from samplers import kept, pipeline, streamed
from samplers.plan import Plan
from samplers.programs import Programs
from samplers.sample import Carry
from samplers.streamed import Loop
from wanjax import checkpoint, sharding, streaming
from wanjax.shapes import condition_shapes
from wanjax.types import Conditions

STAGES = MappingProxyType({"denoise": ("denoise", "noise"), "decode": ("decode",),
                           "encode": ("keyframes", "text", "images")})  # fmt: skip
"""The programs of each stage, in the order in which they are traced: the longest first."""


@contextmanager
def compile_ahead(plan: Plan, chunk: int = 1, folder: Path | None = None) -> Iterator[Callable[[str], Programs]]:
    """Compiles the programs of one clip in the background, while weights are read; for one device.

    Args:
      plan: of the clip.
      chunk: steps of one call.
      folder: where programs are kept, see `kept`; None for nowhere.

    Yields:
      A function to call before each stage with its name. It waits for that stage's programs and gives them, the others
      beside them as they are without; it raises what their compilation raised.
    """
    jitted, turn = Programs.of(plan, chunk), Lock()
    pool = ThreadPoolExecutor(max_workers=12, thread_name_prefix="compile")

    def submit(program: Any, arguments: Any) -> Callable[[], Any]:
        if isinstance(program, Loop):  # several in one's place
            parts = {name: submit(getattr(program, name), own) for name, own in arguments.items()}
            return lambda: replace(program, **{name: part() for name, part in parts.items()})
        return pool.submit(kept.compiled, program, arguments, folder, turn).result

    try:
        arguments = shapes(plan)
        compiled = {name: submit(getattr(jitted, name), arguments[name]) for names in STAGES.values() for name in names}
        yield lambda stage: replace(jitted, **{name: compiled[name]() for name in STAGES[stage]})
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def shapes(plan: Plan) -> dict[str, Any]:
    """What each of `Programs` is called with for one clip, as `jax.ShapeDtypeStruct`s; of a `Loop`, each of its own."""
    config, params = plan.config, checkpoint.param_shapes(plan.config)
    d, side = config.dit, config.clip.image_size
    seen = len([slot for slot in pipeline.image_slots(plan) if slot is not None])
    ids = _struct(2, d.text_length, dtype=np.int32)  # of the prompt and the negative one
    conditions, text = encoded(plan)
    latents = _struct(1, *plan.latent_shape)
    carry = jax.eval_shape(lambda noise: pipeline.start(plan, noise), latents)
    table, method = jax.tree.map(lambda leaf: _struct(*np.shape(leaf), dtype=leaf.dtype), (plan.table, plan.method))
    told = conditions, text, method, None
    dit = params["dit"] if d.stream == "no" else streaming.shapes(params["dit"], d.stream)
    looped = d.stream == "loop"
    return {
        "text": (params["umt5"], ids, ids),
        "images": (params["clip"], _struct(seen, side, side, 3)),
        "keyframes": (params["vae"], _struct(1, len(plan.at), *plan.settings.size, 3)),
        "noise": (_struct(dtype=np.uint32),),
        "denoise": streamed.shapes(plan, dit, carry, table, *told)
        if looped
        else (dit, carry, table, _struct(dtype=np.int32), *told),
        "decode": (params["vae"], latents),
    }


def encoded(plan: Plan) -> tuple[Conditions, jax.ShapeDtypeStruct]:
    """Conditions of one clip, and the text of the pass without prompt."""
    config, images = plan.config, len(pipeline.image_slots(plan))
    dtypes = {"text": config.umt5.precision.residual, "images": config.clip.precision.residual}
    wanted = condition_shapes(config.dit, 1, plan.latent_shape[:-1], images)
    found = {name: _struct(*shape, dtype=dtypes.get(name, "float32")) for name, shape in wanted.items()}
    return Conditions(**found), found["text"]


def start(plan: Plan, seeds: Sequence[int], mesh: Mesh | None) -> Carry:
    """The carry before the first step of clips without noise: its structure, and where its leaves lie."""
    latents = jnp.zeros((len(seeds), *plan.latent_shape), jnp.float32)
    return pipeline.start(plan, latents if mesh is None else sharding.shard_batch(latents, mesh), seeds)


def _struct(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))
