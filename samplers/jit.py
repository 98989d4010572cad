"""How the functions of a run become programs. Axis letters as in `wanjax.types`."""

from collections.abc import Callable
from functools import cache
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any

import jax

LEVELS = MappingProxyType({"denoise": 1, "decode": 1, "encode_keyframes": 0, "encode_text": 0, "encode_images": 0,
                           "noise": 1, "embed": 1, "layer": 1, "head": 1, "add": 1, "combine": 1,
                           "advance": 1, "guess": 1, "keep": 1})  # fmt: skip
"""LLVM's optimisation level of each function on a CPU. The first compiles in two thirds of the third's time, and what
it makes runs as fast: XLA shapes the loops itself, products and convolutions are a library's. The zeroth compiles in
two fifths; the bundled model's keyframes are encoded in 1.4 times the time then, which is little beside the steps. The
noise of a seed has the same bits at the first and the third level, not at the zeroth."""

Program = Callable[..., Any]
"""From params and arrays to arrays."""


@cache
def jitted(function: Program, platform: str) -> Any:
    """One of the functions named in `LEVELS` jitted for a platform, the same at every call; its first and its named
    arguments are static, one that is called `donated` is given up."""
    named = [name for name, one in signature(function).parameters.items() if one.kind is Parameter.KEYWORD_ONLY]
    options = {"xla_backend_optimization_level": LEVELS[function.__name__]} if platform == "cpu" else None
    donated = [name for name in signature(function).parameters if name == "donated"]
    return jax.jit(function, static_argnums=0, static_argnames=named, donate_argnames=donated, compiler_options=options)
