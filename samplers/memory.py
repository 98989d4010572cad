"""How much memory a run takes, by formula, and the refusal of one that cannot fit.

The factors are XLA's own figures for FLF2V-14B on an H100 (`benchmarks.aot`), which grow with pixels and tokens; other
models have them in proportion.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import numpy as np

from samplers.plan import Settings
from wanjax import checkpoint, keyframes, sharding
from wanjax.config import ModelConfig

DECODE = {"float32": 210, "bfloat16": 115}
ENCODE = {"float32": 178, "bfloat16": 100}
"""Bytes a pixel of one frame and channel of the VAE's first width, by its compute dtype."""
BORDERS = 1.7
"""Where devices share a picture: what they hold of their neighbours', and buffers of what travels."""
DENOISE = 16.4
"""Bytes a token and unit of the transformer's width."""
GATHERED = 0.5
"""Of one block's weights, what is whole on a device at once where they are split."""
MARGIN = 0.8
"""A run is refused when this part of its estimate is more than there is: an estimate may be too high."""
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device.

    Attributes:
      weights: of each part of the model.
      temporary: by stage, "encode", "denoise", "decode".
    """

    weights: Mapping[str, int]
    temporary: Mapping[str, int]

    @property
    def peak(self) -> int:
        """With all parts resident."""
        return sum(self.weights.values()) + max(self.temporary.values())

    @property
    def staged(self) -> int:
        """With one part at a time."""
        stages = {"encode": ("umt5", "clip", "vae"), "denoise": ("dit",), "decode": ("vae",)}
        return max(max(self.weights.get(part, 0) for part in parts) + self.temporary[stage]
                   for stage, parts in stages.items())  # fmt: skip


def estimate(config: ModelConfig, settings: Settings, mesh: Mapping[str, int] | None = None) -> Estimate:
    """What one clip takes; on a mesh, of one device: the weights and the tokens split over fsdp, sequence and tensor,
    the VAE's pictures over all devices."""
    mesh = mesh or {}
    shapes = checkpoint.param_shapes(config)
    size = {part: sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
            for part, tree in shapes.items()}  # fmt: skip
    split = mesh.get("fsdp", 1) * mesh.get("sequence", 1) * mesh.get("tensor", 1)
    gathered = GATHERED * size["dit"] / config.dit.num_layers if split > 1 else 0
    size = {part: n // split if part != "vae" else n for part, n in size.items()}
    area, stride = math.prod(settings.size), config.vae.spatial_stride
    frames = config.vae.latent_frames(settings.frames) // config.dit.patch_size[0]
    tokens = frames * area // (stride**2 * math.prod(config.dit.patch_size[1:]))
    tokens = tokens * config.dit.dim * DENOISE / split + gathered
    height, width = (side // stride for side in settings.size)
    devices = math.prod(sharding.split_picture((height, width), math.prod(mesh.values())))
    pixels = area * config.vae.base_dim / devices * (BORDERS if devices > 1 else 1)
    kind = "float32" if config.vae.precision.compute == "float32" else "bfloat16"
    return Estimate(size, {"encode": int(ENCODE[kind] * pixels), "denoise": int(tokens),
                           "decode": int(DECODE[kind] * pixels)})  # fmt: skip


def available() -> int | None:
    """Bytes of the first device, or of the host where that computes; None where nobody tells."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    import psutil

    return psutil.virtual_memory().total


def check(
    config: ModelConfig,
    settings: Settings,
    mesh: Mapping[str, int] | None = None,
    staged: bool = False,
    memory: int | None = None,
) -> None:
    """Refuses a run that cannot fit, before anything of its size is made.

    Args:
      staged: one part of the model is in memory at a time.
      memory: bytes that there are; None asks `available`.

    Raises:
      ValueError: one line with the estimate and the largest size of the same shape that fits.
    """
    memory = available() if memory is None else memory
    found = estimate(config, settings, mesh)
    peak = found.staged if staged else found.peak
    if memory is None or peak * MARGIN <= memory:
        return
    weights = max(found.weights.values()) if staged else sum(found.weights.values())
    if weights * MARGIN > memory:
        raise ValueError(
            f"model {config.name}: its weights alone are {weights / GIB:.1f} GiB, there are {memory / GIB:.1f}; "
            "use bfloat16 or a larger device"
        )
    (height, width), fitting = settings.size, _largest(config, settings, mesh, staged, memory)
    mend = "use fewer frames" if fitting is None else f"the largest size of this shape is {fitting[0]}x{fitting[1]}"
    raise ValueError(f"size {height}x{width}, {settings.frames} frames: takes about {peak / GIB:.1f} GiB "
                     f"(estimated), there are {memory / GIB:.1f}; {mend}")  # fmt: skip


def _largest(
    config: ModelConfig, settings: Settings, mesh: Mapping[str, int] | None, staged: bool, memory: int
) -> tuple[int, int] | None:
    """The largest (height, width) of this aspect that fits; None where not even the smallest does."""
    low, high = 0, math.prod(settings.size)  # an area that fits, and one that does not
    while high - low > config.size_multiple**2:
        area = (low + high) // 2
        size = keyframes.area_size(settings.size, area, config.size_multiple)
        found = estimate(config, replace(settings, size=size), mesh)
        fits = (found.staged if staged else found.peak) * MARGIN <= memory
        low, high = (area, high) if fits else (low, area)
    return keyframes.area_size(settings.size, low, config.size_multiple) if low else None
