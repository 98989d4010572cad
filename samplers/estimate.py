"""How much memory a run takes, by formula.

Weights are counted from their shapes. Temporaries grow with tokens and pixels by factors that are XLA's own figures for
FLF2V-14B (`benchmarks.aot`); other models have them in proportion. docs/memory.md compares both.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh

from samplers import skipping
from samplers.plan import Settings
from wanjax import sharding
from wanjax.checkpoint import with_weights
from wanjax.config import ModelConfig, VAEConfig
from wanjax.pieces import decode_reach, encode_reach
from wanjax.residency import POLICIES
from wanjax.shapes import param_shapes

GIB = 2**30

STAGES: Mapping[str, str] = MappingProxyType(
    {"text": "umt5", "images": "clip", "keyframes": "vae", "denoise": "dit", "decode": "vae"}
)
"""The part that each stage of a run uses."""
ABREAST: Mapping[str, int] = MappingProxyType({"gpu": 2, "tpu": 1, "cpu": 2})
"""Layers whose kernels are on the device at once where they are streamed: one computes and one comes; on TPUs they come
one kernel ahead."""

REACH: Mapping[str, Callable[[VAEConfig], int]] = MappingProxyType({"keyframes": encode_reach, "decode": decode_reach})
"""Latents that a window of the VAE's reads of its neighbours' on each inner side, by stage."""
COARSE = 1.35
"""What is not cut into windows: the features of the whole video at the latents' resolution, and a third more."""


@dataclass(frozen=True)
class Factors:
    """What temporaries grow with on one kind of device.

    Attributes:
      tokens: bytes a token and unit of the transformer's width, under bfloat16.
      whole: share of them that `tensor` does not split.
      gathered: of one block's weights, what is whole on a device at once where they are split.
      keys: bytes a token and unit of width, where `fsdp` gathers the keys of all tokens.
      encode, decode: bytes a pixel of one frame and channel of the VAE's first width, by its compute dtype.
    """

    tokens: float
    whole: float
    gathered: float
    keys: float
    encode: Mapping[str, float]
    decode: Mapping[str, float]


_GPU = Factors(16.3, 0.63, 0.43, 16, {"float32": 178, "bfloat16": 100}, {"float32": 210, "bfloat16": 115})
FACTORS: Mapping[str, Factors] = MappingProxyType(
    {
        "gpu": _GPU,
        "tpu": replace(_GPU, tokens=31, gathered=0.57),
        "cpu": replace(_GPU, tokens=29.7, encode={"float32": 204, "bfloat16": 120},
                       decode={"float32": 210, "bfloat16": 140}),
    }
)  # fmt: skip
"""Compiled for H100s, for v5e and v6e, and for an x86 processor at 17 frames."""
BORDERS: Mapping[str, float] = MappingProxyType({"keyframes": 1.35, "decode": 1.7})
"""Where devices share a picture: what they hold of their neighbours', and buffers of what travels."""
CARRIED = 4
"""Latents that a step takes and gives: the sample and what multistep solvers remember."""
PASSES, REMEMBERED = 2, 2
"""Of guidance, and the velocities of each that skipped ones are guessed from."""
LOGITS = 1.7
"""Of an encoder, whose largest temporaries are the float32 logits of a layer: logits and all else, in logits."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device.

    Attributes:
      policy: in `residency.POLICIES`.
      weights: of each part, what lies on the device while it is used.
      temporary: by stage, all else: what it takes, makes and returns.
      host: weights that lie in host memory instead.
    """

    policy: str
    weights: Mapping[str, int]
    temporary: Mapping[str, int]
    host: int = 0

    @property
    def stages(self) -> dict[str, int]:
        """The peak of each stage."""
        return {stage: self.resident(stage) + n for stage, n in self.temporary.items()}

    @property
    def peak(self) -> int:
        """Of the run."""
        return max(self.stages.values())

    def resident(self, stage: str) -> int:
        """Weights that lie on the device during a stage."""
        return sum(self.weights.values()) if self.policy == "keep" else self.weights[STAGES[stage]]


