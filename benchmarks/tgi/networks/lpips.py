"""LPIPS v0.1 with AlexNet: how different two images look, by the distance of their features.

Both images go through the five convolutions of AlexNet; at each of them the feature vectors of every place are scaled
to length one, their squared difference is weighed channel by channel with learnt weights, and the mean over all places
is taken. The sum over the five is the distance. Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features
as a Perceptual Metric" (CVPR 2018, arXiv 1801.03924) and the PyPI package `lpips` 0.1.4, `LPIPS(net="alex")`.

Axes: N images, H height, W width, C channels, I and O channels in and out of a convolution.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.tgi.networks.layout import Entry, from_tensors, shapes_of
from convert.keymap import CONV2D, SAME, Transform

NAME = "lpips"
VERSION = "v0.1-alex"

MIN_SIZE = 31
"""The smallest height and width: below, the second pooling has fewer than three rows to look at."""

EPSILON = 1e-10

# Of images in [-1, 1]: what brings them to the ImageNet mean and deviation that AlexNet was trained with.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Layer:
    """One convolution of AlexNet, with the ReLU after it.

    Attributes:
      number: in torchvision's `features`.
      inputs, outputs: channels.
      kernel, stride, padding: in pixels, the same along H and W.
      pool: whether a 3x3 maximum with stride 2 comes first.
    """

    number: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    pool: bool


LAYERS = (
    Layer(0, 3, 64, 11, 4, 2, pool=False),
    Layer(3, 64, 192, 5, 1, 2, pool=True),
    Layer(6, 192, 384, 3, 1, 1, pool=True),
    Layer(8, 384, 256, 3, 1, 1, pool=False),
    Layer(10, 256, 256, 3, 1, 1, pool=False),
)

UNUSED: MappingProxyType[str, tuple[int, ...]] = MappingProxyType(
    {
        "classifier.1.weight": (4096, 9216),
        "classifier.1.bias": (4096,),
        "classifier.4.weight": (4096, 4096),
        "classifier.4.bias": (4096,),
        "classifier.6.weight": (1000, 4096),
        "classifier.6.bias": (1000,),
    }
)
"""Of torchvision's file: the head, which no feature comes from."""


# A convolution to one channel without bias, [1, C, 1, 1] in the file.
LIN = Transform(lambda x: x.reshape(-1), lambda x: x.reshape(1, -1, 1, 1), lambda s: (1, *s, 1, 1))


def _entries() -> list[Entry]:
    entries = []
    for i, layer in enumerate(LAYERS):
        k, inputs, outputs = layer.kernel, layer.inputs, layer.outputs
        entries += [
            Entry(f"features.{layer.number}.weight", (f"conv{i}", "kernel"), (k, k, inputs, outputs), CONV2D),
            Entry(f"features.{layer.number}.bias", (f"conv{i}", "bias"), (outputs,), SAME),
            Entry(f"lin{i}.model.1.weight", (f"lin{i}", "weight"), (outputs,), LIN),
        ]
    return entries


def shapes() -> dict[str, Any]:
    """The parameters: conv0 .. conv4 {"kernel" [h, w, I, O], "bias" [O]} and lin0 .. lin4 {"weight" [C]}, float32."""
    return shapes_of(_entries())


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters from the tensors of two published files together.

    Args:
      tensors: those of torchvision's alexnet-owt-7be5be79.pth and of weights/v0.1/alex.pth of the `lpips` package.

    Raises:
      ValueError: missing, unexpected and wrongly shaped tensors, all of them.
    """
    return from_tensors(_entries(), tensors, UNUSED)


def distance(params: Mapping[str, Any], a: jax.Array, b: jax.Array) -> jax.Array:
    """How different two images look; 0, up to rounding, for equal ones.

    Args:
      params: as `shapes`.
      a, b: uint8 [N, H, W, 3], H and W at least `MIN_SIZE`.

    Returns:
      float32 [N].

    Raises:
      ValueError: other shapes or dtypes, or images that are too small.
    """
    _check(a, b)
    x = jnp.concatenate([a, b]).astype(jnp.float32) / 127.5 - 1
    x = (x - jnp.array(SHIFT, jnp.float32)) / jnp.array(SCALE, jnp.float32)
    total = jnp.zeros(len(a), jnp.float32)
    for i, layer in enumerate(LAYERS):
        x = _layer(params[f"conv{i}"], layer, x)
        first, second = jnp.split(_unit(x), 2)
        total += ((first - second) ** 2 * params[f"lin{i}"]["weight"]).sum(-1).mean((1, 2))
    return total


def _check(a: jax.Array, b: jax.Array) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or not a.dtype == b.dtype == jnp.uint8:
        raise ValueError(
            f"two uint8 [N, H, W, 3] of one size are wanted, not {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
    if min(a.shape[1:3]) < MIN_SIZE:
        raise ValueError(f"images of {a.shape[1]}x{a.shape[2]}: AlexNet takes none smaller than {MIN_SIZE}x{MIN_SIZE}")


def _layer(params: Mapping[str, jax.Array], layer: Layer, x: jax.Array) -> jax.Array:
    if layer.pool:
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
    # Highest precision: an accelerator's short floats would show in a distance of nearly equal images.
    x = lax.conv_general_dilated(
        x,
        params["kernel"],
        (layer.stride, layer.stride),
        [(layer.padding, layer.padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    return jax.nn.relu(x + params["bias"])


def _unit(x: jax.Array) -> jax.Array:
    """Feature vectors scaled to length one; zeros stay zeros."""
    return x / (jnp.sqrt((x**2).sum(-1, keepdims=True)) + EPSILON)
