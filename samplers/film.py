"""Films: clips between neighbouring keyframes of a storyboard, a shared keyframe there once.

Without overlap every clip is what it is alone. With an overlap of N pixel frames each clip goes on for N frames beyond
each keyframe that it shares, so that two neighbours cover the same 2 N frames round it; all clips take each step
together, and after it what two of them have of those frames is blended, so that motion does not stop at the keyframe.

The autoencoder is causal: latent frame 0 is one pixel frame, each later one `temporal_stride` of them. Of a clip that
begins inside the film latent frame 0 therefore has no counterpart in the clip before, and its latent frames 1 .. M are
the last M of that clip, M = 2 N / stride. Axis letters as in `wanjax.types`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from samplers import memory, pipeline, run
from samplers.pipeline import Batch, Encoded, ImageLike, Inputs, Timings
from samplers.plan import Plan, Settings, check_seed, check_settings
from samplers.programs import Programs
from samplers.sample import Carry, Row
from wanjax.checkpoint import Model
from wanjax.config import ModelConfig
from wanjax.settings import check_frames, refuse, whole
from wanjax.types import Conditions

LONGEST = 81
"""Pixel frames of the longest clips that Wan2.1's weights and the bundled model's were trained with."""

OnStep = Callable[[int, Sequence[Carry]], None]
"""Called with the number of steps done and the carry of every clip, before the first step too (0); `run.bar` is one."""


@dataclass(frozen=True)
class Span:
    """Where a clip lies in its film, in pixel frames.

    Attributes:
      begin: the film's frame that is the clip's first.
      frames: of the clip, overlap included.
      at: where its two keyframes lie in it.
    """

    begin: int
    frames: int
    at: tuple[int, int]

    @property
    def shown(self) -> slice:
        """Which of its frames the film shows: the keyframe that it shares with the clip before is that clip's."""
        return slice(self.at[0] + (self.begin + self.at[0] > 0), self.at[1] + 1)


@dataclass(frozen=True)
class Film:
    """A finished film.

    Attributes:
      video: uint8 [T, H, W, 3]; the keyframes in it are the model's rendering of them.
      latents: of each clip, overlap included, float32 [1, F, h, w, 16], normalised.
      at: the film's frames where the keyframes lie.
      spans: of the clips.
      seconds: wall time of "encode", "compile", "denoise", "decode".
    """

    video: np.ndarray
    latents: tuple[jax.Array, ...]
    at: tuple[int, ...]
    spans: tuple[Span, ...]
    seconds: Mapping[str, float]


def spans(frames: Sequence[int], overlap: int, stride: int, longest: int = LONGEST) -> tuple[Span, ...]:
    """Where the clips of a film lie.

    Args:
      frames: of each clip from keyframe to keyframe, both included, stride * n + 1.
      overlap: frames beyond each shared keyframe, a multiple of the stride; 0 for none.
      stride: pixel frames of a latent frame.
      longest: that a clip may be with its overlap.

    Raises:
      ValueError: no clip, another number of frames, or an overlap that the clips cannot have.
    """
    refuse((not len(frames), "frames: none given; give those of each clip"))
    frames = [whole("frames", count, 1, 10**6) for count in frames]
    for count in frames:
        check_frames(count, stride)
    overlap = whole("overlap", overlap, 0, 10**6)
    most = (min(frames) - 1) // 2 // stride * stride
    refuse(
        (overlap % stride, f"overlap {overlap}: give a multiple of {stride}, the frames of one latent frame, or 0"),
        (overlap > most and len(frames) > 1,
         f"overlap {overlap}: more than half of a clip of {min(frames)} frames; give at most {most}, or longer clips"),
    )  # fmt: skip
    found, keyframe, last = [], 0, len(frames) - 1
    for number, count in enumerate(frames):
        before, after = overlap * (number > 0), overlap * (number < last)
        long = before + count + after
        mend = f"; give it at most {longest - before - after}" + (", or less overlap" if overlap else "")
        what = f"clip {number + 1}: {long} frames{' with its overlap' if before or after else ''}"
        refuse((long > longest, f"{what}; the weights know at most {longest}{mend}"))
        found.append(Span(keyframe - before, long, (before, before + count - 1)))
        keyframe += count - 1
    return tuple(found)


