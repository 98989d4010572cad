"""Train a LoRA of a large transformer on a mesh: flow matching, optax, Orbax checkpoints, at the end a diffusers file.

    python -m benchmarks.lora_14b --model wan-flf2v --clips runs/clips --mesh tensor=8 --steps 2000 --out runs/lora
    python -m benchmarks.lora_14b --preset flf2v_14b --layers 2 --size 64x64 --frames 9 --steps 3 --out runs/try

Without `--model` the weights are random, without `--clips` the clip is: for measuring. `benchmarks.lora_clips` makes
the clips of videos: a file NAME.npz of what the encoders say, so that a step needs the transformer alone:

    latents [F, h, w, 16]   of the VAE, normalised
    text [L, D], images [M, K, I], condition [F, h, w, C]   of its caption and keyframes

and `empty.npz` beside them has the `text` of the empty caption, which a tenth of the clips get. Weights stay as they
are stored, sharded by `wanjax.sharding`; adapters and their moments are float32, whole on every device. Blocks are
computed again in the backward pass. Attention is the kernel "xla": the fused ones lack a gradient that is needed.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import measure, random_model, resumed
from benchmarks.steps import Shape
from convert import loratree
from wanjax import checkpoint, flow, lora, rope, shapes, sharding
from wanjax.config import PRESETS, DiTConfig, ModelConfig, preset
from wanjax.dit import WanDiT, token_grid
from wanjax.settings import check_mesh
from wanjax.types import Conditions, RopeTable

EMPTY = "empty.npz"
CAPTION_DROP = 0.1
BAD_INPUT = 2


@dataclass(frozen=True)
class Recipe:
    """What is learnt, and how fast.

    Attributes:
      rank, alpha, targets: as `lora.init`.
      rate: the highest learning rate, after `warmup` steps; a cosine leads to a tenth of it at the end.
      shift: of the noise levels; FLF2V samples with 16, and its usual trainers take 3 to 5.
    """

    rank: int = 32
    alpha: float | None = None
    targets: str = lora.TARGETS
    rate: float = 1e-4
    warmup: int = 50
    steps: int = 1000
    shift: float = 5.0

    def optimiser(self) -> optax.GradientTransformation:
        """AdamW without decay, gradients clipped at 1."""
        rate = optax.warmup_cosine_decay_schedule(0.0, self.rate, self.warmup, max(self.steps, self.warmup + 1),
                                                  0.1 * self.rate)  # fmt: skip
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))


@struct.dataclass
class State:
    """A run between two steps, without the frozen weights: int32 [] step, adapters, optax's state."""

    step: jax.Array
    adapters: lora.Lora
    moments: Any


@struct.dataclass
class Batch:
    """Latents [B, F, h, w, 16], what the transformer is told, and the empty caption's text [L, D]; float32."""

    latents: jax.Array
    conditions: Conditions
    empty: jax.Array


def training_config(model: ModelConfig, platform: str, kind: str = "", attention: str = "xla") -> DiTConfig:
    """The transformer's configuration for a backward pass: resolved for the platform, blocks computed again."""
    dit = dataclasses.replace(model.dit, attention=attention, remat=True)
    return dataclasses.replace(model, dit=dit).for_platform(platform, kind).dit


def new_state(recipe: Recipe, params: Any, seed: int | jax.Array) -> State:
    """New adapters; `params` may be shapes."""
    adapters = lora.init(jax.random.key(seed), params, recipe.rank, recipe.alpha, recipe.targets)
    return State(jnp.int32(0), adapters, recipe.optimiser().init(adapters))


