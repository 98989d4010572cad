"""From two keyframes and a prompt to a video: the whole story, from arrays to arrays and from files to files.

Axis letters as in `wanjax.types`. Nothing here knows how a model computes; each stage is one jitted function
of (config, params, arrays), so that a second run with other values compiles nothing.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from samplers import schedule, solvers
from samplers.sample import Progress, check, sample
from wanjax import conditioning, keyframes, sharding, vae
from wanjax import method as methods
from wanjax.checkpoint import Model
from wanjax.clip import CLIPVision
from wanjax.config import CLIPConfig, DiTConfig, ModelConfig, UMT5Config, VAEConfig
from wanjax.dit import WanDiT, check_cross
from wanjax.guidance import MODES, GuidanceMode, guided
from wanjax.method import Method, MethodArrays
from wanjax.types import Conditions, CrossBias
from wanjax.umt5 import UMT5Encoder

FITS = ("stretch", "crop", "pad")


@dataclass(frozen=True)
class Settings:
    """How a clip is made. `Settings.of(config)` fills in what suits a model.

    Attributes:
      prompt, negative_prompt: what the video shows; what guidance steers away from.
      frames: pixel frames, temporal_stride * n + 1, keyframes included.
      size: (height, width) in pixels, multiples of the model's `size_multiple`.
      steps: denoising steps.
      guidance: classifier-free guidance scale, at least 0; at 1 the second pass is skipped.
      shift: timestep shift of the schedule.
      solver, grid: names in `solvers.SOLVERS` and `schedule.GRIDS`.
      seed: of the noise, 0 .. 2**32 - 1.
      fit: how keyframes of another size are brought to `size`: stretch, crop or pad.
      matte: red, green, blue in 0..255 under transparent keyframes and around padded ones.
      guidance_mode: "sequential" (least memory) or "batched" passes.
      method: what is changed of Wan2.1's attention (`wanjax.method`); the default changes nothing.
    """

    prompt: str = ""
    negative_prompt: str = ""
    frames: int = 81
    size: tuple[int, int] = (480, 864)
    steps: int = 50
    guidance: float = 5.0
    shift: float = 16.0
    solver: str = "unipc"
    grid: str = "wan"
    seed: int = 0
    fit: keyframes.Fit = "stretch"
    matte: tuple[int, int, int] = keyframes.BLACK
    guidance_mode: GuidanceMode = "sequential"
    method: Method = Method()

    @classmethod
    def of(cls, config: ModelConfig, **overrides: Any) -> "Settings":
        """The model's own defaults, with some replaced."""
        d = config.sampling
        own = cls("", d.negative_prompt, d.frames, d.size, d.steps, d.guidance, d.shift, d.solver)
        return dataclasses.replace(own, **overrides)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError, one line naming the setting and the mend, for what this model cannot do."""
        if config.dit.num_images != 2:
            raise ValueError(
                f"model {config.name}: takes {config.dit.num_images} keyframes; "
                "inbetweening needs a first-and-last-frame model (flf2v)"
            )
        keyframes.check_frames(self.frames, config.vae.temporal_stride)
        keyframes.check_size(*self.size, config.size_multiple)
        if not (math.isfinite(self.guidance) and 0 <= self.guidance <= 1e6):
            raise ValueError(f"guidance {self.guidance}: give a number from 0 to 1e6; 1 switches it off")
        if len(self.matte) != 3 or not all(0 <= value <= 255 for value in self.matte):
            raise ValueError(f"matte {self.matte}: give red, green, blue, each from 0 to 255")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed}: give a whole number from 0 to {2**32 - 1}")
        choices = (("solver", self.solver, solvers.SOLVERS), ("fit", self.fit, FITS),
                   ("guidance mode", self.guidance_mode, MODES))  # fmt: skip
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{name} {value!r}: choose {', '.join(allowed)}")
        schedule.sigmas(self.grid, self.steps, self.shift)
        self.method_arrays(config)

    def method_arrays(self, config: ModelConfig) -> MethodArrays:
        """The method as inputs of the sampler. ValueError, naming the setting, for what this model cannot have."""
        return methods.arrays(self.method, config, self.frames, self.size, self.steps)


@dataclass(frozen=True)
class Keyframes:
    """Both keyframes as the models take them, of B pairs.

    Attributes:
      first, last: [B, H, W, 3] uint8, fitted to the output size.
      clip_first, clip_last: [B, size, size, 3] float32, the original images stretched and normalised.
    """

    first: np.ndarray
    last: np.ndarray
    clip_first: np.ndarray
    clip_last: np.ndarray

    @classmethod
    def prepare(cls, pairs: list[tuple[Any, Any]], config: ModelConfig, settings: Settings) -> "Keyframes":
        """From B pairs of RGB images, each a Pillow image or a uint8 array [H, W, 3], of any size."""
        images = [[_image(image) for image in pair] for pair in pairs]
        size = config.clip.image_size
        clip = [[keyframes.clip_input(image, size) for image in pair] for pair in images]
        fit = [fitted(pair, settings) for pair in images]
        columns = [np.stack(column) for rows in (fit, clip) for column in zip(*rows, strict=True)]
        return cls(*columns)


def fitted(images: Sequence[Image.Image], settings: Settings) -> list[np.ndarray]:
    """The images at the size of the video, uint8 [H, W, 3] each."""
    return [keyframes.fit(image, *settings.size, settings.fit, settings.matte) for image in images]


@dataclass
class Timings:
    """Seconds by stage. Compilation is counted apart, wherever it happened."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a block: what XLA spent compiling goes to "compile", the rest to `name`."""
        compiling = 0.0

        def listen(event: str, duration: float, **_: Any) -> None:
            nonlocal compiling
            if event.startswith("/jax/core/compile/"):
                compiling += duration

        jax.monitoring.register_event_duration_secs_listener(listen)
        start = time.perf_counter()
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
            spent = time.perf_counter() - start
            # Nested traces report overlapping times, so the sum may exceed the wall clock.
            compiling = min(compiling, spent)
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - compiling
            self.seconds["compile"] = self.seconds.get("compile", 0.0) + compiling


