"""What a clip is to be, and the plan of its run: settings are checked by making it, and no array is made twice.

Everything here is arithmetic on the host. Axis letters as in `wanjax.types`; A keyframes.
"""

import sys

if __name__ == "__main__":  # python -m samplers.plan; above the imports, for which --help need not wait
    from samplers.plan_command import main

    sys.exit(main())

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, get_args

import jax
import numpy as np

from samplers import sample, schedule, skipping, solvers
from samplers.sample import Row
from samplers.schedule import Rounding
from wanjax import keyframes
from wanjax.attention import KERNELS
from wanjax.config import ModelConfig, SamplingDefaults
from wanjax.guidance import MODES, GuidanceMode
from wanjax.method import METHODS, Method, MethodArrays, arrays, named
from wanjax.settings import check_frames, check_size, one_of, pixel_frames, refuse, whole

FITS: tuple[str, ...] = get_args(keyframes.Fit)
CLIP_FITS: tuple[str, ...] = get_args(keyframes.ClipFit)
RESAMPLES: tuple[str, ...] = get_args(keyframes.Resample)

PRESETS: MappingProxyType[str, Mapping[str, Any]] = MappingProxyType(
    {
        "lightx2v-4": {"steps": 4, "shift": 5.0, "guidance": 1.0, "schedule": "linear", "solver": "euler"},
        "lcm-4": {"steps": 4, "shift": 5.0, "guidance": 1.0, "schedule": "linear", "solver": "lcm"},
        "diffusers": {
            "solver": "unipc", "schedule": "diffusers-unipc", "timesteps": "truncated", "clip_fit": "crop",
            "resample": "lanczos",
        },
    }
)  # fmt: skip
"""Settings that belong together: weights distilled to four steps (the step-distilled LoRAs), diffusers' pipeline."""


