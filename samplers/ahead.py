"""The programs of one clip from shapes alone: what each is called with, and their compilation in the background while
the weights are read."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from samplers import pipeline
from samplers.plan import Plan
from wanjax import checkpoint
from wanjax.types import Conditions


class Call(NamedTuple):
    """A jitted function and what the pipeline calls it with: static arguments, and shapes in the place of arrays."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = MappingProxyType({})

    def lower(self) -> jax.stages.Lowered:
        """Traces and lowers the function."""
        return self.function.lower(*self.args, **self.kwargs)

    def output(self) -> Any:
        """Shapes of what it returns."""
        return self.function.eval_shape(*self.args, **self.kwargs)


@contextmanager
def compile_ahead(plan: Plan, chunk: int = 1) -> Iterator[Callable[[str], Any]]:
    """Compiles the programs of one clip in the background, while weights are read; for one device.

    Yields a function to call before each stage with its name: it waits for that stage's programs, and raises what
    their compilation raised. The ordinary calls then find them compiled.
    """
    pool = ThreadPoolExecutor(max_workers=5, thread_name_prefix="compile")
    try:
        futures = {
            stage: [pool.submit(lambda name=name: CALLS[name](plan, chunk).lower().compile()) for name in names]
            for stage, names in _STAGES.items()
        }
        yield lambda stage: [future.result() for future in futures[stage]]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _struct(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _text(plan: Plan, chunk: int) -> Call:
    ids = _struct(2, plan.config.dit.text_length, dtype=np.int32)
    shapes = checkpoint.param_shapes(plan.config)["umt5"]
    return Call(pipeline._encode_text, (plan.config.umt5, shapes, ids, ids))


def _images(plan: Plan, chunk: int) -> Call:
    side, count = plan.config.clip.image_size, len([slot for slot in pipeline.image_slots(plan) if slot is not None])
    shapes = checkpoint.param_shapes(plan.config)["clip"]
    return Call(pipeline._encode_images, (plan.config.clip, shapes, _struct(count, side, side, 3)))


def _keyframes(plan: Plan, chunk: int) -> Call:
    pixels = _struct(1, len(plan.at), *plan.settings.size, 3)
    shapes = checkpoint.param_shapes(plan.config)["vae"]
    static = {"at": plan.at, "frames": plan.settings.frames}
    return Call(pipeline._encode_keyframes, (plan.config.vae, shapes, pixels), static)


def _decode(plan: Plan, chunk: int) -> Call:
    shapes = checkpoint.param_shapes(plan.config)["vae"]
    return Call(pipeline._decode, (plan.config.vae, shapes, _struct(1, *plan.latent_shape)))


def _noise(plan: Plan, chunk: int) -> Call:
    return Call(pipeline._noise, ((1, *plan.latent_shape), _struct(dtype=np.uint32)))


def _denoise(plan: Plan, chunk: int) -> Call:
    d = plan.config.dit
    text, images, latent = (call(plan, chunk).output()[0].dtype for call in (_text, _images, _keyframes))
    text = _struct(1, d.text_length, d.text_dim, dtype=text)
    images = _struct(1, d.num_images, d.image_tokens, d.image_dim, dtype=images)
    latent = _struct(1, *plan.latent_shape[:-1], d.condition_channels, dtype=latent)
    carry = jax.eval_shape(lambda noise: pipeline.start(plan, noise), _struct(1, *plan.latent_shape))
    table, method = jax.tree.map(lambda leaf: _struct(*np.shape(leaf), dtype=leaf.dtype), (plan.table, plan.method))
    params, first = checkpoint.param_shapes(plan.config)["dit"], _struct(dtype=np.int32)
    args = (d, params, carry, table, first, Conditions(text, images, latent), text, method, None)
    return Call(pipeline._denoise, args, {"n": chunk, "guidance_mode": plan.settings.guidance_mode})


CALLS: Mapping[str, Callable[[Plan, int], Call]] = MappingProxyType(
    {"text": _text, "images": _images, "keyframes": _keyframes, "noise": _noise, "denoise": _denoise,
     "decode": _decode}
)  # fmt: skip
"""Every program of a clip: (plan, steps that one call takes) -> `Call`."""

_STAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"denoise": ("denoise", "noise"), "decode": ("decode",), "encode": ("keyframes", "text", "images")}
)
"""The programs of each stage, the longest first."""
