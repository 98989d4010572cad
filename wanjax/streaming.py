"""The transformer's weights where they do not fit: its blocks' kernels wait in host memory and come layer by layer.

Two forms, named in `DiTConfig.stream`. In "program" the stacks are arguments in host memory, and the scan over layers
copies each layer to the device ahead of its use, which XLA for TPUs does asynchronously. In "loop" the host calls one
program a layer and sends the next layer's kernels meanwhile (`samplers.streamed`): for GPUs, where nothing could be
seen of such copies without one, and for CPUs, where the kernels wait in the model folder, for host memory is what they
must not fill.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from wanjax import store
from wanjax.config import ModelConfig
from wanjax.layered import Layers
from wanjax.settings import refuse
from wanjax.sharding import STREAMED

HOST = jax.memory.Space.Host


@flax.struct.dataclass
class Streamed:
    """Parameters of the transformer in the form "loop".

    Attributes:
      rest: as the whole tree, without the kernels in `blocks`; on the device.
      layers: of each layer its kernels {path: [I, O]}, in host memory; empty where they are read anew.
      read: (layer) -> the same as numpy arrays, read from the folder; None where `layers` has them.
    """

    rest: Any
    layers: tuple[Mapping[str, jax.Array], ...] = ()
    read: Callable[[int], Mapping[str, np.ndarray]] | None = flax.struct.field(pytree_node=False, default=None)

    def fetch(self, layer: int) -> Mapping[str, jax.Array]:
        """The kernels of a layer on the device; copies from host memory are under way when this returns."""
        if self.read is not None:
            return jax.device_put(self.read(layer))
        return jax.device_put(self.layers[layer], jax.memory.Space.Device)


def with_stream(config: ModelConfig, platform: str | None = None) -> ModelConfig:
    """The configuration whose transformer is streamed in the form that suits a platform, by default the present one."""
    form = "program" if (platform or jax.default_backend()) == "tpu" else "loop"
    return replace(config, dit=replace(config.dit, stream=form))


def check_mesh(mesh: Mesh | None) -> None:
    """Raises ValueError for a mesh: on several devices weights are split over them, and fit so."""
    refuse((mesh is not None, "policy 'stream': is for one device; on several, weights are split over them"))


def shapes(expected: Any, form: str) -> Any:
    """What `restore` gives, as `jax.ShapeDtypeStruct`s; of "loop" with the kernels of one layer.

    Args:
      expected: shapes and dtypes of the whole tree.
    """
    kernels, rest = _split(expected)
    if form == "loop":
        one = {path: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for path, leaf in kernels.items()}
        return Streamed(unflatten_dict(rest, sep="/"), (one,))
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    waiting = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)
               for path, leaf in kernels.items() if re.search(STREAMED, path)}  # fmt: skip
    return unflatten_dict(rest | kernels | waiting, sep="/")


def _split(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What waits in host memory and what does not, by path; with kernels of 8 bits go their factors."""
    flat = flatten_dict(tree, sep="/")
    kernels = {path: leaf for path, leaf in flat.items() if re.search(STREAMED, path.replace("/factor", "/kernel"))}
    return kernels, {path: leaf for path, leaf in flat.items() if path not in kernels}


def moved(params: Any, form: str) -> Any:
    """A whole tree of parameters brought into a form: its kernels are copied to host memory.

    Args:
      form: "program" or "loop".
    """
    kernels, rest = _split(params)
    if form == "loop":
        count = len(next(iter(kernels.values())))
        layers = ({path: jax.device_put(leaf[i], HOST) for path, leaf in kernels.items()} for i in range(count))
        return Streamed(unflatten_dict(rest, sep="/"), tuple(map(jax.block_until_ready, layers)))
    waiting = {path: jax.device_put(leaf, HOST) for path, leaf in kernels.items() if re.search(STREAMED, path)}
    return unflatten_dict(rest | kernels | jax.block_until_ready(waiting), sep="/")


def restore(folder: Path, expected: Any, form: str, fast: bool = False, anew: bool | None = None) -> Any:
    """The transformer's parameters in one of the forms: a tree with kernels in host memory, or `Streamed`.

    Args:
      expected: shapes and dtypes of the whole tree.
      form: "program" or "loop".
      fast: leave the digests be, as `store.restore`.
      anew: of "loop": read the kernels from the folder whenever they are used; None does so where the CPU computes.

    Raises:
      CheckpointError: damaged arrays.
    """
    kernels, rest = _split(expected)
    near = store.restore(folder, "dit", unflatten_dict(rest, sep="/"), None, fast=fast)
    if form == "program":
        far = store.restore(folder, "dit", unflatten_dict(kernels, sep="/"), None, fast=fast, space=HOST)
        far = {path: leaf if re.search(STREAMED, path) else jax.device_put(leaf, jax.memory.Space.Device)
               for path, leaf in flatten_dict(far, sep="/").items()}  # fmt: skip
        return unflatten_dict(flatten_dict(near, sep="/") | far, sep="/")
    layers = Layers(folder, "dit", kernels)
    if jax.default_backend() == "cpu" if anew is None else anew:
        if not fast:
            layers.check()
        return Streamed(near, (), layers.read)
    held = [jax.device_put(layer, HOST) for layer in layers.all(fast)]
    return Streamed(near, tuple(jax.block_until_ready(held)))
