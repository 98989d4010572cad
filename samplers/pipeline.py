"""From keyframes and prompts to videos, from arrays to arrays.

Axis letters as in `wanjax.types`; A keyframes. Nothing here knows how a model computes: that are `samplers.programs`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from threading import get_ident
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from samplers import memory, run, sample
from samplers.plan import Plan, Settings, check_seed, check_settings, pixel_places
from samplers.programs import Programs, state
from samplers.sample import Carry, Row
from wanjax import hosts, keyframes, sharding
from wanjax.accepted import check_cross
from wanjax.checkpoint import Model
from wanjax.settings import refuse
from wanjax.types import Conditions, CrossBias

ImageLike = Any
"""A path, a Pillow image, or an array uint8 [H, W, 3]: what `keyframes.image` takes."""


@dataclass(frozen=True)
class Inputs:
    """Keyframes of B clips as the models take them.

    Attributes:
      pixels: uint8 [B, A, H, W, 3], fitted to the output size, in the order of `Plan.at`.
      vision: float32 [B, A, size, size, 3], the original images squared and normalised.
    """

    pixels: np.ndarray
    vision: np.ndarray

    @classmethod
    def prepare(cls, clips: Sequence[Sequence[ImageLike]], plan: Plan) -> "Inputs":
        """From B clips' A keyframes each, in the order of `Plan.at`, of any size.

        Raises:
          ValueError: something that is no image, or another number of keyframes.
        """
        s = plan.settings
        images = [[keyframes.image(image, s.matte) for image in clip] for clip in clips]
        counts = [len(clip) for clip in images]
        refuse(({*counts} != {len(plan.at)}, f"keyframes: {counts} given, {len(plan.at)} planned"))
        size = plan.config.clip.image_size
        vision = [[keyframes.clip_input(image, size, s.clip_fit) for image in clip] for clip in images]
        return cls(np.stack([np.stack(fitted(clip, s)) for clip in images]), np.stack(list(map(np.stack, vision))))


def fitted(images: Sequence[Image.Image], settings: Settings) -> list[np.ndarray]:
    """The images at the size of the video, uint8 [H, W, 3] each."""
    s = settings
    return [keyframes.fit(image, *s.size, s.fit, s.matte, resample=s.resample) for image in images]


@dataclass(frozen=True)
class Batch:
    """B clips that are computed together: their keyframes, prompts and seeds."""

    inputs: Inputs
    prompts: Sequence[str]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Encoded:
    """What the transformer is told of B clips: conditions, and the text [B, L, text_dim] of the pass without prompt."""

    conditions: Conditions
    negative: jax.Array


@dataclass
class Timings:
    """Seconds by stage. Compilation is counted apart, wherever it happened."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a block: what this thread spent compiling in it goes to "compile", the rest to `name`."""
        compiling, thread = 0.0, get_ident()

        def listen(event: str, duration: float, **_: Any) -> None:
            nonlocal compiling
            if event.startswith("/jax/core/compile/") and get_ident() == thread:
                compiling += duration

        jax.monitoring.register_event_duration_secs_listener(listen)
        start = perf_counter()
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
            spent = perf_counter() - start
            # Nested traces report overlapping times, so the sum may exceed the wall clock.
            compiling = min(compiling, spent)
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - compiling
            self.seconds["compile"] = self.seconds.get("compile", 0.0) + compiling


@dataclass(frozen=True)
class Result:
    """Finished clips.

    Attributes:
      video: uint8 [B, T, H, W, 3]; the keyframes in it are the model's rendering of them.
      latents: float32 [B, F, h, w, 16], normalised.
      seconds: wall time of "encode", "compile", "denoise", "decode".
      encoded: what the transformer was told.
    """

    video: np.ndarray
    latents: jax.Array
    seconds: Mapping[str, float]
    encoded: Encoded | None = None


