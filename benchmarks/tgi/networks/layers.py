"""What the networks are written in: chains of convolutions, pools and forks as data, and one interpreter of them.

Axis letters: N images or videos, T frames, H height, W width, C channels. A chain runs over [N, H, W, C] or over
[N, T, H, W, C]; the rank of its kernels says which. Everything is float32, and products are asked for at full
precision, because an accelerator's shortened float32 would move the distances.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

NORM_EPSILON = 1e-3
"""Of every batch norm here, in the Inception of FID and in I3D alike."""


@dataclass(frozen=True)
class Unit:
    """Convolution without bias, batch norm with stored statistics, ReLU.

    Attributes:
      name: of its parameters: kernel [*kernel, C, width], and scale, bias, mean, var [width].
      width: channels out.
      kernel, stride: along each of the axes between N and C; one stride for all.
      padding: "SAME" (TensorFlow's: what is over after halving goes behind) or "VALID".
    """

    name: str
    width: int
    kernel: tuple[int, ...]
    stride: int = 1
    padding: str = "SAME"


@dataclass(frozen=True)
class Pool:
    """Maximum or average over a window; what lies outside counts for neither."""

    kind: str  # "max" or "average"
    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str = "SAME"


@dataclass(frozen=True)
class Fork:
    """Chains over the same input, joined on the channels. With a name, their parameters lie under it."""

    chains: tuple[Chain, ...]
    name: str | None = None


Chain = tuple[Unit | Pool | Fork, ...]


def run(chain: Chain, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """A chain over features.

    Args:
      params: as `shapes` says.
      x: float32, channels last.
    """
    for step in chain:
        match step:
            case Unit():
                x = _unit(step, params[step.name], x)
            case Pool("max"):
                x = nn.max_pool(x, step.window, step.stride, step.padding)
            case Pool():
                x = nn.avg_pool(x, step.window, step.stride, step.padding, count_include_pad=False)
            case Fork():
                inner = params if step.name is None else params[step.name]
                x = jnp.concatenate([run(one, inner, x) for one in step.chains], axis=-1)
    return x


def shapes(chain: Chain, channels: int) -> tuple[dict[str, Any], int]:
    """The parameters of a chain as a nested dict of float32 `jax.ShapeDtypeStruct`, and its channels out.

    Args:
      channels: of its input.
    """
    found: dict[str, Any] = {}
    for step in chain:
        match step:
            case Unit():
                vectors = {leaf: array(step.width) for leaf in ("scale", "bias", "mean", "var")}
                found[step.name] = {"kernel": array(*step.kernel, channels, step.width)} | vectors
                channels = step.width
            case Fork():
                parts = [shapes(one, channels) for one in step.chains]
                inner = {name: leaf for params, _ in parts for name, leaf in params.items()}
                found |= inner if step.name is None else {step.name: inner}
                channels = sum(width for _, width in parts)
    return found, channels


def array(*shape: int) -> jax.ShapeDtypeStruct:
    """A float32 parameter of this shape."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _unit(unit: Unit, params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    x = convolve(x, params["kernel"], unit.stride, unit.padding)
    scale = params["scale"] * lax.rsqrt(params["var"] + NORM_EPSILON)
    return jax.nn.relu((x - params["mean"]) * scale + params["bias"])


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: str | tuple[tuple[int, int], ...]) -> jax.Array:
    """Convolution of [N, *axes, C] with [*window, C, O], as deep-learning libraries have it (not flipped)."""
    rank = kernel.ndim - 2
    axes = "DHW"[3 - rank :]
    names = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(
        x, kernel, (stride,) * rank, padding, dimension_numbers=names, precision=lax.Precision.HIGHEST
    )


def resized(x: jax.Array, size: int) -> jax.Array:
    """[..., H, W, C] at [..., size, size, C]: bilinear between pixel centres, not antialiased, edges repeated.

    The same as torch's `interpolate(mode="bilinear", align_corners=False)`.
    """
    shape = (*x.shape[:-3], size, size, x.shape[-1])
    return jax.image.resize(x, shape, "bilinear", antialias=False)
