"""Train the tiny diffusion transformer with its text and image encoders, by flow matching, on one device.

The three learn together from random weights; the VAE is fixed. The result is a model folder that
`samplers.inbetween --model` and `wanjax.checkpoint.load` read.

    python -m benchmarks.tiny.train_dit --vae runs/vae/vae --out runs/dit --minutes 40
    python -m benchmarks.tiny.train_dit --from-model tiny --out runs/more --minutes 60

Axis letters as in `wanjax.types`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct

from benchmarks import resumed
from benchmarks.tiny import build_tokenizer, evaluate
from benchmarks.tiny.challenges import challenge
from benchmarks.tiny.latents import BATCH, VARIETIES, Encoder, LatentSet, build, encoder, load_vae, write_vae
from wanjax import checkpoint, conditioning, flow, rope, vae
from wanjax.clip import CLIPVision
from wanjax.config import ModelConfig, VAEConfig, preset
from wanjax.dit import WanDiT
from wanjax.keyframes import CLIP_MEAN, CLIP_STD
from wanjax.precision import BFLOAT16
from wanjax.tokenizer import Tokenizer
from wanjax.types import Conditions
from wanjax.umt5 import UMT5Encoder

PEAK_RATE = 1e-3
WARMUP_STEPS = 100
FLAT_SHARE = 0.35  # of the run, before the cosine decay
SHIFT = 3.0
CAPTION_DROP = 0.10
DRAWN_SHARE = 0.35  # of the clips, seen by other keyframes than both ends (latents.DRAWN)
TRAINED = ("dit", "umt5", "clip")
FIRST_LENGTH_SHARE = 0.5  # of the steps; the other lengths share the rest alike
OTHER_LENGTHS_CLIPS = 5  # one clip of each for so many of the first length


@struct.dataclass
class Batch:
    """What one step learns from.

    Attributes:
      latents, condition: [B, F, h, w, 16] normalised.
      given: [B, F, temporal_stride] mask channels.
      ids, attention_mask: int32 [B, L] with L at most the model's text length.
      images: uint8 [B, 2, H, W, 3].
      seen: bool [B, 2], which of them are there.
    """

    latents: jax.Array
    condition: jax.Array
    given: jax.Array
    ids: jax.Array
    attention_mask: jax.Array
    images: jax.Array
    seen: jax.Array


@struct.dataclass
class State:
    """A run between two steps.

    Attributes:
      step: int32 [].
      seconds: float32 [], time spent in steps so far.
      params: {"dit", "umt5", "clip"}.
      average: exponential moving average of params.
      moments: optax state.
    """

    step: jax.Array
    seconds: jax.Array
    params: Any
    average: Any
    moments: Any


def optimiser() -> optax.GradientTransformation:
    """AdamW up to the learning rate, which follows the clock and is multiplied in by `update`."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(0.01, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
    )


@partial(jax.jit, static_argnums=0)
def new_state(config: ModelConfig, seed: int | jax.Array) -> State:
    """Random weights in float32."""
    keys = jax.random.split(jax.random.key(seed), 3)
    d, c = config.dit, config.clip
    images = jnp.zeros((1, d.num_images, d.image_tokens, d.image_dim))
    grid = (1, *d.patch_size)
    text, latent = jnp.zeros((1, d.text_length, d.text_dim)), jnp.zeros((*grid, d.condition_channels))
    conditions, table = Conditions(text, images, latent), rope.table((1, 1, 1), d.head_dim)
    ids = jnp.zeros((1, 4), jnp.int32)
    pixels = jnp.zeros((1, c.image_size, c.image_size, 3))
    noise = jnp.zeros((*grid, d.out_channels))
    params = {
        "dit": WanDiT(d).init(keys[0], noise, jnp.zeros(1), conditions, table)["params"],
        "umt5": UMT5Encoder(config.umt5).init(keys[1], ids, ids)["params"],
        "clip": CLIPVision(c).init(keys[2], pixels)["params"],
    }
    # T5's attention logits are not scaled, its initial query weights are.
    query = params["umt5"]["blocks"]["attn"]["q"]
    query["kernel"] = query["kernel"] * config.umt5.head_dim**-0.5
    return State(jnp.int32(0), jnp.float32(0), params, params, optimiser().init(params))


def state_of(model: checkpoint.Model) -> State:
    """A new run from a model's weights instead of random ones: step 0, fresh moments, float32."""
    params = {part: jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), model.params[part]) for part in TRAINED}
    # The average is a copy, as `update` gives away its state and cannot give one buffer away twice.
    average = jax.tree.map(jnp.copy, params)
    return State(jnp.int32(0), jnp.float32(0), params, average, optimiser().init(params))


