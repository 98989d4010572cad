"""I3D on Kinetics-400: the inflated Inception v1 (Carreira and Zisserman, CVPR 2017) whose logits FVD compares.

Axis letters: N videos, T frames, H height, W width, C channels. Layers and names are those of the public torch port,
whose padding is TensorFlow's "SAME": ceil(size / stride) outputs, the odd pixel of padding behind. That port pads its
pools with zeros; no map is negative there, so leaving the padding out of the maximum gives the same.

FVD (Unterthiner et al., arXiv 1812.01717) used TensorFlow's first resize, which lines up pixel corners where this one
lines up centres: numbers agree with torch implementations of FVD, and only nearly with TensorFlow's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks.tgi.networks import layers
from benchmarks.tgi.networks.layers import Chain, Fork, Pool, Unit
from benchmarks.tgi.networks.layout import Entry, from_tensors
from convert.keymap import CONV3D, SAME, patch

NAME = "i3d"
VERSION = "kinetics-400"

SIZE = 224
"""Pixels on a side that every frame is brought to."""
CLASSES = 400
MIN_FRAMES = 9
"""Three strides of 2 leave ceil(T / 8) steps in time, and the last pool takes two of them."""

# Block -> channels of the 1x1x1 branch, of the two branches of 1x1x1 and 3x3x3, and of the one behind the pool.
BLOCKS = (
    ("Mixed_3b", (64, 96, 128, 16, 32, 32)),
    ("Mixed_3c", (128, 128, 192, 32, 96, 64)),
    Pool("max", (3, 3, 3), (2, 2, 2)),
    ("Mixed_4b", (192, 96, 208, 16, 48, 64)),
    ("Mixed_4c", (160, 112, 224, 24, 64, 64)),
    ("Mixed_4d", (128, 128, 256, 24, 64, 64)),
    ("Mixed_4e", (112, 144, 288, 32, 64, 64)),
    ("Mixed_4f", (256, 160, 320, 32, 128, 128)),
    Pool("max", (2, 2, 2), (2, 2, 2)),
    ("Mixed_5b", (256, 160, 320, 32, 128, 128)),
    ("Mixed_5c", (384, 192, 384, 48, 128, 128)),
)


def chain() -> Chain:
    """The whole network up to the last feature map."""
    point, cube = (1, 1, 1), (3, 3, 3)
    halve = Pool("max", (1, 3, 3), (1, 2, 2))  # in space only
    return (
        Unit("Conv3d_1a_7x7", 64, (7, 7, 7), 2),
        halve,
        Unit("Conv3d_2b_1x1", 64, point),
        Unit("Conv3d_2c_3x3", 192, cube),
        halve,
        *(block if isinstance(block, Pool) else _mixed(*block) for block in BLOCKS),
    )


def _mixed(name: str, widths: tuple[int, ...]) -> Fork:
    point, cube = (1, 1, 1), (3, 3, 3)
    b0, b1a, b1b, b2a, b2b, b3b = widths
    chains = (
        (Unit("b0", b0, point),),
        (Unit("b1a", b1a, point), Unit("b1b", b1b, cube)),
        (Unit("b2a", b2a, point), Unit("b2b", b2b, cube)),
        (Pool("max", cube, point), Unit("b3b", b3b, point)),
    )
    return Fork(chains, name)


# Our names of a unit's parameters -> the file's.
LEAVES = {
    "kernel": "conv3d.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "var": "bn.running_var",
}


def shapes() -> dict[str, Any]:
    """The parameters, float32, by block and unit: "kernel" [t, h, w, I, O]; "scale", "bias", "mean", "var" [O].

    And "logits": "kernel" [I, O], "bias" [O].
    """
    params, channels = layers.shapes(chain(), 3)
    return params | {"logits": {"kernel": layers.array(channels, CLASSES), "bias": layers.array(CLASSES)}}


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters from the tensors of i3d_pretrained_400.pt, or of a file with the same names (rgb_imagenet.pt).

    Raises:
      ValueError: missing, unexpected and wrongly shaped tensors, all of them.
    """
    entries, unused = [], {}
    for (*unit, leaf), array in flatten_dict(shapes()).items():
        name = ".".join(unit)
        if unit == ["logits"]:
            transform, foreign = {"kernel": (patch((1, 1, 1)), "weight"), "bias": (SAME, "bias")}[leaf]
            entries.append(Entry(f"{name}.conv3d.{foreign}", (*unit, leaf), array.shape, transform))
            continue
        transform = CONV3D if leaf == "kernel" else SAME
        entries.append(Entry(f"{name}.{LEAVES[leaf]}", (*unit, leaf), array.shape, transform))
        unused[f"{name}.bn.num_batches_tracked"] = ()  # newer torch writes it, no inference reads it
    return from_tensors(entries, tensors, unused)


def features(params: Mapping[str, Any], video: jax.Array) -> jax.Array:
    """The logits of each video, averaged over time.

    Args:
      params: as `shapes`.
      video: [N, T, H, W, 3], uint8, or floating point from -1 to 1; at least MIN_FRAMES frames, of any size.

    Returns:
      float32 [N, 400].

    Raises:
      ValueError: fewer frames, or another shape or dtype.
    """
    x = _scaled(video)
    x = layers.run(chain(), params, layers.resized(x, SIZE))
    # [N, t, 7, 7, 1024]: averages of 2x7x7, one for each pair of neighbouring steps in time.
    x = jnp.mean(x, axis=(2, 3))
    x = (x[:, 1:] + x[:, :-1]) / 2
    logits = jnp.einsum("ntc,co->nto", x, params["logits"]["kernel"], precision=jax.lax.Precision.HIGHEST)
    return jnp.mean(logits + params["logits"]["bias"], axis=1)


def _scaled(video: jax.Array) -> jax.Array:
    """Pixels in float32 from -1 to 1."""
    if video.ndim != 5 or video.shape[-1] != 3 or not all(video.shape):
        raise ValueError(f"a video of shape {list(video.shape)}; I3D takes [N, T, H, W, 3]")
    if video.shape[1] < MIN_FRAMES:
        raise ValueError(f"a video of {video.shape[1]} frames; I3D, and so FVD, needs at least {MIN_FRAMES}")
    if video.dtype == jnp.uint8:
        return jnp.asarray(video, jnp.float32) / 127.5 - 1.0
    if not jnp.issubdtype(video.dtype, jnp.floating):
        raise ValueError(f"a video of {video.dtype}; I3D takes uint8, or floating point from -1 to 1")
    return jnp.asarray(video, jnp.float32)