def inbetween(
    model: Model,
    first: ImageLike | Sequence[ImageLike],
    last: ImageLike | Sequence[ImageLike],
    prompt: str | Sequence[str] | None = None,
    *,
    seeds: int | Sequence[int] | None = None,
    keyframes: Mapping[int, ImageLike | Sequence[ImageLike]] | None = None,
    settings: Settings | None = None,
    mesh: Mesh | None = None,
    cross_bias: CrossBias | None = None,
    chunk: int = 1,
    on_step: run.OnStep | None = None,
    **overrides: Any,
) -> Result:
    """Makes the videos between first and last keyframes: one clip, or several by one compiled program.

    What is a list gives one value a clip; what is not holds for all of them, so that two pairs of keyframes are two
    clips, and one pair with four seeds is four.

    Args:
      model: from `samplers.load`.
      first, last: paths, Pillow images or arrays uint8 [H, W, 3], of any size; None leaves one out.
      prompt: None takes that of the settings.
      seeds: of the noise; None takes that of the settings.
      keyframes: more of them, by pixel frame, negative ones counted from the end.
      settings: see `Settings`; None takes the model's own.
      mesh: from `sharding.make_mesh`; the model's params should lie on it (`samplers.load(..., mesh=mesh)`).
      cross_bias: a bias of your own on cross-attention, leaves [layers, 1, F, ...], in every step of the conditional
        pass; KAB's is added to it. See docs/method.md for an example.
      chunk: steps of one call of the program; `settings.steps` makes the run one scan.
      on_step: called before each clip's first step and after each chunk with (steps done, `sample.Carry`).
      overrides: single fields of `Settings`, such as frames=33 or method="paper".

    Returns:
      A `Result` of all clips, in order.

    Raises:
      ValueError: settings that this model cannot run, or something that is no image; one line.
      FloatingPointError: NaN or inf; names the stage, and of denoising the step.
    """
    settings = Settings.of(model.config, **overrides) if settings is None else replace(settings, **overrides)
    more = dict(keyframes or {})
    given = {at: images for at, images in ((0, first), (-1, last)) if images is not None and at not in more} | more
    twice = len(given) < (first is not None) + (last is not None) + len(more)
    refuse((twice, "keyframes: one of them is the first or the last, which is given too; give it once"))
    check_settings(model.config, settings)
    pixel_places(list(given), settings.frames)
    order = sorted(given, key=lambda at: at % settings.frames)
    memory.check(model.config, settings, None if mesh is None else dict(mesh.shape), model.policy)
    plan = Plan.of(model.config, settings, order)
    prompt = settings.prompt if prompt is None else prompt
    seeds = settings.seed if seeds is None else seeds
    *columns, prompts, seeds = _clips([*(given[at] for at in order), prompt, seeds])
    for seed, text in zip(seeds, prompts, strict=True):
        check_seed(seed)
        refuse((not isinstance(text, str), f"prompt {text!r}: give a text"))
    batches = [Batch(Inputs.prepare([clip], plan), [text], [seed])
               for clip, text, seed in zip(zip(*columns, strict=True), prompts, seeds, strict=True)]  # fmt: skip
    results = make(model, plan, batches, mesh=mesh, cross_bias=cross_bias, chunk=chunk, on_step=on_step)
    video, latents = zip(*((one.video, one.latents) for one in results), strict=True)
    return Result(np.concatenate(video), jnp.concatenate(latents), results[-1].seconds)


def _clips(values: Sequence[Any]) -> list[list[Any]]:
    """Each value as a list of one entry a clip. ValueError: lists of different lengths."""
    lists = [list(v) if isinstance(v, (list, tuple, range)) else [v] for v in values]
    count = max(map(len, lists))
    if any(len(one) not in (1, count) for one in lists) or any(not one for one in lists):
        sizes = ", ".join(str(len(one)) for one in lists)
        raise ValueError(f"lists of {sizes} keyframes, prompts, seeds: give as many of each, or one for all")
    return [one * count if len(one) == 1 else one for one in lists]


def make(
    model: Model,
    plan: Plan,
    batches: Sequence[Batch],
    *,
    mesh: Mesh | None = None,
    cross_bias: CrossBias | None = None,
    chunk: int = 1,
    on_step: run.OnStep | None = None,
    ready: Callable[[str], Programs] | None = None,
) -> list[Result]:
    """Batches of clips, a stage at a time for all of them, so that each part of the model is needed once.

    What is not said here is as in `inbetween`.

    Args:
      ready: gives the programs of the stages "encode", "denoise" and "decode"; `ahead.compile_ahead` makes one, None
        compiles each at its first call.
    """
    timings, jitted = Timings(), Programs.of(plan, chunk)
    ready = ready or (lambda stage: jitted)
    for batch in batches:
        check_cross(plan.config.dit, (len(batch.prompts), plan.grid[0]), cross_bias)
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        with timings.stage("compile"):
            programs = ready("encode")
        with timings.stage("encode"):
            inputs, prompts = [batch.inputs for batch in batches], [batch.prompts for batch in batches]
            encoded = encode(model, plan, inputs, prompts, programs)
            encoded = [jax.block_until_ready(place(one, mesh)) for one in encoded]
        with timings.stage("compile"):
            programs = ready("denoise")
        with timings.stage("denoise"):
            latents = [
                denoise(model, plan, one, noise(plan, batch.seeds, mesh, programs), seeds=batch.seeds, mesh=mesh,
                        cross_bias=cross_bias, chunk=chunk, on_step=on_step, programs=programs)
                for one, batch in zip(encoded, batches, strict=True)
            ]  # fmt: skip
        with timings.stage("compile"):
            programs = ready("decode")
        with timings.stage("decode"):
            videos = [decode(model, plan, one, programs) for one in latents]
    return [Result(video, own, timings.seconds, one) for video, own, one in zip(videos, latents, encoded, strict=True)]


