"""Makes the videos of an arm for a batch of clips.

What a batch shares (fitted keyframes, conditions, noise) is made once and serves every arm. The noise of a clip
comes from the seed and the clip's id, so neither the batch nor the order of arms nor a resumed run changes it, and
all arms begin from the same one. Axis letters as in `wanjax.types`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from benchmarks.tgi import two_way
from benchmarks.tgi.arms import Arm, shuffled_curve
from benchmarks.tiny.evaluate import baselines
from samplers import film, pipeline, programs, sample
from samplers.pipeline import Encoded, Inputs
from samplers.plan import Plan, Settings
from samplers.run import check
from wanjax import conditioning, keyframes, vae
from wanjax.checkpoint import Model
from wanjax.config import DiTConfig, ModelConfig, VAEConfig
from wanjax.dit import WanDiT
from wanjax.guidance import guided
from wanjax.method import Method, MethodArrays
from wanjax.retro import scale_vector
from wanjax.types import Conditions, CrossBias


@dataclass(frozen=True)
class Clips:
    """A batch to be inbetweened.

    Attributes:
      ids: of B clips.
      captions: B prompts.
      backwards: B prompts that say what the clip shows in reversed time, None where nobody says.
      keyframes: B pairs of uint8 [H, W, 3] at their own size.
      truth: uint8 [B, T, H, W, 3] at the size of the run; its first and last frame are shown to a model, and the middle
        one to arms of three keyframes.
    """

    ids: Sequence[str]
    captions: Sequence[str]
    backwards: Sequence[str | None]
    keyframes: Sequence[tuple[np.ndarray, np.ndarray]]
    truth: np.ndarray


class Batch:
    """What the arms of one batch share.

    Args:
      model: for inbetweening.
      image_model: conditioned on one image, for the two-way schemes, or None where there is none.
      settings: of the run; `frames` and `size` are those of `clips.truth`.
      clips: the batch.

    Attributes:
      inputs: its keyframes as the models take them.
    """

    def __init__(self, model: Model, image_model: Model | None, settings: Settings, clips: Clips):
        self.model, self.settings, self.clips = model, settings, clips
        self._image_model = image_model
        self.plan = Plan.of(model.config, settings)
        self.inputs = Inputs.prepare(list(clips.keyframes), self.plan)

    @cached_property
    def encoded(self) -> Encoded:
        return self._encoded(self.model, self.clips.captions)

    def _encoded(self, model: Model, captions: Sequence[str]) -> Encoded:
        plan = self.plan if model is self.model else Plan.of(model.config, self.settings)
        return pipeline.encode(model, plan, [self.inputs], [list(captions)])[0]

    def noise(self, seed: int) -> jax.Array:
        """Standard normal [B, F, h, w, C]."""
        return _noise(self.keys(seed), self.plan.latent_shape)

    def keys(self, seed: int, use: int | None = None) -> jax.Array:
        """Random keys [B]: a clip's depends on the seed, on its id and, beside that of its noise, on what for."""
        numbers = np.array([zlib.crc32(one.encode()) for one in self.clips.ids], np.uint32)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(np.uint32(seed))))(numbers)
        return keys if use is None else jax.vmap(lambda key: jax.random.fold_in(key, use))(keys)

    def first_frame_latent(self, model: Model, frame: np.ndarray) -> jax.Array:
        """Condition channels [B, F, h, w, s + 16] of frames uint8 [B, H, W, 3] as the first and only keyframe."""
        return _encode_first(
            _vae_config(model), model.part("vae"), keyframes.to_unit(frame), frames=self.settings.frames
        )

    @cached_property
    def one_way(self) -> tuple[Model, Conditions, Conditions, jax.Array]:
        """The image-to-video model, its conditions forwards and backwards, and the text of the pass without prompt.

        Each direction is told what it shows; where nobody says what a clip shows backwards, that has no prompt.

        Raises:
          ValueError: there is no such model.
        """
        model = self._image_model
        if model is None:
            raise ValueError(
                "trf, vibid: need a model conditioned on the first frame alone; give it with --image-model "
                "(the tiny model is one itself)"
            )
        encoded = self.encoded if model is self.model else self._encoded(model, self.clips.captions)
        told = encoded.conditions
        reversed_time = ["" if text is None else text for text in self.clips.backwards]
        text_backwards = self._encoded(model, reversed_time).conditions.text
        ends = ((told.text, self._first_seen(model, 0)), (text_backwards, self._first_seen(model, 1)))
        forwards, backwards = (
            told.replace(text=text, images=images, latent=self.first_frame_latent(model, self.inputs.pixels[:, place]))
            for place, (text, images) in enumerate(ends)
        )
        return model, forwards, backwards, encoded.negative

    def _first_seen(self, model: Model, place: int) -> jax.Array:
        """Image tokens [B, M, K, D] of a model that sees keyframe `place` as the first, and no other."""
        inputs = Inputs(self.inputs.pixels[:, [place]], self.inputs.vision[:, [place]])
        plan = Plan.of(model.config, self.settings, at=(0,))
        return pipeline.encode_images(model, plan, inputs.vision)

    def decode(self, latents: jax.Array) -> np.ndarray:
        return pipeline.decode(self.model, self.plan, latents)