@dataclass(frozen=True)
class Settings:
    """How a clip is made. `Settings.of(config)` fills in what suits a model; `Plan.of` checks.

    Attributes:
      prompt, negative_prompt: what the video shows; what guidance steers away from.
      frames: pixel frames, temporal_stride * n + 1, keyframes included.
      size: (height, width) in pixels, multiples of the model's `size_multiple`.
      steps: denoising steps.
      guidance: classifier-free guidance scale, at least 0; at 1 the second pass is skipped.
      guidance_interval: (low, high), shares of the run; guidance where low <= step / steps < high, none elsewhere.
      shift: timestep shift of the schedule.
      solver, schedule, timesteps: names in `solvers.SOLVERS`, `schedule.SCHEDULES`, `schedule.ROUNDINGS`.
      seed: of the noise, 0 .. 2**32 - 1.
      fit: how keyframes of another size are brought to `size`: stretch, crop or pad.
      resample: filter of that: bicubic (as Wan2.1) or lanczos (as diffusers).
      clip_fit: how the vision tower's square is made: stretch (as Wan2.1) or crop (as diffusers).
      matte: red, green, blue in 0..255 under transparent keyframes and around padded ones.
      guidance_mode: "sequential" (least memory) or "batched" passes.
      method: what is changed of Wan2.1's attention (`wanjax.method`), or the name of a profile.
      skip_passes: a share of the steps, 0 to 0.6, spread evenly, or the steps (from 0), whose passes are guessed from
        the two before instead of run (docs/passes.md); never the first two or the last.
      skip_in_kab: whether steps in which KAB acts may be among them.
    """

    prompt: str = ""
    negative_prompt: str = ""
    frames: int = SamplingDefaults.frames
    size: tuple[int, int] = SamplingDefaults.size
    steps: int = SamplingDefaults.steps
    guidance: float = SamplingDefaults.guidance
    shift: float = SamplingDefaults.shift
    solver: str = SamplingDefaults.solver
    schedule: str = "wan"
    seed: int = 0
    fit: keyframes.Fit = "stretch"
    matte: tuple[int, int, int] = keyframes.BLACK
    guidance_mode: GuidanceMode = "sequential"
    method: Method = Method()
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    timesteps: Rounding = "exact"
    resample: str = "bicubic"
    clip_fit: str = "stretch"
    skip_passes: float | tuple[int, ...] = 0.0
    skip_in_kab: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            object.__setattr__(self, "method", named(self.method))
        object.__setattr__(self, "skip_passes", skipping.plain(self.skip_passes))

    @classmethod
    def of(cls, config: ModelConfig, preset: str | None = None, **overrides: Any) -> "Settings":
        """The model's own defaults, with those of a name in `PRESETS` and then `overrides` in their place.

        Raises:
          ValueError: unknown preset or setting.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        usual = {name: value for name, value in vars(config.sampling).items() if name in names}
        own = {} if preset is None else PRESETS[one_of("preset", preset, PRESETS)]
        unknown = sorted(set(overrides) - names)
        if unknown:
            raise ValueError(f"settings {', '.join(unknown)}: no such; see wanjax's samplers.Settings")
        return cls(**usual | own | overrides)


@dataclass(frozen=True)
class Plan:
    """A run with everything about it settled. `Plan.of` makes it.

    Attributes:
      config: of the model, resolved for the platform that computes.
      settings: what was asked for.
      at: pixel frames of the keyframes, ascending.
      latent_shape: (F, h, w, C) of one clip's latents.
      grid: (frames, height, width) in tokens.
      table: rows of the run, padded, in host memory; the first `settings.steps` are live.
      method: the rotary table and the control of attention; KAB's strength is in the table.
    """

    config: ModelConfig
    settings: Settings
    at: tuple[int, ...]
    latent_shape: tuple[int, int, int, int]
    grid: tuple[int, int, int]
    table: Row
    method: MethodArrays

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        settings: Settings,
        at: Sequence[int] = (0, -1),
        platform: str | None = None,
        extra: Any = None,
    ) -> "Plan":
        """Checks the settings for a model and settles the rest.

        Args:
          at: pixel frames where keyframes lie, negative ones counted from the end.
          platform: "cpu", "gpu" or "tpu", which decides kernels; None takes the default device's.
          extra: pytree with a leading axis of steps, for a denoise function of one's own (`Row.extra`).

        Raises:
          ValueError: one line naming the setting and the mend, for what this model cannot do.
        """
        check_settings(config, settings)
        s = settings
        places = pixel_places(at, s.frames)
        kind = jax.devices()[0].device_kind if platform is None else ""
        config = config.for_platform(jax.default_backend() if platform is None else platform, kind)
        levels = schedule.sigmas(s.schedule, s.steps, s.shift)
        method = arrays(s.method, config, s.frames, s.size, s.steps, places)
        step = solvers.table(s.solver, levels, s.timesteps)
        scale = _guidance(s)
        kab = () if s.skip_in_kab or method.strength is None else np.flatnonzero(method.strength.any((1, 2)))
        skipped = skipping.chosen(s.skip_passes, s.steps, kab)
        skip = skipping.flags(skipped, scale, s.guidance_mode == "batched")
        table = sample.rows(step, guidance=scale, strength=method.strength, skip=skip, extra=extra)
        stride = config.vae.spatial_stride
        shape = (config.vae.latent_frames(s.frames), s.size[0] // stride, s.size[1] // stride)
        tokens = tuple(n // size for n, size in zip(shape, config.dit.patch_size, strict=True))
        return cls(config, s, places, (*shape, config.dit.out_channels), tokens, table, method.replace(strength=None))

    @cached_property
    def strength(self) -> np.ndarray:
        """KAB's strength, float32 [steps, L, F]."""
        return self.table.strength[: self.settings.steps]

    @cached_property
    def anchors(self) -> tuple[int, ...]:
        """Token frames of the keyframes, ascending, each once: where KAB anchors and ReTRo has its edges."""
        return tuple(int(place) for place in self.method.control.anchors)

    @property
    def kab_steps(self) -> np.ndarray:
        """Indices of the steps in which KAB acts."""
        return np.flatnonzero(self.strength.any((1, 2)))

    @property
    def tokens(self) -> int:
        """Video tokens S of one clip."""
        return math.prod(self.grid)