def places(clips: Sequence[Span]) -> tuple[int, ...]:
    """The film's frames where its keyframes lie, one more than clips."""
    return (0, *(one.begin + one.at[1] for one in clips))


def plans(config: ModelConfig, settings: Settings, clips: Sequence[Span]) -> tuple[Plan, ...]:
    """The plan of every clip; those of one length with keyframes at the same places are one.

    Raises:
      ValueError: as `Plan.of`.
    """
    made: dict[tuple[int, tuple[int, int]], Plan] = {}
    for one in clips:
        if (one.frames, one.at) not in made:
            made[one.frames, one.at] = Plan.of(config, replace(settings, frames=one.frames), one.at)
    return tuple(made[one.frames, one.at] for one in clips)


def shared_latents(clips: Sequence[Span], stride: int) -> int:
    """Latent frames M that neighbours both have: the last of one, and the second to the (M + 1)st of the next."""
    return 2 * clips[-1].at[0] // stride if len(clips) > 1 else 0


@jax.jit
def blend(before: Any, after: Any, weights: np.ndarray) -> tuple[Any, Any]:
    """Two neighbours that agree in the frames they share.

    Args:
      before, after: pytrees of the same structure, leaves [B, F, h, w, C].
      weights: float32 [M], how much of `after` each shared frame gets.
    """
    count, share = len(weights), weights[:, None, None, None]

    def one(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = left[:, -count:] + share * (right[:, 1 : count + 1] - left[:, -count:])
        return left.at[:, -count:].set(mixed), right.at[:, 1 : count + 1].set(mixed)

    pairs = jax.tree.map(one, before, after)
    return jax.tree.transpose(jax.tree.structure(before), jax.tree.structure((0, 0)), pairs)


def ramp(count: int) -> np.ndarray:
    """Weights of `blend`, float32 [M], rising evenly from above 0 to below 1; symmetric in time."""
    return (np.arange(1, count + 1) / (count + 1)).astype(np.float32)


def share_noise(noises: Sequence[jax.Array], count: int) -> list[jax.Array]:
    """The clips' noise [B, F, h, w, C] with that of the clip before in the frames they share (a mean of two would be
    too weak)."""
    found = list(noises)
    for number in range(len(found) - 1 if count else 0):
        _, found[number + 1] = _blended(found[number], found[number + 1], np.zeros(count, np.float32))
    return found


def blended(carries: Sequence[Carry], count: int) -> list[Carry]:
    """The clips' carries with those of neighbours blended in the `count` latent frames they share.

    What a step hands to the next is blended as a whole, latents and history: solvers are linear in it, so that the next
    step is that of the blended clips.
    """
    found, weights = list(carries), ramp(count)
    for number in range(len(found) - 1 if count else 0):
        pair = found[number : number + 2]
        mixed = _blended(*map(_moving, pair), weights)
        found[number : number + 2] = [one.replace(**new) for one, new in zip(pair, mixed, strict=True)]
    return found


def _moving(carry: Carry) -> dict[str, jax.Array]:
    """What of a carry has the latents' shape."""
    return {name: getattr(carry, name) for name in ("sample", "corrected", "data_1", "data_2")}


def _blended(before: Any, after: Any, weights: np.ndarray) -> tuple[Any, Any]:
    """`blend`, laid out as it was: the denoising program is compiled for that."""

    def lie(new: jax.Array, old: jax.Array) -> jax.Array:
        alike = new.sharding.is_equivalent_to(old.sharding, new.ndim)
        return new if alike else jax.device_put(new, old.sharding)

    return jax.tree.map(lie, blend(before, after, weights), (before, after))


def lockstep(
    parts: Sequence[run.Part],
    carries: Sequence[Carry],
    tables: Sequence[Row],
    steps: int,
    shared: int = 0,
    *,
    first: int = 0,
    on_step: OnStep | None = None,
) -> list[Carry]:
    """Runs the rows `first` .. `steps` - 1 of all clips together.

    Args:
      parts: of each clip, see `run.Part`; each is called for one row at a time.
      carries, tables: of each clip, as in `run.run`; the carries are those before row `first`.
      shared: latent frames that neighbours share, and that are blended after each step.
      on_step: see `OnStep`; what it was given is where a later call may go on.

    Raises:
      FloatingPointError: NaN or inf in the latents; names the step.
    """
    found = list(carries)
    if on_step is not None:
        on_step(first, found)
    for index in range(first, steps):
        found = [part(one, table, np.int32(index), 1)
                 for part, one, table in zip(parts, found, tables, strict=True)]  # fmt: skip
        for one in found:
            run.check(one)
        found = blended(found, shared)
        if on_step is not None:
            on_step(index + 1, found)
    return found


def encode(
    model: Model, of: Sequence[Plan], inputs: Sequence[Inputs], prompts: Sequence[Sequence[str]]
) -> list[Encoded]:
    """What the transformer is told of each clip of B films, a stage at a time for all of them.

    Raises:
      FloatingPointError: NaN or inf in the text, the image tokens or the keyframes' latent.
    """
    texts = [pipeline.encode_texts(model, plan, own) for plan, own in zip(of, prompts, strict=True)]
    tokens = [pipeline.encode_images(model, plan, own.vision) for plan, own in zip(of, inputs, strict=True)]
    latents = [pipeline.encode_keyframes(model, plan, own.pixels) for plan, own in zip(of, inputs, strict=True)]
    return [Encoded(Conditions(text, images, latent), negative)
            for (text, negative), images, latent in zip(texts, tokens, latents, strict=True)]  # fmt: skip


def denoise(
    model: Model,
    of: Sequence[Plan],
    encoded: Sequence[Encoded],
    noises: Sequence[jax.Array] | None,
    shared: int = 0,
    *,
    seeds: Sequence[Sequence[int]] | None = None,
    carries: Sequence[Carry] | None = None,
    first: int = 0,
    on_step: OnStep | None = None,
) -> list[jax.Array]:
    """Latents [B, F, h, w, 16] of each clip of B films, from noise in those shapes.

    Args:
      of: the clips' plans, of the same settings but for the frames.
      shared: latent frames that neighbours share.
      seeds: B of each clip, for solvers that add noise anew; None takes that of the settings.
      carries, first: where to go on, as `on_step` was given them (carries, steps done); noises are not read then.

    Raises:
      ValueError: clips that share frames, by a solver that adds noise anew.
      FloatingPointError: NaN or inf in the latents; names the step.
    """
    params = model.part("dit")

    def part(plan: Plan, told: Encoded) -> run.Part:
        denoise = Programs.of(plan).denoise
        return lambda carry, table, first, n: denoise(params, carry, table, first, told.conditions, told.negative,
                                                      plan.method, None)  # fmt: skip

    check_solver(of[0].settings, shared)
    own = [None] * len(of) if seeds is None else seeds
    if carries is None:
        carries = [pipeline.start(*one) for one in zip(of, share_noise(noises, shared), own, strict=True)]
    parts = [part(*one) for one in zip(of, encoded, strict=True)]
    done = lockstep(parts, carries, [plan.table for plan in of], of[0].settings.steps, shared, first=first,
                    on_step=on_step)  # fmt: skip
    return [one.sample for one in done]


def check_solver(settings: Settings, shared: int) -> None:
    """Raises ValueError for clips that share frames by a solver that adds noise anew: a mean of two is too weak."""
    refuse((shared and settings.solver == "lcm",
            "overlap: solver lcm adds noise anew in every clip; take another solver, or overlap 0"))  # fmt: skip


def join(videos: Sequence[np.ndarray], clips: Sequence[Span]) -> np.ndarray:
    """The film uint8 [B, T, H, W, 3] of its clips' videos."""
    return np.concatenate([video[:, one.shown] for video, one in zip(videos, clips, strict=True)], axis=1)


def make(
    model: Model,
    clips: Sequence[Span],
    of: Sequence[Plan],
    batches: Sequence[Batch],
    *,
    noises: Sequence[jax.Array] | None = None,
    mesh: Mesh | None = None,
    on_step: OnStep | None = None,
) -> tuple[np.ndarray, list[jax.Array], Mapping[str, float]]:
    """B films whose clips lie alike, a stage at a time.

    Args:
      clips, of: of `spans` and `plans`.
      batches: of each clip, B pairs of keyframes, prompts and seeds.
      noises: of each clip, [B, F, h, w, C]; None draws them from the seeds.
      mesh, on_step: as `film`.

    Returns:
      The videos uint8 [B, T, H, W, 3], each clip's latents, seconds by stage.
    """
    timings, shared = Timings(), shared_latents(clips, of[0].config.vae.temporal_stride)
    seeds = [batch.seeds for batch in batches]
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        with timings.stage("encode"):
            told = encode(model, of, [batch.inputs for batch in batches], [batch.prompts for batch in batches])
            told = [jax.block_until_ready(pipeline.place(one, mesh)) for one in told]
        with timings.stage("denoise"):
            drawn = noises or [pipeline.noise(*one, mesh) for one in zip(of, seeds, strict=True)]
            latents = denoise(model, of, told, drawn, shared, seeds=seeds, on_step=on_step)
        with timings.stage("decode"):
            videos = [pipeline.decode(model, *one) for one in zip(of, latents, strict=True)]
    return join(videos, clips), latents, timings.seconds


def film(
    model: Model,
    keyframes: Sequence[ImageLike],
    prompts: str | Sequence[str] | None = None,
    frames: int | Sequence[int] | None = None,
    *,
    seeds: int | Sequence[int] | None = None,
    overlap: int = 0,
    longest: int | None = None,
    settings: Settings | None = None,
    mesh: Mesh | None = None,
    on_step: OnStep | None = None,
    **overrides: Any,
) -> Film:
    """Makes a film through n + 1 keyframes, of n clips.

    What is a list gives one value a clip; what is not holds for all of them.

    Args:
      model: from `samplers.load`.
      keyframes: paths, Pillow images or arrays uint8 [H, W, 3], of any size.
      prompts, frames, seeds: of the clips, frames from keyframe to keyframe with both; None takes the settings'.
      overlap: pixel frames that a clip goes on beyond each keyframe that it shares, a multiple of the temporal stride;
        0 makes the clips that `pipeline.inbetween` makes alone, bit for bit.
      longest: frames that a clip may have with its overlap; None takes LONGEST, or the model's usual number if more.
      settings: of all clips; None takes the model's own.
      mesh: as `pipeline.inbetween`.
      on_step: see `OnStep`.
      overrides: single fields of `Settings`.

    Raises:
      ValueError: what this model cannot run, lists of other lengths, or something that is no image; one line.
      FloatingPointError: NaN or inf; names the stage, and of denoising the step.
    """
    settings = Settings.of(model.config, **overrides) if settings is None else replace(settings, **overrides)
    count = len(keyframes) - 1
    refuse((count < 1, f"keyframes: {count + 1} given; a film takes at least 2"))
    texts = _each("prompts", settings.prompt if prompts is None else prompts, count)
    lengths = _each("frames", settings.frames if frames is None else frames, count)
    seeds = _each("seeds", settings.seed if seeds is None else seeds, count)
    stride = model.config.vae.temporal_stride
    clips = spans(lengths, overlap, stride, max(LONGEST, model.config.sampling.frames) if longest is None else longest)
    whole_film = replace(settings, frames=max(one.frames for one in clips))
    check_settings(model.config, whole_film)
    check_solver(settings, shared_latents(clips, stride))
    for seed, text in zip(seeds, texts, strict=True):
        check_seed(seed)
        refuse((not isinstance(text, str), f"prompt {text!r}: give a text"))
    memory.check(model.config, whole_film, None if mesh is None else dict(mesh.shape), model.policy)
    own = plans(model.config, settings, clips)
    batches = [Batch(Inputs.prepare([pair], plan), [text], [seed])
               for pair, plan, text, seed in zip(pairwise(keyframes), own, texts, seeds, strict=True)]  # fmt: skip
    video, latents, seconds = make(model, clips, own, batches, mesh=mesh, on_step=on_step)
    return Film(video[0], tuple(latents), places(clips), clips, seconds)


def _each(name: str, values: Any, count: int) -> list[Any]:
    """A value for each clip. ValueError: another number of them."""
    found = list(values) if isinstance(values, list | tuple | range) else [values] * count
    refuse((len(found) != count, f"{name}: {len(found)} given for {count} clips; give one for each, or one for all"))
    return found