def make(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    """The arm's videos, uint8 [B, T, H, W, 3].

    Raises:
      ValueError: settings that the model cannot have, or no model for a two-way scheme.
      FloatingPointError: NaN or inf in the latents.
    """
    return _MAKERS[arm.kind](arm, batch, seed)


def _denoised(batch: Batch, method: Method, seed: int, until: int | None = None, **other: Any) -> jax.Array:
    """`other`: settings in the place of the batch's."""
    settings = dataclasses.replace(batch.settings, method=method, **other)
    plan = Plan.of(batch.model.config, settings)
    return pipeline.denoise(batch.model, plan, batch.encoded, batch.noise(seed), until=until, chunk=settings.steps)


def _method(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    return batch.decode(_denoised(batch, arm.method, seed))


def _euler(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    return batch.decode(_denoised(batch, arm.method, seed, solver="euler"))


def _uniform_scale(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    """ReTRo's factors replaced by their mean."""
    retro, frames = arm.method.retro, batch.settings.frames
    mean = float(scale_vector(retro, frames, batch.plan.grid[0]).mean())
    uniform = dataclasses.replace(retro, s_edge=mean, s_mid=mean)
    return _method(dataclasses.replace(arm, method=dataclasses.replace(arm.method, retro=uniform)), batch, seed)


def _empty_caption(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    clips = dataclasses.replace(batch.clips, captions=[""] * len(batch.clips.ids))
    return _method(arm, Batch(batch.model, None, batch.settings, clips), seed)


def _shuffled_anchors(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    frames = batch.plan.grid[0]
    kab = dataclasses.replace(arm.method.kab, curve=shuffled_curve(frames, seed))
    return _method(dataclasses.replace(arm, method=dataclasses.replace(arm.method, kab=kab)), batch, seed)


@struct.dataclass
class Varying:
    """What differs from step to step beside the sampler's own rows (`Row.extra`), float32 [steps].

    Attributes:
      biased: 1 where a given bias is added.
      hidden: 1 where the last keyframe is hidden.
    """

    biased: np.ndarray
    hidden: np.ndarray


def _random_bias(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    """Gaussian, with the spread that KAB's bias has in its first active step, by layer, clip, frame and branch; added
    in KAB's steps."""
    settings = dataclasses.replace(batch.settings, method=arm.method)
    plan = Plan.of(batch.model.config, settings)
    active, step = plan.strength.any((1, 2)), int(plan.kab_steps[0])
    conditions = batch.encoded.conditions
    latents = _denoised(batch, arm.method, seed, until=step)
    size = _bias_size(plan.config.dit, batch.model.part("dit"), latents, plan.table.step.timestep[step], conditions,
                      plan.method, plan.strength[step])  # fmt: skip
    lengths = conditions.text.shape[1], *([conditions.images.shape[2]] * conditions.images.shape[1])
    text, *images = (_gaussian(batch.keys(seed, use), of, n)
                     for use, of, n in zip((1, 2, 3), size, lengths, strict=True))  # fmt: skip
    varying = Varying(active.astype(np.float32), np.zeros(len(active), np.float32))
    quiet = dataclasses.replace(settings, method=dataclasses.replace(settings.method, kab=None))
    return batch.decode(_varied(batch, quiet, seed, varying, CrossBias(text, jnp.stack(images, 3))))


def _gaussian(clips: jax.Array, size: jax.Array, keys: int) -> jax.Array:
    """Bias [L, B, F, K] of mean 0 and root mean square `size` [L, B, F]; `clips` are random keys [B]."""
    layers, _, frames = size.shape
    drawn = jax.vmap(lambda key: jax.random.normal(key, (layers, frames, keys)), out_axes=1)(clips)
    return size[..., None] * drawn


def _random_mask(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    settings = dataclasses.replace(batch.settings, method=arm.method)
    hidden = np.zeros(settings.steps, np.float32)
    hidden[np.random.default_rng([seed, 2]).permutation(settings.steps)[: settings.steps // 2]] = 1
    return batch.decode(_varied(batch, settings, seed, Varying(np.zeros(settings.steps, np.float32), hidden), None))


def _varied(batch: Batch, settings: Settings, seed: int, varying: Varying, bias: CrossBias | None) -> jax.Array:
    model = batch.model
    plan = Plan.of(model.config, settings, extra=varying)
    hidden = batch.first_frame_latent(model, batch.clips.truth[:, 0])
    carry = _sample_varied(plan.config.dit, model.part("dit"), sample.start(batch.noise(seed)), plan.table,
                           batch.encoded.conditions, hidden, batch.encoded.negative, plan.method, bias)  # fmt: skip
    check(carry)
    return carry.sample


def middle(frames: int, stride: int) -> int:
    """Pixel frame of the third keyframe: the last of a latent frame, as near the middle as there is.

    Raises:
      ValueError: a clip of fewer than three latent frames.
    """
    place = round((frames - 1) / 2 / stride) * stride
    if not 0 < place < frames - 1:
        raise ValueError(f"frames {frames}: too few for a third keyframe; take at least {2 * stride + 1}")
    return place


def halves(arm: Arm, config: ModelConfig, frames: int) -> tuple[film.Span, ...]:
    """Where the two clips of a "chain" lie. ValueError: an overlap that they cannot have."""
    stride = config.vae.temporal_stride
    place = middle(frames, stride)
    overlap = 0 if arm.options is None else arm.options.overlap
    return film.spans([place + 1, frames - place], overlap, stride, longest=frames)


def check_three(arm: Arm, config: ModelConfig, settings: Settings) -> None:
    """Raises ValueError, naming the arm, for clips that an arm of three keyframes cannot make; others pass."""
    try:
        if arm.kind in ("three", "three-cross-fade"):
            middle(settings.frames, config.vae.temporal_stride)
        if arm.kind == "chain":
            film.plans(config, settings, halves(arm, config, settings.frames))
            film.check_solver(settings, 0 if arm.options is None else arm.options.overlap)
    except ValueError as error:
        raise ValueError(f"arm {arm.name}: {error}") from error


def _three_keyframes(batch: Batch) -> tuple[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """The pixel frame of the middle one, and of each clip first, middle and last."""
    place = middle(batch.settings.frames, batch.plan.config.vae.temporal_stride)
    clips = batch.clips
    return place, [(first, one[place], last) for (first, last), one in zip(clips.keyframes, clips.truth, strict=True)]


def _three(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    """One clip, from the same noise as with two keyframes."""
    place, given = _three_keyframes(batch)
    plan = Plan.of(batch.model.config, dataclasses.replace(batch.settings, method=arm.method), (0, place, -1))
    (told,) = pipeline.encode(batch.model, plan, [Inputs.prepare(given, plan)], [batch.clips.captions])
    return batch.decode(pipeline.denoise(batch.model, plan, told, batch.noise(seed), chunk=batch.settings.steps))


def _chain(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    """Two clips that share the middle keyframe, each told the caption of the whole."""
    _, given = _three_keyframes(batch)
    model, clips = batch.model, halves(arm, batch.model.config, batch.settings.frames)
    plans = film.plans(model.config, dataclasses.replace(batch.settings, method=arm.method), clips)
    seeds = [batch.settings.seed] * len(given)
    batches = [pipeline.Batch(Inputs.prepare([one[n : n + 2] for one in given], plan), batch.clips.captions, seeds)
               for n, plan in enumerate(plans)]  # fmt: skip
    noises = [_noise(batch.keys(seed, 5 + n), plan.latent_shape) for n, plan in enumerate(plans)]
    return film.make(model, clips, plans, batches, noises=noises)[0]


def _three_cross_fade(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    place, _ = _three_keyframes(batch)
    return baselines(batch.clips.truth, (0, place, batch.settings.frames - 1))["crossfade"]


def _two_way(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    model, forwards, backwards, negative = batch.one_way
    latents = two_way.sample(model, forwards, backwards, negative, batch.settings, arm.options, batch.noise(seed),
                             batch.keys(seed, 4))  # fmt: skip
    return pipeline.decode(model, Plan.of(model.config, batch.settings), latents)


def _latent_interpolation(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    truth, config, params = batch.clips.truth, batch.plan.config.vae, batch.model.part("vae")
    still = [np.repeat(truth[:, [end]], truth.shape[1], 1) for end in (0, -1)]
    first, last = (_encode(config, params, keyframes.to_unit(video)) for video in still)
    share = np.linspace(0, 1, first.shape[1], dtype=np.float32)[None, :, None, None, None]
    return batch.decode(first + (last - first) * share)


def _vae(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    model = batch.model
    return batch.decode(_encode(batch.plan.config.vae, model.part("vae"), keyframes.to_unit(batch.clips.truth)))


def _truth(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    return batch.clips.truth


def _cross_fade(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    return baselines(batch.clips.truth)["crossfade"]


def _nearest(arm: Arm, batch: Batch, seed: int) -> np.ndarray:
    return baselines(batch.clips.truth)["nearest"]


_MAKERS: Mapping[str, Callable[[Arm, Batch, int], np.ndarray]] = MappingProxyType(
    {
        "method": _method,
        "euler": _euler,
        "uniform-scale": _uniform_scale,
        "empty-caption": _empty_caption,
        "shuffled-anchors": _shuffled_anchors,
        "random-bias": _random_bias,
        "random-mask": _random_mask,
        "two-way": _two_way,
        "three": _three,
        "chain": _chain,
        "three-cross-fade": _three_cross_fade,
        "latent-interpolation": _latent_interpolation,
        "cross-fade": _cross_fade,
        "nearest": _nearest,
        "vae": _vae,
        "truth": _truth,
    }
)
KINDS = tuple(_MAKERS)


def _vae_config(model: Model) -> VAEConfig:
    """With its kernels chosen for the device that computes."""
    return model.config.for_platform(jax.default_backend()).vae


@partial(jax.jit, static_argnums=1)
def _noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


@partial(jax.jit, static_argnums=0)
def _encode(config: VAEConfig, params: Any, video: jax.Array) -> jax.Array:
    return vae.encode(config, params, video)


@partial(jax.jit, static_argnums=0, static_argnames="frames")
def _encode_first(config: VAEConfig, params: Any, first: jax.Array, *, frames: int) -> jax.Array:
    latent = vae.encode(config, params, conditioning.keyframe_video(first[:, None], (0,), frames))
    return conditioning.latent_condition(latent, conditioning.mask(frames, config.temporal_stride, (0,)))


@partial(jax.jit, static_argnums=0)
def _bias_size(
    config: DiTConfig,
    params: Any,
    latents: jax.Array,
    timestep: jax.Array,
    conditions: Conditions,
    method: MethodArrays,
    strength: jax.Array,
) -> tuple[jax.Array, ...]:
    """How far KAB's bias spreads about its mean over the keys of one softmax, which the softmax does not see: root mean
    square in one evaluation, [L, B, F] of text and of each image; strength is [L, F]."""
    batch = latents.shape[0]
    strength = jnp.broadcast_to(strength[:, None], (config.num_layers, batch, strength.shape[1]))
    _, seen = WanDiT(config, inspect=True).apply(
        {"params": params}, latents, jnp.broadcast_to(timestep, (batch,)), conditions, method.table, None,
        method.control, strength,
    )  # fmt: skip
    text, images = seen.bias.text, seen.bias.images
    own, joint = images.mean(-1, keepdims=True), images.mean((-2, -1), keepdims=True)
    images = images - jnp.where(method.control.isolated, own, joint)
    parts = text - text.mean(-1, keepdims=True), *jnp.moveaxis(images, -2, 0)
    return tuple(jnp.sqrt(jnp.square(part).mean(-1)) for part in parts)


@partial(jax.jit, static_argnums=0)
def _sample_varied(
    config: DiTConfig,
    params: Any,
    carry: sample.Carry,
    table: sample.Row,
    conditions: Conditions,
    hidden: jax.Array,
    negative: jax.Array,
    method: MethodArrays,
    bias: CrossBias | None,
) -> sample.Carry:
    """The sampler with conditions and bias that change from step to step; `hidden` replaces `conditions.latent`."""
    model = programs.evaluator(config, params, method)

    def denoise(latents: jax.Array, row: sample.Row, state: Any) -> tuple[jax.Array, Any]:
        told = conditions.replace(latent=jnp.where(row.extra.hidden > 0, hidden, conditions.latent))
        given = jax.tree.map(lambda leaf: leaf * row.extra.biased, bias)
        run = guided(model, told, negative, row.guidance, "sequential", given)
        return run(latents, row.step.timestep, row.strength), state

    return sample.sample(denoise, carry, table, 0, len(table.live))