def encode_conditions(config: ModelConfig, params: Any, batch: Batch) -> Conditions:
    """Runs both trainable encoders; differentiable."""
    mask = batch.attention_mask
    text = UMT5Encoder(config.umt5).apply({"params": params["umt5"]}, batch.ids, mask)
    text = conditioning.pad_text(text, mask)
    text = jnp.pad(text, ((0, 0), (0, config.dit.text_length - text.shape[1]), (0, 0)))
    pixels = batch.images.reshape(-1, *batch.images.shape[2:]).astype(jnp.float32) / 255
    pixels = (pixels - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)
    tokens = CLIPVision(config.clip).apply({"params": params["clip"]}, pixels)
    tokens = tokens.reshape(*batch.seen.shape, *tokens.shape[1:]) * batch.seen[:, :, None, None]
    shape = (*batch.condition.shape[:-1], batch.given.shape[-1])
    given = jnp.broadcast_to(batch.given[:, :, None, None], shape)
    return Conditions(text, tokens, jnp.concatenate([given, batch.condition], -1))


def channel_weights(config: VAEConfig, params: Any, latents: jax.Array) -> np.ndarray:
    """How much an error in each latent channel is worth in pixels: float32 [16] of mean 1.

    Args:
      latents: [B, F, h, w, 16] normalised, round which the decoder is taken as linear: the mean square of what white
        noise in one channel alone changes in the video.
    """

    @jax.jit
    def change(channel: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.key(channel), latents.shape[:-1])
        tangent = jnp.zeros_like(latents).at[..., channel].set(noise)
        return jnp.square(jax.jvp(lambda z: vae.decode(config, params, z), (latents,), (tangent,))[1]).mean()

    changes = np.array([change(channel) for channel in range(latents.shape[-1])])
    return changes / changes.mean()


def loss_of(
    config: ModelConfig, params: Any, batch: Batch, key: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """Mean squared error of the velocity (noise - data) at shifted, stratified uniform noise levels; of channels in the
    proportions of weights [16], where they are given."""
    drawn = flow.draw(key, batch.latents, shift=SHIFT)
    patch = config.dit.patch_size
    grid = tuple(n // size for n, size in zip(drawn.noisy.shape[1:4], patch, strict=True))
    velocity = WanDiT(config.dit).apply(
        {"params": params["dit"]},
        drawn.noisy,
        drawn.timestep,
        encode_conditions(config, params, batch),
        rope.table(grid, config.dit.head_dim),
    )
    if weights is None:
        return flow.mse(velocity, drawn.velocity)
    return flow.mse(jnp.sqrt(weights) * velocity, jnp.sqrt(weights) * drawn.velocity)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(
    config: ModelConfig, state: State, batch: Batch, rate: jax.Array, seed: jax.Array, weights: jax.Array
) -> tuple[State, jax.Array]:
    """One step at learning rate `rate`, with `channel_weights`; returns the new state and the loss."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    batch = batch.replace(latents=batch.latents.astype(jnp.float32), condition=batch.condition.astype(jnp.float32))
    loss, gradients = jax.value_and_grad(loss_of, argnums=1)(config, state.params, batch, key, weights)
    direction, moments = optimiser().update(gradients, state.moments, state.params)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    k = state.step.astype(jnp.float32)
    decay = jnp.minimum(0.999, (k + 1) / (k + 20))
    average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, params)
    return State(state.step + 1, state.seconds, params, average, moments), loss


def rate_at(step: int, done: float, peak: float = PEAK_RATE) -> float:
    """Learning rate: linear warm-up by steps; flat, then a cosine to 1% by the share of the run's time."""
    decay = max(0.0, min(1.0, (done - FLAT_SHARE) / (1 - FLAT_SHARE)))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * decay)))


