"""LoRA of the transformer as a pytree: adapters beside frozen weights, applied as they are, or merged.

To a linear layer with kernel W [I, O] an adapter adds scale * x A B, with A [I, r] ("down") and B [r, O] ("up"), both
float32. A starts random and B at zero, so a new adapter changes nothing ("LoRA", arXiv 2106.09685; A as in PEFT).

    own = lora.init(key, params, rank=32)
    loss = lambda own: flow.mse(lora.apply(WanDiT(config), params, own, noisy, timestep, conditions, table), velocity)
    gradient = jax.grad(loss)(own)              # of the adapters alone
    better = lora.merge(params, own)            # ordinary parameters; `convert.loratree.save` writes a file instead

`apply` leaves W as it is: the layer computes x A B beside x W, for each block inside the scan over blocks. That takes
the adapters and [tokens, r] activations, and no gradient of W is ever made. The other way, to merge inside the function
that is differentiated, needs a second copy of all adapted kernels and a third as their gradient: 28 GB each for the
usual targets of FLF2V-14B in bfloat16. W may be anything that `layers.Dense` reads, 8-bit codes too.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from wanjax.layers import Dense, dot

TARGETS = r"^blocks/((self|cross)_attn/(q|k|v|o)|ffn_(in|out))$"
"""The linears that most trainers of Wan2.1 adapt: attention's and the feed-forward's, not those of the images' keys."""

DOWN, UP = "lora_down", "lora_up"


@struct.dataclass
class Lora:
    """Adapters of some linears of one model. Everything in it is trained; the scale is not part of the pytree's leaves.

    Attributes:
      weights: as in the parameters, at the place of each adapted linear {"lora_down": [I, r], "lora_up": [r, O]}, in
        blocks with the layer axis in front; float32.
      scale: alpha / r.
    """

    weights: Mapping[str, Any]
    scale: float = struct.field(pytree_node=False, default=1.0)

    @property
    def rank(self) -> int:
        """Of all of its adapters."""
        return next(leaf.shape[-1] for path, leaf in flatten_dict(self.weights).items() if path[-1] == DOWN)

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the adapted linears, such as "blocks/self_attn/q", in order."""
        return tuple(sorted(path.removesuffix(f"/{DOWN}") for path in flatten_dict(self.weights, sep="/")
                            if path.endswith(f"/{DOWN}")))  # fmt: skip


def init(key: jax.Array, params: Any, rank: int = 16, alpha: float | None = None, targets: str = TARGETS) -> Lora:
    """New adapters, which change nothing yet.

    Args:
      params: of the transformer, arrays or `jax.ShapeDtypeStruct`s.
      rank: r.
      alpha: default r. Another one is read from a saved file by what reads diffusers' settings in it, and not by all
        programs.
      targets: a regular expression that is searched for in the paths of linears ("blocks/cross_attn/k_image",
        "text_in").

    Returns:
      A uniform within 1 / sqrt(I), B zero.

    Raises:
      ValueError: nothing matches, a bad rank or alpha.
    """
    alpha = float(rank if alpha is None else alpha)
    if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"LoRA of rank {rank} and alpha {alpha}: both must be positive")
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"targets {targets!r}: not a regular expression ({error})") from error
    linears = {path: kernel.shape for path, kernel in _kernels(params).items() if pattern.search(path)}
    if not linears:
        raise ValueError(f"targets {targets!r}: match none of {', '.join(sorted(_kernels(params)))}")
    weights = {}
    for (path, (*layers, width, out)), own in zip(
        sorted(linears.items()), jax.random.split(key, len(linears)), strict=True
    ):
        bound = 1 / math.sqrt(width)
        weights[f"{path}/{DOWN}"] = jax.random.uniform(own, (*layers, width, rank), jnp.float32, -bound, bound)
        weights[f"{path}/{UP}"] = jnp.zeros((*layers, rank, out), jnp.float32)
    return Lora(unflatten_dict(weights, sep="/"), alpha / rank)


def apply(model: nn.Module, params: Any, lora: Lora, *args: Any, **kwargs: Any) -> Any:
    """`model.apply({"params": params}, *args, **kwargs)` with adapters; for jit, grad and any mesh.

    Args:
      model: of linears that are `layers.Dense`, such as `dit.WanDiT`.
      params, lora: what the model has and what is added. The adapters' products are in the compute dtype, their sum
        with the linear's output is taken in float32.

    Raises:
      ValueError: adapters for linears that the parameters lack, or of another size.
    """
    with nn.intercept_methods(partial(_adapted, lora.scale)):
        return model.apply({"params": _joined(params, lora)}, *args, **kwargs)


def merge(params: Any, lora: Lora) -> Any:
    """Parameters with the adapters added to their kernels: in float32, rounded to the kernel's dtype, layer by layer.

    Raises:
      ValueError: as `apply`; 8-bit kernels.
    """
    flat = flatten_dict(_joined(params, lora), sep="/")
    for path in lora.paths:
        if f"{path}/factor" in flat:
            raise ValueError(
                f"{path} is stored in 8 bits, into which nothing is merged; load the model without --weights"
            )
        kernel, down, up = (flat.pop(f"{path}/{name}") for name in ("kernel", DOWN, UP))
        one = partial(_merged, scale=lora.scale)
        flat[f"{path}/kernel"] = one((kernel, down, up)) if kernel.ndim == 2 else lax.map(one, (kernel, down, up))
    return unflatten_dict(flat, sep="/")


def _merged(arrays: tuple[jax.Array, jax.Array, jax.Array], scale: float) -> jax.Array:
    kernel, down, up = arrays
    product = jnp.matmul(down, up, precision=lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)


def _kernels(params: Any) -> dict[str, Any]:
    """Kernels of linears by the path of the linear."""
    flat = flatten_dict(params, sep="/")
    return {path.removesuffix("/kernel"): leaf for path, leaf in flat.items() if path.endswith("/kernel")}


def _joined(params: Any, lora: Lora) -> dict[str, Any]:
    """One tree of both; `layers.Dense` does not look at what it does not know."""
    kernels, flat = _kernels(params), flatten_dict(lora.weights, sep="/")
    for path in lora.paths:
        if path not in kernels:
            raise ValueError(f"LoRA of {path}: no linear of this model")
        down, up = flat[f"{path}/{DOWN}"].shape, flat[f"{path}/{UP}"].shape
        *layers, width, out = kernels[path].shape
        if down != (*layers, width, down[-1]) or up != (*layers, down[-1], out):
            sizes = f"{list(kernels[path].shape)}: down {list(down)}, up {list(up)}"
            raise ValueError(f"LoRA of {path} {sizes} do not fit; it was made for another model")
    return unflatten_dict(flatten_dict(params, sep="/") | flat, sep="/")


def _adapted(scale: float, call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
    """What Flax calls in the place of every method; linears that have adapters get them."""
    y, module = call(*args, **kwargs), context.module
    if context.method_name != "__call__" or not isinstance(module, Dense) or not module.has_variable("params", DOWN):
        return y
    (x,) = args
    down, up = (module.get_variable("params", name) for name in (DOWN, UP))
    added = dot(dot(x, down, module.precision), up, module.precision)
    return (y.astype(jnp.float32) + scale * added.astype(jnp.float32)).astype(y.dtype)