def estimate(
    config: ModelConfig,
    settings: Settings,
    mesh: Mapping[str, int] | None = None,
    policy: str = "keep",
    weights: str = "bf16",
    tiles: int | None = None,
    platform: str | None = None,
) -> Estimate:
    """What one clip takes; on a mesh, of one device.

    Args:
      mesh: axis -> devices: weights as `sharding.RULES` say, tokens over fsdp and sequence, pictures over all devices.
      policy, weights: in `residency.POLICIES`, `checkpoint.WEIGHTS`; of these "bf16" is as stored.
      tiles: windows of the VAE's pictures; None takes the config's own.
      platform: "gpu", "tpu" or "cpu"; None takes the default device's.

    Raises:
      ValueError: another policy or weights, or a folder's 8-bit weights asked for as others.
    """
    platform = platform or jax.default_backend()
    on_device, host = _weights(config, mesh or {}, policy, weights, platform)
    return Estimate(policy, on_device, temporary(config, settings, mesh or {}, policy, weights, tiles, platform), host)


def _weights(
    config: ModelConfig, mesh: Mapping[str, int], policy: str, weights: str, platform: str
) -> tuple[dict[str, int], int]:
    """Bytes of each part on one device, and of what lies in host memory instead."""
    if policy not in POLICIES:
        raise ValueError(f"memory {policy!r}: choose one of {', '.join(POLICIES)}")
    if policy == "stream" and math.prod(mesh.values()) > 1:
        raise ValueError("memory stream: is for one device; on several, weights are split over them")
    sizes, host = {}, 0
    for part, tree in stored(config, weights).items():
        own = split_sizes(tree, mesh)
        sizes[part] = sum(own.values())
        if part == "dit" and policy == "stream":
            kernels = sum(n for name, n in own.items() if streamed(name))
            sizes[part] -= kernels - min(kernels, ABREAST[platform] * kernels // config.dit.num_layers)
            host = 0 if platform == "cpu" else kernels  # where the host is the device they wait in the folder
    return sizes, host


def streamed(name: str) -> bool:
    """Whether a parameter of the transformer, named "blocks/..", is a block's kernel or the factor of one."""
    return name.startswith("blocks/") and name.endswith(("/kernel", "/factor"))


@lru_cache(maxsize=16)  # a choice asks for it at every number of windows
def stored(config: ModelConfig, weights: str = "bf16") -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shape and dtype of every parameter by part and name, the transformer's block kernels as `weights` say; of "bf16"
    as the configuration has them. Not to be changed: it is kept.

    Raises:
      ValueError: others than in `checkpoint.WEIGHTS`, or than the folder's where that has 8 bits already.
    """
    config = config if weights == "bf16" else with_weights(config, weights)
    return {part: flatten_dict(tree, sep="/") for part, tree in param_shapes(config).items()}


def split_sizes(tree: Mapping[str, jax.ShapeDtypeStruct], mesh: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each parameter on one device of a mesh."""
    whole = {name: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for name, leaf in tree.items()}
    if math.prod(mesh.values()) == 1:
        return whole
    shape = {axis: mesh.get(axis, 1) for axis in sharding.AXES}
    flat = flatten_dict(sharding.specs(dict(tree), mesh=AbstractMesh(tuple(shape.values()), tuple(shape))), sep="/")

    def parts(spec: Any) -> int:
        axes = (axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry))
        return math.prod(shape[axis] for axis in axes)

    return {name: n // parts(flat[name]) for name, n in whole.items()}


def temporary(
    config: ModelConfig, settings: Settings, mesh: Mapping[str, int], policy: str, weights: str, tiles: int | None,
    platform: str,
) -> dict[str, int]:  # fmt: skip
    """Bytes of each stage besides the weights, on one device."""
    c, s, factors = config.for_platform(platform), settings, FACTORS[platform]
    (height, width), frames = s.size, c.vae.latent_frames(s.frames)
    area, latents = height * width, frames * height * width // c.vae.spatial_stride**2
    found = {"text": _encoder(2, c.dit.text_length, c.umt5)}
    if c.clip is not None:
        found["images"] = _encoder(c.dit.num_images, c.clip.num_tokens, c.clip)
    grid = tuple(side // c.vae.spatial_stride for side in s.size)
    devices = math.prod(sharding.split_picture(grid, math.prod(mesh.values())))
    kind = "float32" if c.vae.precision.compute == "float32" else "bfloat16"

    def picture(factor: Mapping[str, float], stage: str) -> int:
        whole = factor[kind] * area * c.vae.base_dim / devices * (BORDERS[stage] if devices > 1 else 1)
        coarse = min(whole, COARSE * latents * c.vae.base_dim * c.vae.dim_mult[-1] * np.dtype(kind).itemsize)
        share = window_share(c.vae, s.size, stage, tiles if devices == 1 else 1)
        return int(whole if share == 1 else coarse + (whole - coarse) * share)

    condition = 4 * latents * c.dit.condition_channels
    found["keyframes"] = picture(factors.encode, "keyframes") + 2 * 12 * area + condition
    found["denoise"] = _denoise(config, settings, mesh, factors, weights) + condition
    found["denoise"] += 2 * CARRIED * 4 * latents * c.dit.out_channels + 2 * 4 * c.dit.text_length * c.dit.text_dim
    found["denoise"] += 2 * guessed(config, settings)
    found["decode"] = picture(factors.decode, "decode") + 12 * s.frames * area // devices
    if platform == "cpu":
        for stage in ("text", "images", "denoise"):
            if stage in found:
                found[stage] += _widened(config, STAGES[stage], policy, weights)
    return found


@lru_cache(maxsize=64)
def _widened(config: ModelConfig, part: str, policy: str, weights: str) -> int:
    """What a CPU adds: it multiplies in float32, and XLA makes float32 copies of all layers' kernels before the loop
    over them, unless they stream; of kernels that are float32 it copies one layer's at a time."""
    tree, layers = stored(config, weights)[part], getattr(config, part).num_layers
    kernels = [leaf for name, leaf in tree.items() if streamed(name) and name.endswith("/kernel")]
    layer = 4 * sum(math.prod(leaf.shape) for leaf in kernels) // layers
    if kernels[0].dtype == np.float32:
        return int(0.8 * layer)
    copied = layer if part == "dit" and policy == "stream" else layers * layer
    return copied + layer // 2


def _denoise(config: ModelConfig, settings: Settings, mesh: Mapping[str, int], factors: Factors, weights: str) -> float:
    c, passes = config.dit, 2 if settings.guidance_mode == "batched" and settings.guidance != 1 else 1
    frames = config.vae.latent_frames(settings.frames) // c.patch_size[0]
    tokens = frames * math.prod(settings.size) // (config.vae.spatial_stride**2 * math.prod(c.patch_size[1:]))
    split, tensor = mesh.get("fsdp", 1) * mesh.get("sequence", 1), mesh.get("tensor", 1)
    numbers = tokens * c.dim * math.ceil(passes / mesh.get("data", 1))
    wide = 2 if c.precision.compute == "float32" and factors is not FACTORS["cpu"] else 1
    found = 4 * tokens * c.head_dim  # the rotary table
    found += numbers / split * factors.tokens * wide * (factors.whole + (1 - factors.whole) / tensor)
    if mesh.get("fsdp", 1) > 1:
        found += numbers / (mesh.get("sequence", 1) * tensor) * factors.keys * wide
    if split * tensor > 1:
        block = sum(split_sizes({name: leaf for name, leaf in stored(config, weights)["dit"].items()
                                 if name.startswith("blocks/")}, {}).values()) / c.num_layers  # fmt: skip
        found += factors.gathered * block
    return int(found)


def guessed(config: ModelConfig, settings: Settings) -> int:
    """Bytes of what a run carries besides to guess skipped passes from (`guidance.Past`): two velocities of each pass
    in float32 and their noise levels. 0 where none is skipped."""
    if not skipping.chosen(settings.skip_passes, settings.steps):
        return 0
    grid = (side // config.vae.spatial_stride for side in settings.size)
    velocity = config.vae.latent_frames(settings.frames) * math.prod(grid) * config.dit.out_channels
    return PASSES * REMEMBERED * 4 * (velocity + 1)


def _encoder(batch: int, tokens: int, config: Any) -> int:
    """Of a text or image encoder: the logits of one layer, and the widest activations."""
    size = np.dtype(config.precision.compute).itemsize
    logits = 4 * batch * config.num_heads * tokens**2
    return int(LOGITS * logits + batch * tokens * (2 * config.ffn_dim * size + 3 * 4 * config.dim))


def window_share(config: VAEConfig, size: tuple[int, int], stage: str, tiles: int | None = None) -> float:
    """What one of the VAE's windows, with what it reads of its neighbours', is of the picture.

    Args:
      stage: "keyframes" or "decode".
      tiles: windows; None takes the config's own.
    """
    tiles = getattr(config, "tiles", 1) if tiles is None else tiles
    side = max(size) // config.spatial_stride
    return min(1.0, math.ceil((side + 2 * REACH[stage](config) * (tiles - 1)) / tiles) / side)


def most_tiles(config: VAEConfig, size: tuple[int, int]) -> int:
    """More windows than this are mostly what they read of each other's."""
    return max(1, max(size) // config.spatial_stride // (2 * max(reach(config) for reach in REACH.values())))