def noise(plan: Plan, seeds: Sequence[int], mesh: Mesh | None = None, programs: Programs | None = None) -> jax.Array:
    """Standard normal latents float32 [B, F, h, w, C], each clip's from its own seed alone."""
    programs = programs or Programs.of(plan)
    drawn = [programs.noise(np.uint32(seed)) for seed in seeds]
    whole = drawn[0] if len(drawn) == 1 else jnp.concatenate(drawn)
    return whole if mesh is None else sharding.shard_batch(whole, mesh)


def encode(
    model: Model,
    plan: Plan,
    inputs: Sequence[Inputs],
    prompts: Sequence[Sequence[str]],
    programs: Programs | None = None,
) -> list[Encoded]:
    """What the transformer is told of each batch.

    Args:
      programs: here and in the other stages, compiled ones of the plan; None takes the jitted ones.

    Raises:
      FloatingPointError: NaN or inf in the text, the image tokens or the keyframes' latent.
    """
    programs = programs or Programs.of(plan)
    texts = [encode_texts(model, plan, own, programs) for own in prompts]
    tokens = [encode_images(model, plan, own.vision, programs) for own in inputs]
    latents = [encode_keyframes(model, plan, own.pixels, programs) for own in inputs]
    return [
        Encoded(Conditions(text, images, latent), negative)
        for (text, negative), images, latent in zip(texts, tokens, latents, strict=True)
    ]


def encode_texts(
    model: Model, plan: Plan, prompts: Sequence[str], programs: Programs | None = None
) -> tuple[jax.Array, jax.Array]:
    """Embeddings [B, L, D] of B prompts, and as many of the negative one."""
    programs = programs or Programs.of(plan)
    # Both in one call: the text encoder is large, and reads its weights once.
    ids, mask = model.tokenizer.encode([*prompts, plan.settings.negative_prompt], plan.config.dit.text_length)
    text = _finite("text", *programs.text(model.part("umt5"), ids, mask))
    batch = len(prompts)
    return text[:batch], jnp.broadcast_to(text[batch:], text[:batch].shape)


def encode_images(model: Model, plan: Plan, vision: np.ndarray, programs: Programs | None = None) -> jax.Array:
    """Tokens [B, M, K, D] of the images that the transformer sees; zeros for one that is not given."""
    slots = image_slots(plan)
    seen = [slot for slot in slots if slot is not None]
    batch = len(vision)
    pixels = np.concatenate([vision[:, slot] for slot in seen])
    programs = programs or Programs.of(plan)
    tokens = _finite("image tokens", *programs.images(model.part("clip"), pixels))
    given = {slot: tokens[i * batch : (i + 1) * batch] for i, slot in enumerate(seen)}
    absent = jnp.zeros_like(tokens[:batch])
    return jnp.stack([absent if slot is None else given[slot] for slot in slots], 1)


def encode_keyframes(model: Model, plan: Plan, pixels: np.ndarray, programs: Programs | None = None) -> jax.Array:
    """Mask and latent [B, F, h, w, s + 16] of fitted keyframes uint8 [B, A, H, W, 3] at `Plan.at`."""
    programs = programs or Programs.of(plan)
    with _picture_mesh(plan):
        params, unit = _for_pictures(model.part("vae")), keyframes.to_unit(pixels)
        return _finite("keyframe latent", *programs.keyframes(params, unit))


