"""The Inception v3 of FID: 2048 features of an image, those before the last linear layer.

It is the network of TensorFlow's 2015-12-05 release, which published FIDs come from, and differs from the common
Inception v3 in its pooling: means leave the padding out of the count, and the last block takes a maximum. Sources:
Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567); Heusel et al. (arXiv
1706.08500); the PyPI package `pytorch-fid` 0.3.0, whose weights and names are taken.

Axes: N images, H height, W width, C channels, I and O channels in and out of a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks.tgi.networks import layers
from benchmarks.tgi.networks.layers import Chain, Fork, Pool, Unit
from benchmarks.tgi.networks.layout import Entry, from_tensors
from convert.keymap import CONV2D, SAME

NAME = "inception"
VERSION = "2015-12-05"

SIZE = 299
"""Height and width that every image is brought to."""

FEATURES = 2048

UNUSED: MappingProxyType[str, tuple[int, ...]] = MappingProxyType({"fc.weight": (1008, FEATURES), "fc.bias": (1008,)})
"""Of the published file: the classifier, which no feature comes from."""

# Kernels, height first.
POINT, SQUARE, FIVE = (1, 1), (3, 3), (5, 5)
ACROSS, DOWN = (1, 7), (7, 1)

MEAN = Pool("average", (3, 3), (1, 1))  # over the pixels that are there: 9, at an edge 6, in a corner 4
MAX = Pool("max", (3, 3), (1, 1))
HALVE = Pool("max", (3, 3), (2, 2), "VALID")


def _tower(name: str, *units: tuple[Any, ...]) -> Chain:
    """Units in a row, numbered from 1: width, kernel, and where they differ stride and padding."""
    return tuple(Unit(f"{name}_{i}", *unit) for i, unit in enumerate(units, 1))


def _pair(name: str) -> Fork:
    """A 1x3 and a 3x1 convolution side by side."""
    return Fork(((Unit(f"{name}a", 384, (1, 3)),), (Unit(f"{name}b", 384, (3, 1)),)))


def _block_a(name: str, pooled: int) -> Fork:
    return Fork((
        (Unit("branch1x1", 64, POINT),),
        _tower("branch5x5", (48, POINT), (64, FIVE)),
        _tower("branch3x3dbl", (64, POINT), (96, SQUARE), (96, SQUARE)),
        (MEAN, Unit("branch_pool", pooled, POINT)),
    ), name)  # fmt: skip


def _block_b(name: str) -> Fork:
    return Fork((
        (Unit("branch3x3", 384, SQUARE, 2, "VALID"),),
        _tower("branch3x3dbl", (64, POINT), (96, SQUARE), (96, SQUARE, 2, "VALID")),
        (HALVE,),
    ), name)  # fmt: skip


def _block_c(name: str, inner: int) -> Fork:
    first = (inner, POINT)
    return Fork((
        (Unit("branch1x1", 192, POINT),),
        _tower("branch7x7", first, (inner, ACROSS), (192, DOWN)),
        _tower("branch7x7dbl", first, (inner, DOWN), (inner, ACROSS), (inner, DOWN), (192, ACROSS)),
        (MEAN, Unit("branch_pool", 192, POINT)),
    ), name)  # fmt: skip


def _block_d(name: str) -> Fork:
    return Fork((
        _tower("branch3x3", (192, POINT), (320, SQUARE, 2, "VALID")),
        _tower("branch7x7x3", (192, POINT), (192, ACROSS), (192, DOWN), (192, SQUARE, 2, "VALID")),
        (HALVE,),
    ), name)  # fmt: skip


def _block_e(name: str, pool: Pool) -> Fork:
    return Fork((
        (Unit("branch1x1", 320, POINT),),
        (Unit("branch3x3_1", 384, POINT), _pair("branch3x3_2")),
        (*_tower("branch3x3dbl", (448, POINT), (384, SQUARE)), _pair("branch3x3dbl_3")),
        (pool, Unit("branch_pool", 192, POINT)),
    ), name)  # fmt: skip


NETWORK: Chain = (
    Unit("Conv2d_1a_3x3", 32, SQUARE, 2, "VALID"),  # 149 x 149
    Unit("Conv2d_2a_3x3", 32, SQUARE, 1, "VALID"),
    Unit("Conv2d_2b_3x3", 64, SQUARE),
    HALVE,  # 73 x 73
    Unit("Conv2d_3b_1x1", 80, POINT),
    Unit("Conv2d_4a_3x3", 192, SQUARE, 1, "VALID"),
    HALVE,  # 35 x 35
    _block_a("Mixed_5b", 32),
    _block_a("Mixed_5c", 64),
    _block_a("Mixed_5d", 64),
    _block_b("Mixed_6a"),  # 17 x 17
    _block_c("Mixed_6b", 128),
    _block_c("Mixed_6c", 160),
    _block_c("Mixed_6d", 160),
    _block_c("Mixed_6e", 192),
    _block_d("Mixed_7a"),  # 8 x 8
    _block_e("Mixed_7b", MEAN),
    _block_e("Mixed_7c", MAX),
)

# Our names of a unit's parameters -> the file's.
LEAVES = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "var": "bn.running_var",
}


def shapes() -> dict[str, Any]:
    """The parameters, float32, by block and unit: "kernel" [h, w, I, O]; "scale", "bias", "mean", "var" [O]."""
    return layers.shapes(NETWORK, 3)[0]


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters from the tensors of pytorch-fid's pt_inception-2015-12-05-6726825d.pth.

    Raises:
      ValueError: missing, unexpected and wrongly shaped tensors, all of them.
    """
    entries, unused = [], dict(UNUSED)
    for (*unit, leaf), array in flatten_dict(shapes()).items():
        transform = CONV2D if leaf == "kernel" else SAME
        entries.append(Entry(".".join((*unit, LEAVES[leaf])), (*unit, leaf), array.shape, transform))
        unused[".".join((*unit, "bn.num_batches_tracked"))] = ()  # newer torch writes it, no inference reads it
    return from_tensors(entries, tensors, unused)


def features(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """The features that FID compares.

    Args:
      params: as `shapes`.
      images: uint8 [N, H, W, 3] of any size.

    Returns:
      float32 [N, 2048].

    Raises:
      ValueError: another shape or dtype.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or not all(images.shape) or images.dtype != jnp.uint8:
        raise ValueError(f"uint8 [N, H, W, 3] is wanted, not {images.dtype} {list(images.shape)}")
    # Shrunk without a low-pass: that is how FID's features are defined.
    x = layers.resized(images.astype(jnp.float32) / 255, SIZE)
    return layers.run(NETWORK, params, 2 * x - 1).mean((1, 2))
