"""The training-free methods as one value: isolation, KAB and ReTRo, each on or off by itself, and named profiles.

Source: "Anchoring and Rescaling Attention for Semantically Coherent Inbetweening", arXiv 2603.17651; where its text
and its released code differ, `docs/differences.md` says which option is which. Everything here is arithmetic on the
host: what it makes are inputs of the compiled sampler, so that no setting recompiles it. Axis letters as in `types`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from flax import struct

from wanjax import kab, retro, rope
from wanjax.config import ModelConfig
from wanjax.kab import KAB
from wanjax.retro import ReTRo
from wanjax.settings import check_settings, floats, one_of, pixel_frames, setting
from wanjax.types import CrossControl, RopeTable


@dataclass(frozen=True)
class Isolation:
    """Isolated cross-attention: text and every image have a softmax each, summed with weights.

    Attributes:
      weights: of (text, first image, last image), from 0 to 1000. Images between get the mean of the two; a model of
        one image has nothing to isolate.
    """

    weights: tuple[float, float, float] = setting(
        (1.0, 1.0, 1.0), floats, "give three numbers from 0 to 1000, for text, first, last",
        lambda x: len(x) == 3 and all(0 <= w <= 1e3 for w in x), "branch weights", ",",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)

    def of(self, images: int) -> np.ndarray:
        """float32 [1 + M], the weights of text and M images."""
        text, first, last = self.weights
        inner = (images - 2) * [(first + last) / 2]
        return np.asarray([text, first, *inner, last][: 1 + images], np.float32)


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
    return METHODS[one_of("unknown method", name, METHODS, "choose one of")]


OVERRIDES: MappingProxyType[str, tuple[str, str]] = MappingProxyType(
    {
        "branch_weights": ("isolation", "weights"),
        "kab_layers": ("kab", "layers"),
        "kab_steps": ("kab", "steps"),
        "strength_end": ("kab", "strength_end"),
        "strength_mid": ("kab", "strength_mid"),
        "kab_floor": ("kab", "floor"),
        "anchor_curve": ("kab", "curve"),
        "retro_mode": ("retro", "mode"),
        "s_edge": ("retro", "s_edge"),
        "s_mid": ("retro", "s_mid"),
        "w_edge": ("retro", "w_edge"),
        "retro_smooth": ("retro", "smooth"),
    }
)
"""Single settings by the name of their command line option: which part, which field."""

_PARTS: MappingProxyType[str, type] = MappingProxyType({"isolation": Isolation, "kab": KAB, "retro": ReTRo})


def override(
    method: Method,
    overrides: Mapping[str, Any],
    *,
    isolation: bool | None = None,
    kab: bool | None = None,
    retro: bool | None = None,
) -> Method:
    """A method with parts switched and single settings replaced.

    Args:
      method: to start from.
      overrides: by the names in OVERRIDES; None leaves a setting as it is.
      isolation, kab, retro: True switches a part on (with its defaults if it was off), False off, None neither.

    Raises:
      ValueError: a bad value, or a setting of a part that is off.
    """
    parts: dict[str, Any] = {}
    for name, switch in (("isolation", isolation), ("kab", kab), ("retro", retro)):
        part = getattr(method, name)
        parts[name] = None if switch is False else part or (_PARTS[name]() if switch else None)
    for option, value in overrides.items():
        if value is None:
            continue
        name, field = OVERRIDES[option]
        if parts[name] is None:
            raise ValueError(f"{option} {value}: {name} is off; switch it on (--{name}, or --method paper)")
        parts[name] = dataclasses.replace(parts[name], **{field: value})
    return Method(**parts)


@struct.dataclass
class MethodArrays:
    """A method for one model, clip length and step count, as inputs of the compiled sampler.

    Attributes:
      table: rotary factors with ReTRo in them.
      strength: float32 [steps, L, F], zero without KAB.
      control: the rest.
    """

    table: RopeTable
    strength: np.ndarray
    control: CrossControl

    def strength_of(self, step: int, batch: int = 1) -> np.ndarray:
        """That of one step of the conditional pass, as `WanDiT.apply` takes it, [L, B, F]."""
        return np.repeat(self.strength[step][:, None], batch, 1)


def token_frames(config: ModelConfig, frames: int, at: Sequence[int]) -> tuple[int, ...]:
    """Token frames that hold the given pixel frames (negative ones counted from the end), sorted, each once.

    Raises:
      ValueError: a place that the clip does not have.
    """
    stride, patch = config.vae.temporal_stride, config.dit.patch_size[0]
    return tuple(sorted({-(-place // stride) // patch for place in pixel_frames(at, frames)}))


def arrays(
    method: Method,
    config: ModelConfig,
    frames: int,
    size: Sequence[int],
    steps: int,
    at: Sequence[int] = (0, -1),
    images: int | None = None,
) -> MethodArrays:
    """Makes a method's arrays.

    Args:
      method: what to change.
      config: of the model.
      frames: pixel frames of the clip.
      size: (height, width) in pixels.
      steps: denoising steps.
      at: pixel frames of the keyframes, negative ones counted from the end.
      images: M, whose vision tokens the transformer is shown; None is what the model was trained with.

    Raises:
      ValueError: settings that this model or length cannot have, naming the setting.
    """
    dit = config.dit
    spatial = (side // config.vae.spatial_stride // patch for side, patch in zip(size, dit.patch_size[1:], strict=True))
    token_count, places = _token_count(config, frames), token_frames(config, frames, at)
    scaling, anchoring = method.retro or ReTRo(s_edge=1.0, s_mid=1.0), method.kab or KAB()
    scale = retro.scale_vector(scaling, frames, token_count, places)
    if method.kab is None:
        strength = np.zeros((steps, dit.num_layers, token_count), np.float32)
    else:
        strength = kab.strength(anchoring, steps, dit.num_layers, token_count, places)
    control = CrossControl(
        anchors=np.asarray(places, np.int32),
        curve=kab.anchor_curve(anchoring, token_count, places),
        floor=np.float32(anchoring.floor),
        isolated=np.bool_(method.isolation is not None),
        weights=(method.isolation or Isolation()).of(dit.num_images if images is None else images),
    )
    return MethodArrays(rope.table((token_count, *spatial), dit.head_dim, scale, scaling.mode), strength, control)


def _token_count(config: ModelConfig, frames: int) -> int:
    return config.vae.latent_frames(frames) // config.dit.patch_size[0]


def describe(method: Method, config: ModelConfig, frames: int, at: Sequence[int] = (0, -1)) -> dict[str, Any]:
    """What the defaults came to for this model and clip length, for a report: KAB's layers, ReTRo's edge and scale."""
    found: dict[str, Any] = {}
    if method.kab is not None:
        found["kab_layers"] = list(kab.layer_window(method.kab, config.dit.num_layers))
    if method.retro is not None:
        places = token_frames(config, frames, at)
        scale = retro.scale_vector(method.retro, frames, _token_count(config, frames), places)
        found |= {"w_edge": retro.edge_width(method.retro, frames), "retro_scale": scale.round(6).tolist()}
    return found
