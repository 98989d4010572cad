"""Where arrays live: the mesh, and ordered rules from parameter paths to PartitionSpecs.

Mesh axes: `data` (batch and guidance passes), `fsdp` (weights, gathered as they are used), `sequence` (video
tokens), `tensor` (heads and ffn). XLA's partitioner does the rest: models only name axes (`layers.constrain`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "sequence", "tensor")

Rules = Sequence[tuple[str, P]]

RULES: Rules = (
    # Column-parallel products: their outputs (heads, ffn) are split over `tensor`.
    (r"blocks/(.*/)?((q|k|v)(_\w+)?|ffn_in|ffn_gate)/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/(.*/)?((q|k|v)(_\w+)?|ffn_in|ffn_gate)/bias$", P(None, "tensor")),
    # Row-parallel products: their inputs are split over `tensor`, outputs are summed.
    (r"blocks/(.*/)?(o|ffn_out)/kernel$", P(None, "tensor", "fsdp")),
    (r"token_embed$", P("fsdp", None)),
    (r"(time|text|image).*/kernel$", P("fsdp", None)),
    (r".*", P()),
)
"""First match wins. Block parameters carry the layer axis in front."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the given axes (the others have size 1).

    Args:
      sizes: axis name -> number of devices along it.
      devices: default all of `jax.devices()`; the product of the sizes must be their number.

    Raises:
      ValueError: unknown axis, size below 1, or a product that is not the number of devices.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(f"mesh axis {', '.join(unknown)}: choose from {', '.join(AXES)}")
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if min(shape) < 1 or math.prod(shape) != len(devices):
        text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(f"mesh {text} has {math.prod(shape)} places for {len(devices)} devices")
    array = np.asarray(devices).reshape(shape)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(sizes: Mapping[str, int], heads: int, tokens: int) -> None:
    """Raises ValueError, with the valid numbers, for a mesh that does not divide what it splits.

    Args:
      sizes: axis name -> number of devices along it.
      heads: of the transformer, split over `tensor`.
      tokens: video tokens of a clip, split over `sequence`.
    """
    for axis, what, number in (("tensor", "heads", heads), ("sequence", "video tokens", tokens)):
        size = sizes.get(axis, 1)
        if number % size:
            valid = ", ".join(str(n) for n in range(1, min(number, 2 * size) + 1) if number % n == 0)
            raise ValueError(f"mesh {axis}={size}: does not divide the {number} {what}; give one of {valid}")


def specs(params: Any, rules: Rules = RULES, mesh: Mesh | None = None) -> Any:
    """PartitionSpec of every parameter: the tree of `params` (arrays or shapes) with specs as leaves.

    With a mesh, axes that do not divide the dimension are left out, so that small models fit any mesh.
    """
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: _spec(path, leaf.shape, rules, mesh) for path, leaf in flat.items()}, sep="/")


def _spec(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh | None) -> P:
    spec = next(spec for pattern, spec in rules if re.search(pattern, path))
    if len(spec) > len(shape):
        return P()
    if mesh is None:
        return spec
    return P(*(axis if axis and shape[i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(spec)))


def shard_params(params: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Puts parameters on the mesh by the rules; returns the same tree of sharded arrays."""
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs(params, rules, mesh), is_leaf=lambda x: isinstance(x, P)
    )
    return jax.device_put(params, shardings)


def shard_video(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Puts [B, F, h, w, C] latents (or conditions) on the mesh: batch over `data`, rows over `sequence`.

    Axes that do not divide are left whole; inside the model the token axis is split again, evenly or not.
    """
    return jax.device_put(x, NamedSharding(mesh, video_spec(x.shape, mesh)))


def video_spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """PartitionSpec of a [B, F, h, w, C] array on this mesh, see `shard_video`."""
    wanted = ("data", None, "sequence", None, None)
    return P(*(axis if axis and n % mesh.shape[axis] == 0 else None for n, axis in zip(shape, wanted, strict=True)))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a pytree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))