def image_slots(plan: Plan) -> tuple[int | None, ...]:
    """Which keyframe each of the transformer's M images is, by its place in `Plan.at`; None for none.

    A first-and-last-frame model sees the outermost two; of one keyframe alone it sees that in the nearer place, and
    nothing in the other. A model of one image sees the first.
    """
    if plan.config.dit.num_images == 1:
        return (0,)
    if len(plan.at) > 1:
        return 0, len(plan.at) - 1
    return (0, None) if plan.at[0] <= (plan.settings.frames - 1) / 2 else (None, 0)


def denoise(
    model: Model,
    plan: Plan,
    encoded: Encoded,
    noise: jax.Array,
    *,
    seeds: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    cross_bias: CrossBias | None = None,
    until: int | None = None,
    chunk: int = 1,
    on_step: run.OnStep | None = None,
    programs: Programs | None = None,
    carry: Carry | None = None,
    first: int = 0,
) -> jax.Array:
    """Latents [B, F, h, w, 16] of B clips from noise in that shape.

    What is not said here is as in `inbetween`.

    Args:
      seeds: B of them, for solvers that add noise anew; None takes that of the settings for all.
      until: stop before that step, 0 .. steps, and give the latents that enter it.
      carry, first: go on from the carry of an earlier run that entered step `first`; the noise says the shape alone.

    Raises:
      ValueError: noise of another shape, or a bias that is not this model's.
      FloatingPointError: NaN or inf in the latents; names the step.
    """
    batch = encoded.conditions.text.shape[0]
    wanted = (batch, *plan.latent_shape)
    refuse((noise.shape != wanted, f"noise of shape {noise.shape}: the latents are {wanted}"))
    check_cross(plan.config.dit, (batch, plan.grid[0]), cross_bias)
    params, programs = model.part("dit"), programs or Programs.of(plan, chunk)

    def part(carry: Carry, table: Row, first: np.int32, n: int) -> Carry:
        return programs.denoise(params, carry, table, first, encoded.conditions, encoded.negative, plan.method,
                                cross_bias)  # fmt: skip

    steps = plan.settings.steps if until is None else until
    begin = start(plan, noise, seeds) if carry is None else carry
    return run.run(part, begin, plan.table, steps, chunk=chunk, first=first, on_step=on_step).sample


def start(plan: Plan, noise: jax.Array, seeds: Sequence[int] | None = None) -> Carry:
    """The carry before a run's first step, of B clips and their seeds; None takes that of the settings for all."""
    seeds = [plan.settings.seed] * noise.shape[0] if seeds is None else seeds
    keys = None if plan.table.step.renoise is None else jnp.stack([jax.random.key(seed) for seed in seeds])
    return sample.start(noise, state(plan, noise), keys)


def decode(model: Model, plan: Plan, latents: jax.Array, programs: Programs | None = None) -> np.ndarray:
    """Video uint8 [B, T, H, W, 3] of latents [B, F, h, w, 16]. FloatingPointError on NaN or inf."""
    programs = programs or Programs.of(plan)
    with _picture_mesh(plan):
        video = programs.decode(_for_pictures(model.part("vae")), _for_pictures(latents))
    return keyframes.from_unit(hosts.fetch(_finite("decoded video", *video)))


def _picture_mesh(plan: Plan) -> AbstractContextManager:
    """For the autoencoder the devices of the present mesh lie in rows and columns."""
    mesh = jax.sharding.get_mesh()
    return nullcontext() if mesh.empty else jax.set_mesh(sharding.picture_mesh(mesh, plan.latent_shape[1:3]))


def _for_pictures(tree: Any) -> Any:
    """Arrays that every device has, as of the present mesh; where there is one.

    JAX tells how a result lies in the axes of the mesh of the first argument, and fails where these cannot say it, such
    as a picture in two rows and two columns on a mesh of one axis.
    """
    mesh = jax.sharding.get_mesh()
    where = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
    return tree if where is None else jax.tree.map(lambda leaf: hosts.put(leaf, where), tree)


def _finite(stage: str, value: jax.Array, finite: jax.Array) -> jax.Array:
    if not bool(finite):
        raise FloatingPointError(f"{stage}: NaN or inf; check the weights, or try --dtype float32")
    return value


def place(encoded: Encoded, mesh: Mesh | None) -> Encoded:
    """Puts encoded conditions on the mesh, as `sharding.shard_batch`."""
    if mesh is None:
        return encoded
    return Encoded(*sharding.shard_batch((encoded.conditions, encoded.negative), mesh))