def loss_of(
    config: DiTConfig, shift: float, params: Any, adapters: lora.Lora, batch: Batch, table: RopeTable, key: jax.Array
) -> jax.Array:
    """The flow-matching loss at logit-normal, shifted noise levels, some clips without their caption."""
    drop_key, draw_key = jax.random.split(key)
    conditions = flow.drop_captions(drop_key, batch.conditions, batch.empty, CAPTION_DROP)
    drawn = flow.draw(draw_key, batch.latents, flow.logit_normal, shift)
    velocity = lora.apply(WanDiT(config), params, adapters, drawn.noisy, drawn.timestep, conditions, table)
    return flow.mse(velocity, drawn.velocity)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def update(
    config: DiTConfig, recipe: Recipe, params: Any, state: State, batch: Batch, table: RopeTable, seed: jax.Array
) -> tuple[State, jax.Array]:
    """One step; the noise of a step depends on (seed, step) alone. Returns the new state and the loss."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    loss, gradient = jax.value_and_grad(loss_of, argnums=3)(
        config, recipe.shift, params, state.adapters, batch, table, key
    )
    updates, moments = recipe.optimiser().update(gradient, state.moments, state.adapters)
    return State(state.step + 1, optax.apply_updates(state.adapters, updates), moments), loss


class Clips:
    """Batches of a folder's clips; that of a step depends on (seed, step) alone, so that a resumed run goes on alike.

    Raises:
      ValueError: no clips, or arrays missing.
    """

    def __init__(self, folder: Path, size: int, seed: int):
        self._files = sorted(file for file in folder.glob("*.npz") if file.name != EMPTY)
        self._size, self._seed = size, seed
        if not self._files or not (folder / EMPTY).is_file():
            raise ValueError(f"--clips {folder}: needs {EMPTY} and one NAME.npz for each clip")
        self._empty = _arrays(folder / EMPTY, ("text",))["text"]

    def draw(self, step: int) -> Batch:
        """The batch of one step, as host arrays."""
        rows = np.random.default_rng([self._seed, step]).integers(len(self._files), size=self._size)
        clips = [_arrays(self._files[row], ("latents", "text"), ("images", "condition")) for row in rows]
        if len({tuple((name, one.shape) for name, one in sorted(clip.items())) for clip in clips}) > 1:
            raise ValueError(f"--clips {self._files[0].parent}: clips of several sizes; give a folder for each")
        joined = {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}
        conditions = Conditions(joined["text"], joined.get("images"), joined.get("condition"))
        return Batch(joined["latents"], conditions, self._empty)


def _arrays(file: Path, needed: Sequence[str], also: Sequence[str] = ()) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as held:
        lacking = [name for name in needed if name not in held]
        if lacking:
            raise ValueError(f"{file}: has no {', '.join(lacking)}")
        return {name: held[name].astype(np.float32) for name in (*needed, *also) if name in held}


class RandomClip:
    """The same random batch at every step."""

    def __init__(self, config: DiTConfig, grid: tuple[int, int, int], size: int, seed: int):
        latents, conditions, text = random_model.inputs(config, grid, size, seed)
        self._batch = Batch(latents, conditions, text[0])

    def draw(self, step: int) -> Batch:
        """The batch."""
        return self._batch


def place(mesh: Mesh | None, state: State) -> State:
    """Adapters and moments whole on every device of the mesh."""
    return state if mesh is None else jax.device_put(state, NamedSharding(mesh, P()))


def train(
    config: DiTConfig, recipe: Recipe, params: Any, state: State, clips: Clips | RandomClip, mesh: Mesh | None,
    manager: ocp.CheckpointManager, seed: int, every: int,
) -> State:  # fmt: skip
    """Steps up to the recipe's number, with a checkpoint every so many and at the end.

    Raises:
      FloatingPointError: a loss that is not finite; the last checkpoint is from before.
    """
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        for step in range(int(state.step), recipe.steps):
            began, batch = time.perf_counter(), clips.draw(step)
            table = rope.table(token_grid(config, batch.latents.shape), config.head_dim)
            if mesh is not None:
                placed = sharding.shard_batch((batch.latents, batch.conditions), mesh)
                batch = Batch(*placed, jax.device_put(batch.empty, NamedSharding(mesh, P())))
            state, loss = update(config, recipe, params, state, batch, table, np.uint32(seed))
            loss = float(loss)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step}; --resume goes on from the last checkpoint"
                )
            print(f"step {step + 1} loss {loss:.5f} {time.perf_counter() - began:.2f} s", flush=True)
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                manager.save(step + 1, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    return state


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser("python -m benchmarks.lora_14b", description=__doc__.split("\n", 1)[0])
    source = line.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="FOLDER", help="'tiny' or a model folder; without it random weights")
    source.add_argument("--preset", choices=sorted(PRESETS), default="flf2v_14b", help="of random weights")
    line.add_argument("--layers", type=measure.positive, help="of random weights: fewer, at the full width")
    line.add_argument("--dtype", choices=sorted(measure.POLICIES), default="bfloat16", help="of the frozen weights")
    line.add_argument("--weights", choices=("int8", "fp8"), help="frozen kernels in 8 bits (with --model)")
    line.add_argument("--clips", type=Path, metavar="FOLDER", help="encoded clips; without it one random clip")
    line.add_argument("--size", type=measure.parse_size, default=(480, 864), metavar="HxW", help="of the random clip")
    line.add_argument("--frames", type=measure.positive, default=33, help="of the random clip")
    line.add_argument("--batch", type=measure.positive, default=1, help="clips a step")
    line.add_argument("--mesh", type=mesh_sizes, metavar="AXIS=N,...", help=f"over {', '.join(sharding.AXES)}")
    usual = Recipe()
    line.add_argument("--rank", type=measure.positive, default=usual.rank)
    line.add_argument("--alpha", type=float, help="default: the rank")
    line.add_argument("--targets", default=usual.targets, help="regular expression (default %(default)s)")
    line.add_argument("--rate", type=float, default=usual.rate, help="learning rate (default %(default)s)")
    line.add_argument("--shift", type=float, default=usual.shift, help="of the noise levels (default %(default)s)")
    line.add_argument("--steps", type=measure.positive, default=usual.steps)
    line.add_argument("--every", type=measure.positive, default=250, help="steps between checkpoints")
    line.add_argument("--seed", type=int, default=0)
    line.add_argument("--out", type=Path, required=True, help="folder of checkpoints and lora.safetensors")
    line.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    return line


def mesh_sizes(text: str) -> dict[str, int]:
    """ "data=2,sequence=4" -> sizes by axis; a type for argparse."""
    try:
        return {axis: measure.positive(size) for axis, size in (item.split("=") for item in text.split(","))}
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r}: give AXIS=N,... such as data=2,sequence=4") from None


def frozen(args: argparse.Namespace, mesh: Mesh | None) -> tuple[ModelConfig, Any]:
    """Configuration and the transformer's weights, on the mesh."""
    if args.model is not None:
        loaded = checkpoint.load(args.model, args.dtype, mesh, policy="stage", weights=args.weights)
        return loaded.config, loaded.params["dit"]
    model = checkpoint.with_dtype(preset(args.preset), args.dtype)
    if args.layers:
        model = dataclasses.replace(model, dit=dataclasses.replace(model.dit, num_layers=args.layers))
    params = random_model.params(shapes.dit(model.dit), args.seed)
    return model, params if mesh is None else sharding.shard_params(params, mesh)