class Batches:
    """Draws batches; the batch of a step depends on (seed, step) alone, so that a resumed run goes on alike."""

    def __init__(self, data: LatentSet, tokenizer: Tokenizer, config: ModelConfig, size: int, seed: int):
        lengths = [len(tokenizer.tokens(text)) for text in data.captions]
        length = min(config.dit.text_length, -(-max(lengths) // 8) * 8)
        self._ids, self._mask = tokenizer.encode([*data.captions, ""], length)
        self._data, self._size, self._seed = data, size, seed

    def draw(self, step: int) -> Batch:
        """The batch of one step, as host arrays."""
        rng, data, size = np.random.default_rng([self._seed, step]), self._data, self._size
        rows = rng.integers(len(data.latents), size=size)
        views = (rng.random(size) < DRAWN_SHARE).astype(int)
        words = np.where(rng.random(size) < CAPTION_DROP, len(data.latents), rows)
        picked = (leaf[rows, views] for leaf in (data.condition, data.given))
        return Batch(data.latents[rows], *picked, self._ids[words], self._mask[words], data.images[rows, views],
                     data.seen[rows, views])  # fmt: skip


class MixedLengths:
    """Batches of several clip lengths, one length a step, longer ones of fewer clips: a step costs about the same.

    Args:
      batches: of each length, the one that half of the steps take first.
    """

    def __init__(self, batches: list[Batches], seed: int):
        self.all = batches
        self._seed = seed
        others = (1 - FIRST_LENGTH_SHARE) / max(1, len(batches) - 1)
        self._shares = [FIRST_LENGTH_SHARE, *[others] * (len(batches) - 1)] if len(batches) > 1 else [1.0]

    def draw(self, step: int) -> Batch:
        """The batch of one step; depends on (seed, step) alone."""
        pick = np.random.default_rng([self._seed, step, 1]).choice(len(self.all), p=self._shares)
        return self.all[pick].draw(step)


def train(config: ModelConfig, state: State, batches: MixedLengths, weights: np.ndarray, vae_params: Any,
          options: argparse.Namespace, manager: ocp.CheckpointManager) -> State:  # fmt: skip
    """Steps until the minutes are spent, with a checkpoint and a measurement every `--every` minutes; the loss with
    `channel_weights`."""
    tokenizer = options.out / "tokenizer.json"
    held = [challenge(n, "heldout") for n in range(48)] if options.variety == "challenges" else evaluate.heldout(16)
    total = options.minutes * 60
    seconds, losses = float(state.seconds), []
    # Compiled here, outside the clock, on a state of its own, which the call gives away.
    for one in batches.all:
        own = jax.tree.map(jnp.copy, state)
        jax.block_until_ready(update(config, own, one.draw(0), np.float32(0), np.uint32(options.seed), weights))
    last = time.monotonic()
    while seconds < total:
        began = time.monotonic()
        step = int(state.step)
        rate = np.float32(rate_at(step, seconds / total, options.rate))
        state, loss = update(config, state, batches.draw(step), rate, np.uint32(options.seed), weights)
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}; resume from the last checkpoint")
        seconds += time.monotonic() - began
        if step + 1 == 100:
            print(f"step 100 loss {np.mean(losses[-50:]):.4f} {seconds / 100:.3f} s/step", flush=True)
        if time.monotonic() - last > options.every * 60 or seconds >= total:
            state = state.replace(seconds=jnp.float32(seconds))
            manager.save(step + 1, args=ocp.args.StandardSave(state))
            model = checkpoint.Model(config, {**state.average, "vae": vae_params}, Tokenizer(tokenizer))
            figures = evaluate.measure(model, held, guidance=(1.0,), sheet=options.out / "sheet.png")
            line = {"step": step + 1, "minutes": round(seconds / 60, 4), "loss": float(np.mean(losses)), **figures}
            with open(options.out / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}), flush=True)
            last, losses = time.monotonic(), []
    manager.wait_until_finished()
    return state


def write_model(config: ModelConfig, state: State, vae_params: Any, out: Path) -> None:
    """Writes OUT/model from the averaged weights, in bfloat16, which halves what the package carries."""
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), {**state.average, "vae": vae_params})
    checkpoint.save(out / "model", config, half, out / "tokenizer.json")


def with_decoder(vae_params: Any, better: Any) -> Any:
    """VAE parameters with the decoder of `better`.

    Raises:
      ValueError: the two do not share their encoder, so that latents of one mean nothing to the other.
    """
    same = jax.tree.map(np.array_equal, *({part: tree[part] for part in ("encoder", "quant")}
                                          for tree in (vae_params, better)))  # fmt: skip
    if not all(jax.tree.leaves(same)):
        raise ValueError("--decoder: its encoder is not that of --vae; make it with train_vae --decoder-only")
    return {**vae_params, "decoder": better["decoder"], "post_quant": better["post_quant"]}