@dataclass(frozen=True)
class Result:
    """A finished batch.

    Attributes:
      video: uint8 [B, T, H, W, 3]; the first and last frame are the model's rendering of the keyframes.
      latents: float32 [B, F, h, w, 16], normalised.
      seconds: wall time of "encode", "compile", "denoise", "decode".
    """

    video: np.ndarray
    latents: jax.Array
    seconds: Mapping[str, float]


def inbetween(
    model: Model,
    first: Image.Image | np.ndarray,
    last: Image.Image | np.ndarray,
    settings: Settings,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    cross_bias: CrossBias | None = None,
) -> Result:
    """Makes the video between two keyframes.

    Args:
      model: from `wanjax.checkpoint.load`.
      first, last: RGB, each a Pillow image or uint8 [H, W, 3], of any size.
      settings: see `Settings`; the prompt is in it.
      progress: draws a bar while denoising. Pass the same object to every run: it is part of the program.
      mesh: from `sharding.make_mesh`; the model's params should lie on it (`sharding.shard_params`).
      cross_bias: a bias of your own on cross-attention, leaves [layers, 1, F, keys], in every step of the
        conditional pass; KAB's is added to it. See docs/method.md for an example.

    Returns:
      A `Result` of batch 1.

    Raises:
      ValueError: settings that this model cannot run.
      FloatingPointError: NaN or inf in the latents; names the step.
    """
    settings.check(model.config)
    prepared = Keyframes.prepare([(first, last)], model.config, settings)
    return run(model, prepared, [settings.prompt], settings, progress, mesh, cross_bias)


def run(
    model: Model,
    prepared: Keyframes,
    prompts: list[str],
    settings: Settings,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    cross_bias: CrossBias | None = None,
) -> Result:
    """`inbetween` for B pairs of keyframes and B prompts at once: encode, denoise, decode."""
    config = model.config
    rows = len(prompts), config.vae.latent_frames(settings.frames) // config.dit.patch_size[0]
    check_cross(config.dit, rows, cross_bias, None)
    timings = Timings()
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        with timings.stage("encode"):
            conditions, negative = encode(model, prepared, prompts, settings)
            conditions, negative = jax.block_until_ready(place(conditions, negative, mesh))
        with timings.stage("denoise"):
            latents = denoise(model, conditions, negative, settings, progress, mesh, cross_bias)
        with timings.stage("decode"):
            video = decode(model, latents)
    return Result(video, latents, timings.seconds)


def encode(model: Model, prepared: Keyframes, prompts: list[str], settings: Settings) -> tuple[Conditions, jax.Array]:
    """Conditions of B samples, and the text [B, L, text_dim] of the pass without the prompt."""
    config, params = model.config, model.params
    # Both prompts in one call: the text encoder is large, and reads its weights once.
    texts = [*prompts, settings.negative_prompt]
    ids, mask = model.tokenizer.encode(texts, config.dit.text_length)
    text = _encode_text(config.umt5, params["umt5"], ids, mask)
    batch = len(prompts)
    negative = jnp.broadcast_to(text[batch:], text[:batch].shape)
    images = np.concatenate([prepared.clip_first, prepared.clip_last])
    tokens = _encode_images(config.clip, params["clip"], images)
    first, last = keyframes.to_unit(prepared.first), keyframes.to_unit(prepared.last)
    latent = _encode_keyframes(config.vae, params["vae"], first, last, frames=settings.frames)
    return Conditions(text[:batch], tokens[:batch], tokens[batch:], latent), negative


