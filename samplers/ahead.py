"""The programs of one clip, compiled in the background while its weights are read."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from samplers import pipeline
from samplers.plan import Plan
from wanjax import checkpoint
from wanjax.types import Conditions


@contextmanager
def compile_ahead(plan: Plan, chunk: int = 1) -> Iterator[Callable[[str], Any]]:
    """Compiles the programs of one clip in the background, while weights are read; for one device.

    Yields a function to call before each stage with its name: it waits for that stage's programs, and raises what
    their compilation raised. The ordinary calls then find them compiled.
    """
    pool = ThreadPoolExecutor(max_workers=5, thread_name_prefix="compile")
    try:
        futures = {
            stage: [pool.submit(lambda lower=lower: lower(plan, chunk).compile()) for lower in lowers]
            for stage, lowers in _LOWERED.items()
        }
        yield lambda stage: [future.result() for future in futures[stage]]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _struct(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _lower_text(plan: Plan, chunk: int) -> Any:
    ids = _struct(2, plan.config.dit.text_length, dtype=np.int32)
    return pipeline._encode_text.lower(plan.config.umt5, checkpoint.param_shapes(plan.config)["umt5"], ids, ids)


def _lower_images(plan: Plan, chunk: int) -> Any:
    side, count = plan.config.clip.image_size, len([slot for slot in pipeline.image_slots(plan) if slot is not None])
    pixels = _struct(count, side, side, 3)
    return pipeline._encode_images.lower(plan.config.clip, checkpoint.param_shapes(plan.config)["clip"], pixels)


def _lower_keyframes(plan: Plan, chunk: int) -> Any:
    pixels = _struct(1, len(plan.at), *plan.settings.size, 3)
    shapes = checkpoint.param_shapes(plan.config)["vae"]
    return pipeline._encode_keyframes.lower(plan.config.vae, shapes, pixels, at=plan.at, frames=plan.settings.frames)


def _lower_decode(plan: Plan, chunk: int) -> Any:
    return pipeline._decode.lower(
        plan.config.vae, checkpoint.param_shapes(plan.config)["vae"], _struct(1, *plan.latent_shape)
    )


def _lower_noise(plan: Plan, chunk: int) -> Any:
    return pipeline._noise.lower((1, *plan.latent_shape), _struct(dtype=np.uint32))


def _lower_denoise(plan: Plan, chunk: int) -> Any:
    d = plan.config.dit
    text = _struct(1, d.text_length, d.text_dim, dtype=_lower_text(plan, chunk).out_info[0].dtype)
    images = _struct(1, d.num_images, d.image_tokens, d.image_dim, dtype=_lower_images(plan, chunk).out_info[0].dtype)
    latent = _struct(1, *plan.latent_shape[:-1], d.condition_channels,
                     dtype=_lower_keyframes(plan, chunk).out_info[0].dtype)  # fmt: skip
    carry = jax.eval_shape(lambda noise: pipeline.start(plan, noise), _struct(1, *plan.latent_shape))
    table, method = jax.tree.map(lambda leaf: _struct(*np.shape(leaf), dtype=leaf.dtype), (plan.table, plan.method))
    return pipeline._denoise.lower(
        d, checkpoint.param_shapes(plan.config)["dit"], carry, table, _struct(dtype=np.int32),
        Conditions(text, images, latent), text, method, None, n=chunk, guidance_mode=plan.settings.guidance_mode,
    )  # fmt: skip


_LOWERED = MappingProxyType(
    {"denoise": (_lower_denoise, _lower_noise), "decode": (_lower_decode,),
     "encode": (_lower_keyframes, _lower_text, _lower_images)}
)  # fmt: skip
"""The programs of each stage, the longest first."""