def _guidance(settings: Settings) -> np.ndarray:
    """Guidance scale of each step, float32 [steps]."""
    share = np.arange(settings.steps) / settings.steps
    low, high = settings.guidance_interval
    return np.where((share >= low) & (share < high), settings.guidance, 1).astype(np.float32)


def pixel_places(at: Sequence[int], frames: int) -> tuple[int, ...]:
    """Keyframes' pixel frames, ascending, negative ones counted from the end.

    Raises:
      ValueError: outside the clip, twice, or none.
    """
    if not len(at):
        raise ValueError("keyframes: none given; give at least one, such as the first")
    return tuple(sorted(pixel_frames(at, frames)))


def check_settings(config: ModelConfig, s: Settings) -> None:
    """Raises ValueError for a setting that no array of the plan would find wrong; makes no array."""
    if config.dit.num_images == 0:
        raise ValueError(
            f"model {config.name}: takes no keyframes (text-to-video); inbetweening needs a first-and-last-frame "
            "model (flf2v), or an image-to-video or Fun-InP one"
        )
    frames = whole("frames", s.frames, 1, 10**6)
    check_frames(frames, config.vae.temporal_stride)
    sides = [whole("size", side, 1, 10**5) for side in _several("size", s.size, 2, "(height, width) in pixels")]
    check_size(*sides, config.size_multiple)
    _number("guidance", s.guidance, 0, 1e6, "; 1 switches it off")
    check_seed(s.seed)
    shares = _several("guidance interval", s.guidance_interval, 2, "two shares of the run")
    low, high = (_number("guidance interval", share, 0, 1) for share in shares)
    if low > high:
        raise ValueError(f"guidance interval {low:g}-{high:g}: give two shares of the run, low before high")
    for value in _several("matte", s.matte, 3, "red, green, blue, each from 0 to 255"):
        whole("matte", value, 0, 255)
    if config.dit.attention not in ("auto", *KERNELS):
        raise ValueError(f"attention kernel {config.dit.attention!r}: choose auto, {', '.join(KERNELS)}")
    for name in ("prompt", "negative_prompt"):
        if not isinstance(getattr(s, name), str):
            raise ValueError(f"{name} {getattr(s, name)!r}: give a text")
    if not isinstance(s.method, Method):
        raise ValueError(f"method {s.method!r}: give a wanjax.Method or one of {', '.join(METHODS)}")
    schedule.check_steps(s.steps)
    skipping.check(s.skip_passes, s.steps)
    refuse((not isinstance(s.skip_in_kab, bool), f"skip in kab {s.skip_in_kab!r}: give True or False"))
    choices = (("solver", s.solver, solvers.SOLVERS), ("fit", s.fit, FITS), ("clip fit", s.clip_fit, CLIP_FITS),
               ("resample", s.resample, RESAMPLES), ("guidance mode", s.guidance_mode, MODES))  # fmt: skip
    for name, value, allowed in choices:
        one_of(name, value, allowed)


def check_seed(seed: Any) -> None:
    """Raises ValueError unless `seed` is a whole number from 0 to 2**32 - 1."""
    whole("seed", seed, 0, 2**32 - 1)


def _several(name: str, values: Any, count: int, wanted: str) -> Sequence[Any]:
    """A sequence of so many. ValueError else."""
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray) or len(values) != count:
        raise ValueError(f"{name} {values}: give {wanted}")
    return values


def _number(name: str, value: Any, low: float, high: float, remark: str = "") -> float:
    """A finite number in a range. ValueError else."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise ValueError(f"{name} {value}: give a number from {low:g} to {high:g}{remark}")
    return number
