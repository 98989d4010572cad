"""The training-free methods as one value: isolation, KAB and ReTRo, each on or off by itself, and named profiles.

Source: "Anchoring and Rescaling Attention for Semantically Coherent Inbetweening", arXiv 2603.17651; where its text
and its released code differ, `docs/differences.md` says which option is which. Everything here is arithmetic on the
host: what it makes are inputs of the compiled sampler, so that no setting recompiles it. Axis letters: F latent
frames, L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from flax import struct

from wanjax import kab as kabs
from wanjax import retro as retros
from wanjax import rope
from wanjax.config import ModelConfig
from wanjax.kab import KAB
from wanjax.retro import ReTRo
from wanjax.types import CrossControl, RopeTable


@dataclass(frozen=True)
class Isolation:
    """Triple isolated cross-attention: text, first and last keyframe have a softmax each, summed with weights.

    Attributes:
      weights: of (text, first, last), finite and not negative.
    """

    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        good = len(self.weights) == 3 and all(math.isfinite(w) and 0 <= w <= 1e3 for w in self.weights)
        if not good:
            text = ",".join(f"{w:g}" for w in self.weights)
            raise ValueError(f"branch weights {text}: give three numbers from 0 to 1000, for text, first, last")


@dataclass(frozen=True)
class Method:
    """What is changed of Wan2.1's attention; None leaves a part as it is.

    Attributes:
      isolation: separate softmaxes; all layers, all steps, both guidance passes.
      kab: anchored bias; some layers and steps, the conditional pass. Without isolation it biases the joint softmax.
      retro: rescaled temporal rotary embedding; all layers, all steps, both passes.
    """

    isolation: Isolation | None = None
    kab: KAB | None = None
    retro: ReTRo | None = None


METHODS: MappingProxyType[str, Method] = MappingProxyType(
    {
        "wan": Method(),
        "paper": Method(Isolation(), KAB(), ReTRo("frequency")),
        "release": Method(Isolation(), KAB(), ReTRo("magnitude")),
    }
)
"""`wan` changes nothing; `paper` is the paper's text; `release` its released code."""


def named(name: str) -> Method:
    """A profile by name.

    Raises:
      ValueError: unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


@struct.dataclass
class MethodArrays:
    """A method for one model, clip length and step count, as inputs of the compiled sampler.

    Attributes:
      table: rotary factors with ReTRo in them.
      strength: float32 [steps, L, F], zero without KAB.
      control: the rest, with strength None.
    """

    table: RopeTable
    strength: np.ndarray
    control: CrossControl


def arrays(method: Method, config: ModelConfig, frames: int, size: Sequence[int], steps: int) -> MethodArrays:
    """Makes a method's arrays.

    Args:
      method: what to change.
      config: of the model.
      frames: pixel frames of the clip.
      size: (height, width) in pixels.
      steps: denoising steps.

    Raises:
      ValueError: settings that this model or length cannot have, naming the setting.
    """
    dit = config.dit
    spatial = (side // config.vae.spatial_stride // patch for side, patch in zip(size, dit.patch_size[1:], strict=True))
    latent_frames = config.vae.latent_frames(frames) // dit.patch_size[0]
    retro = method.retro or ReTRo(s_edge=1.0, s_mid=1.0)
    table = rope.table(
        (latent_frames, *spatial), dit.head_dim, retros.scale_vector(retro, frames, latent_frames), retro.mode
    )
    kab = method.kab or KAB(beta_end=0.0, beta_mid=0.0)
    control = CrossControl(
        strength=None,
        curve=kabs.anchor_curve(kab, latent_frames),
        floor=np.float32(kab.eps),
        isolated=np.bool_(method.isolation is not None),
        weights=np.asarray((method.isolation or Isolation()).weights, np.float32),
    )
    return MethodArrays(table, kabs.strength(kab, steps, dit.num_layers, latent_frames), control)