def run(args: argparse.Namespace) -> None:
    """The command, with its arguments parsed.

    Raises:
      ValueError, OSError: what a user can mend, in one line.
    """
    recipe = Recipe(args.rank, args.alpha, args.targets, args.rate, steps=args.steps, shift=args.shift)
    mesh = sharding.make_mesh(args.mesh) if args.mesh else None
    model, params = frozen(args, mesh)
    device = jax.devices()[0]
    config = training_config(model, device.platform, device.device_kind)
    if args.mesh:
        check_mesh(args.mesh, config.num_heads)
    if args.clips is not None:
        clips: Clips | RandomClip = Clips(args.clips, args.batch, args.seed)
    else:
        grid = Shape(args.batch, args.frames, args.size).latent_grid(model.vae)
        clips = RandomClip(config, grid, args.batch, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    with resumed.manager(args.out / "checkpoints") as manager:
        state = place(mesh, new_state(recipe, params, args.seed))
        state = resumed.restored(manager, state, args.resume, "--rank or --targets")
        state = train(config, recipe, params, state, clips, mesh, manager, args.seed, args.every)
    loratree.save(args.out / "lora.safetensors", config, state.adapters, overwrite=True)
    print(f"{args.out / 'lora.safetensors'}: python -m convert SRC DST --lora takes it")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    return measure.checked(line, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