def denoise(
    model: Model,
    conditions: Conditions,
    negative_text: jax.Array,
    settings: Settings,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    cross_bias: CrossBias | None = None,
    until: int | None = None,
    noise: jax.Array | None = None,
) -> jax.Array:
    """Latents [B, F, h, w, 16] of B samples, from seeded noise. FloatingPointError on NaN or inf.

    `until` stops before that step, 0 .. steps, and gives the latents that enter it. `noise`, standard normal in the
    latents' shape, takes the place of the seed's.
    """
    config = model.config
    table = solvers.table(settings.solver, schedule.sigmas(settings.grid, settings.steps, settings.shift))
    method = settings.method_arrays(config)
    if until is not None:
        table = jax.tree.map(lambda rows: rows[:until], table)
        method = method.replace(strength=method.strength[:until])
    shape = (*conditions.latent.shape[:-1], config.dit.out_channels)
    if noise is None:
        noise = jax.random.normal(jax.random.key(settings.seed), shape, jnp.float32)
    elif noise.shape != shape:
        raise ValueError(f"noise of shape {noise.shape}: the latents are {shape}")
    if mesh is not None:
        noise = sharding.shard_video(noise, mesh)
    with progress.open(len(table.sigma)) if progress is not None else nullcontext():
        latents, failed_step = _denoise(
            config.dit,
            model.params["dit"],
            noise,
            conditions,
            negative_text,
            np.float32(settings.guidance),
            table,
            method,
            cross_bias,
            guidance_mode=settings.guidance_mode,
            on_step=progress,
        )
        check(failed_step)
    return latents


def decode(model: Model, latents: jax.Array) -> np.ndarray:
    """Video uint8 [B, T, H, W, 3] of latents [B, F, h, w, 16]."""
    return keyframes.from_unit(_decode(model.config.vae, model.params["vae"], latents))


@partial(jax.jit, static_argnums=0, static_argnames=("guidance_mode", "on_step"))
def _denoise(
    config: DiTConfig,
    params: Any,
    noise: jax.Array,
    conditions: Conditions,
    negative_text: jax.Array,
    guidance: jax.Array,
    steps: solvers.StepTable,
    method: MethodArrays,
    cross_bias: CrossBias | None,
    *,
    guidance_mode: GuidanceMode,
    on_step: Progress | None,
) -> tuple[jax.Array, jax.Array]:
    def model(latents: jax.Array, timestep: jax.Array, conditions: Conditions, control, bias) -> jax.Array:
        return WanDiT(config).apply({"params": params}, latents, timestep, conditions, method.table, bias, control)

    denoise = guided(model, conditions, negative_text, guidance, guidance_mode, method.control, cross_bias)
    return sample(denoise, noise, steps, on_step, method.strength)


@partial(jax.jit, static_argnums=0)
def _encode_text(config: UMT5Config, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return conditioning.pad_text(UMT5Encoder(config).apply({"params": params}, ids, mask), mask)


@partial(jax.jit, static_argnums=0)
def _encode_images(config: CLIPConfig, params: Any, pixels: jax.Array) -> jax.Array:
    return CLIPVision(config).apply({"params": params}, pixels)


@partial(jax.jit, static_argnums=0, static_argnames="frames")
def _encode_keyframes(config: VAEConfig, params: Any, first: jax.Array, last: jax.Array, *, frames: int) -> jax.Array:
    latent = vae.encode(config, params, conditioning.pixel_condition(first, last, frames))
    return conditioning.latent_condition(latent, conditioning.mask(frames, config.temporal_stride))


@partial(jax.jit, static_argnums=0)
def _decode(config: VAEConfig, params: Any, latents: jax.Array) -> jax.Array:
    return vae.decode(config, params, latents)


def place(conditions: Conditions, negative: jax.Array, mesh: Mesh | None) -> tuple[Conditions, jax.Array]:
    """Puts encoded conditions on the mesh: the latent as `sharding.shard_video`, the rest on every device."""
    if mesh is None:
        return conditions, negative
    latent = sharding.shard_video(conditions.latent, mesh)
    rest, negative = sharding.replicate((conditions.replace(latent=None), negative), mesh)
    return rest.replace(latent=latent), negative


def _image(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"keyframe {image.dtype} {image.shape}: give uint8 [H, W, 3] or a Pillow image")
    return Image.fromarray(image)
