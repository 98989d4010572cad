"""Where arrays live: the mesh, and ordered rules from parameter paths to PartitionSpecs.

Mesh axes: `data` (batch and guidance passes), `fsdp` and `sequence` (together `TOKENS`: video tokens, and weights,
whole only inside the block that uses them), `tensor` (heads and ffn). In self-attention `sequence` splits heads, and
`fsdp` gathers keys and values (`attention.parallel`). XLA's partitioner does the rest: models only name axes
(`layers.constrain`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from wanjax import hosts
from wanjax.layers import TOKENS, mesh_axes

AXES = ("data", "fsdp", "sequence", "tensor")

Rules = Sequence[tuple[str, P]]

COLUMNS = r"blocks/cross_attn/[kv](_\w+)?/(kernel|factor)$"
"""Of the few tokens of text and images every device computes some columns, for all of them: no weight travels."""

STREAMED = r"^blocks/.*/kernel$"
"""What lies in host memory under the policy "stream": nearly all of the weights. (The stacked modulation among them
makes libtpu 0.0.42 abort.)"""

RULES: Rules = (
    (COLUMNS, P(None, None, ("tensor", *TOKENS))),
    # Column-parallel products: their outputs (heads, ffn) are split over `tensor`.
    (r"blocks/(.*/)?((q|k|v)(_\w+)?|ffn_in|ffn_gate)/kernel$", P(None, TOKENS, "tensor")),
    (r"blocks/(.*/)?((q|k|v)(_\w+)?|ffn_in|ffn_gate)/factor$", P(None, None, "tensor")),
    (r"blocks/(.*/)?((q|k|v)(_\w+)?|ffn_in|ffn_gate)/bias$", P(None, "tensor")),
    # Row-parallel products: their inputs are split over `tensor`, outputs are summed. Rows over TOKENS too: what is
    # gathered along columns XLA keeps transposed, a second copy of the whole stack.
    (r"blocks/(.*/)?(o|ffn_out)/kernel$", P(None, ("tensor", *TOKENS), None)),
    (r"token_embed$", P(TOKENS, None)),
    (r"(time|text|image).*/kernel$", P(TOKENS, None)),
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
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def choose_mesh(devices: int, heads: int) -> dict[str, int]:
    """Axis sizes of a mesh of so many devices for one clip after the other.

    All of them share tokens and weights. As many as divide the heads swap tokens for heads (`sequence`), which moves
    least; the rest gather keys and values (`fsdp`).
    """
    split = math.gcd(devices, heads)
    return {"fsdp": devices // split, "sequence": split}


def split_picture(grid: tuple[int, int], devices: int) -> tuple[int, int]:
    """Over how many (rows, columns) of devices a latent picture (h, w) is split: the most of them that divide evenly,
    in parts as square as they come, for neighbours swap their borders."""
    h, w = grid
    choices = [(r, c) for r in range(1, devices + 1) for c in range(1, devices // r + 1)
               if devices % (r * c) == 0 and h % r == 0 and w % c == 0]  # fmt: skip
    return max(choices, key=lambda split: (split[0] * split[1], -abs(h / split[0] - w / split[1])))


def picture_mesh(mesh: Mesh, grid: tuple[int, int]) -> Mesh:
    """The same devices for pictures of (h, w) latents: axes "rows" and "columns" (`split_picture`), and "copies" for
    what they do not divide."""
    rows, columns = split_picture(grid, mesh.size)
    devices = mesh.devices.reshape(-1, rows, columns)
    return Mesh(devices, ("copies", "rows", "columns"), axis_types=(AxisType.Auto,) * 3)


def repeats(sizes: Mapping[str, int], batch: int) -> int:
    """How many devices do the same work: `data` splits the batch (both passes of guidance, where they are batched),
    and where it does not divide it, everything is done on each of its devices."""
    data = sizes.get("data", 1)
    return 1 if batch % data == 0 else data


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
    return P(*(mesh_axes(mesh, axis, n) for axis, n in zip(spec, shape, strict=False)))


def near(params: Any, rules: Rules = RULES, stream: bool = False) -> Any:
    """Parameters of one block, brought to where it computes. To be called while a block is traced.

    Under `jax.set_mesh` those that a device needs whole are gathered over TOKENS; the others stay split.

    Args:
      stream: kernels lie in host memory, and are copied to the device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    flat = flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        if stream and re.search(STREAMED, f"blocks/{path}"):
            leaf = jax.device_put(leaf, jax.memory.Space.Device)
        if not mesh.empty:
            spec = _spec(f"blocks/{path}", (1, *leaf.shape), rules, mesh)[1:]
            if not re.search(COLUMNS, f"blocks/{path}"):
                spec = [None if axis is None else _without_tokens(axis) for axis in spec]
            leaf = jax.lax.with_sharding_constraint(leaf, P(*spec))
        flat[path] = leaf
    return unflatten_dict(flat, sep="/")


def _without_tokens(axes: str | tuple[str, ...]) -> tuple[str, ...] | None:
    return tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if axis not in TOKENS) or None


def shard_params(params: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Puts parameters on the mesh by the rules; returns the same tree of sharded arrays."""
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs(params, rules, mesh), is_leaf=lambda x: isinstance(x, P)
    )
    return jax.device_put(params, shardings)


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays [B, ...] on the mesh: the batch over `data` where that divides it, all else on every device. Of
    several hosts each has them all; that they are the same everywhere is not compared."""
    return jax.tree.map(lambda x: hosts.put(x, NamedSharding(mesh, P(mesh_axes(mesh, "data", x.shape[0])))), tree)