def parser_of_options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the DiT, text and image encoders of the tiny model.")
    parser.add_argument("--vae", type=Path, help="vae folder that train_vae wrote; needed without --from-model")
    parser.add_argument("--from-model", metavar="MODEL", help="'tiny' or a model folder: go on from its weights, with "
                        "--vae on another VAE (default: all but the VAE starts at random)")  # fmt: skip
    parser.add_argument("--decoder", type=Path, help="vae folder with the same encoder and a better decoder")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and of the final model")
    parser.add_argument("--minutes", type=float, default=40.0, help="time spent in steps, resumed runs included")
    parser.add_argument("--clips", type=int, default=12000, help="training clips of the first length; a fifth as many "
                        "of each other (default %(default)s)")  # fmt: skip
    parser.add_argument(
        "--variety", default="challenges", choices=VARIETIES, help="kind of clips (default %(default)s)"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[25, 33, 65, 81], metavar="FRAMES",
                        help="clip lengths; half of the steps take the first (default 25 33 65 81)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=16, help="clips a step at the first length; as many tokens at the "
                        "others (default %(default)s)")  # fmt: skip
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help="peak of the learning rate (default %(default)s)")
    parser.add_argument("--every", type=float, default=4.0, help="minutes between checkpoints (default %(default)s)")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 (accelerators)")
    parser.add_argument("--latents-only", action="store_true", help="compute the latents and stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    return parser


def check(options: argparse.Namespace) -> None:
    """Refuses options that do not go together, and a result that is there already."""
    if options.vae is None and options.from_model is None:
        raise ValueError("--vae: give a vae folder that train_vae wrote, or a model with --from-model")
    stride = preset("tiny").vae.temporal_stride
    wrong = [n for n in options.lengths if n < stride + 1 or n % stride != 1]
    if wrong or len(set(options.lengths)) < len(options.lengths):
        raise ValueError(
            f"--lengths: give different lengths of {stride}n+1 frames, n at least 1; got {options.lengths}"
        )
    if (options.out / "model").exists():
        raise ValueError(f"--out: {options.out / 'model'} exists already; choose another folder or move it away")


@dataclasses.dataclass(frozen=True)
class Start:
    """What a training begins with.

    Attributes:
      config: of the model.
      model: to go on from, or None.
      encode: the VAE.
      vae_params: of it, with the decoder that the finished model gets.
    """

    config: ModelConfig
    model: checkpoint.Model | None
    encode: Encoder
    vae_params: Any

    @classmethod
    def of(cls, options: argparse.Namespace) -> Start:
        """Reads what the options name.

        Raises:
          ValueError, OSError: something is missing or does not fit.
        """
        model = None if options.from_model is None else checkpoint.load(options.from_model)
        config = preset("tiny") if model is None else model.config
        if options.vae is None:
            options.vae = options.out / "vae"
            write_vae(options.vae, config.vae, model.params["vae"])
        elif model is not None:
            # A preview's colours are of the earlier VAE's latents.
            config = dataclasses.replace(config, vae=dataclasses.replace(config.vae, latent_rgb=None))
        vae_config, vae_params = load_vae(options.vae, config.vae)
        encode = encoder(options.vae, vae_config, vae_params)
        if options.decoder is not None:
            vae_params = with_decoder(vae_params, load_vae(options.decoder, config.vae)[1])
        return cls(dataclasses.replace(config, vae=vae_config), model, encode, vae_params)

    def latents(self, options: argparse.Namespace) -> list[LatentSet]:
        """The training set of each length."""
        sets = []
        for frames in options.lengths:
            clips = options.clips if frames == options.lengths[0] else options.clips // OTHER_LENGTHS_CLIPS
            folder, stride = options.out / f"latents{frames}", self.config.vae.temporal_stride
            sets.append(build(options.vae, self.encode, folder, clips, options.variety, frames, stride))
        return sets


def run(options: argparse.Namespace, start: Start, sets: list[LatentSet]) -> None:
    """Trains and writes the result.

    Raises:
      ValueError: --resume does not fit what is in --out.
    """
    config = start.config
    running = dataclasses.replace(config, dit=dataclasses.replace(config.dit, remat=True, remat_keeps="products"))
    if options.bfloat16:
        running = running.with_precision(dataclasses.replace(BFLOAT16, param="float32"))
    build_tokenizer.main([str(options.out / "tokenizer.json")])
    tokenizer = Tokenizer(options.out / "tokenizer.json")
    tokens = options.batch * sets[0].latents.shape[1]
    batches = MixedLengths(
        [Batches(one, tokenizer, config, max(1, round(tokens / one.latents.shape[1])), options.seed) for one in sets],
        options.seed,
    )
    with resumed.manager(options.out / "checkpoints") as manager:
        state = new_state(running, options.seed) if start.model is None else state_of(start.model)
        state = resumed.restored(manager, state, options.resume, "model")
        weights = channel_weights(config.vae, start.vae_params, sets[0].latents[:BATCH].astype(np.float32))
        state = train(running, state, batches, weights, start.vae_params, options, manager)
    write_model(config, state, start.vae_params, options.out)


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = parser_of_options()
    options = parser.parse_args(arguments)
    try:
        check(options)
        start = Start.of(options)
        options.out.mkdir(parents=True, exist_ok=True)
        sets = start.latents(options)
        if not options.latents_only:
            run(options, start, sets)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
