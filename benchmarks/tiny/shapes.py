"""How often one can tell which shape it is, half-way between the keyframes: corners, which PSNR hardly sees.

    python -m benchmarks.tiny.shapes --model tiny --clips 64 --out benchmarks/results/shapes_tiny.json

A small convolutional network learns the shapes of `clips` on drawn frames alone, in a minute or two, and then looks at
held-out clips: as they were drawn, through the VAE and back, cross-faded, and made by the model. What it tells of drawn
frames that it has not learnt from is the most that can be measured by it. A cross-fade shows a shape twice, faintly and
in the wrong places, but with its corners: the figure is of corners, not of motion.

Axis letters: N frames, H height, W width, K shapes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from benchmarks import measure
from benchmarks.tiny import evaluate
from benchmarks.tiny.clips import SHAPES, Clip, clip, render, scene
from samplers.plan import Plan, Settings
from wanjax import checkpoint, writing
from wanjax.checkpoint import Model
from wanjax.manifest import first_line
from wanjax.settings import whole

NAMES = tuple(SHAPES)
"""What can be told; a label is a place in it."""
STAR_EVERY = 8  # scenes learnt from; and clips looked at have one of a star beside so many others
TIMES = 3  # frames drawn of a scene: first, middle, last
SCENES, STEPS, CHECKED = 12000, 2500, 1024
BATCH = 64
PEAK_RATE, WARMUP = 2e-3, 100
NOISE = 0.04  # of -1..1, so that a flat colour need not be perfectly flat
LOOKED = 256  # frames at once


class Classifier(nn.Module):
    """Logits [N, K] of frames [N, H, W, 3] in -1..1: three convolutions that each see about one shape, then the
    strongest answer of all places, so that it does not matter where the shape is."""

    @nn.compact
    def __call__(self, frames: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(32, (5, 5), (2, 2))(frames))
        x = nn.relu(nn.Conv(64, (3, 3), (2, 2))(x))
        x = nn.relu(nn.Conv(96, (3, 3))(x))
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(len(NAMES))(x.max((1, 2)))


def drawn(numbers: Sequence[int], split: str, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [N, H, W, 3] of plain scenes by number, first, middle and last of each, and their labels [N]."""
    scenes = [scene(n, split, shape="star" if n % STAR_EVERY == STAR_EVERY - 1 else None) for n in numbers]
    frames = np.concatenate([render(one, TIMES, size)[0] for one in scenes])
    return frames, np.repeat([label(one) for one in scenes], TIMES)


def looked_at(count: int, frames: int) -> list[Clip]:
    """The first `count` held-out clips, and behind them clips of stars, which these have none of."""
    return evaluate.heldout(count, frames=frames) + [
        clip(seed, "heldout", frames, shape="star") for seed in range(count // STAR_EVERY)
    ]


def label(drawn: Any) -> int:
    """Of a `clips.Scene`: which shape its one sprite is."""
    return NAMES.index(drawn.sprites[0].shape)


def unit(frames: jax.Array) -> jax.Array:
    """uint8 to float32 in -1..1."""
    return frames.astype(jnp.float32) / 127.5 - 1


def varied(key: jax.Array, frames: jax.Array) -> jax.Array:
    """Frames [N, H, W, 3] in -1..1 as other frames of the same shapes: mirrored left to right, other colours, noise."""
    flip, swap, invert, noise = jax.random.split(key, 4)
    count = len(frames)
    frames = jnp.where(jax.random.bernoulli(flip, 0.5, (count, 1, 1, 1)), frames[:, :, ::-1], frames)
    orders = jax.vmap(lambda one: jax.random.permutation(one, 3))(jax.random.split(swap, count))
    frames = jnp.take_along_axis(frames, orders[:, None, None, :], axis=-1)
    frames = jnp.where(jax.random.bernoulli(invert, 0.5, (count, 1, 1, 1)), -frames, frames)
    return frames + NOISE * jax.random.normal(noise, frames.shape)


@partial(jax.jit, static_argnums=0)
def _step(optimiser: Any, params: Any, moments: Any, key: jax.Array, frames: jax.Array, labels: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        logits = Classifier().apply({"params": params}, varied(key, unit(frames)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    changes, moments = optimiser.update(gradient, moments, params)
    return optax.apply_updates(params, changes), moments, value


def train(frames: np.ndarray, labels: np.ndarray, steps: int = STEPS, seed: int = 0) -> tuple[Any, list[float]]:
    """Parameters of a `Classifier` that learnt from frames uint8 [N, H, W, 3], and the loss of every step.

    AdamW with warm-up and cosine; the same arguments give the same parameters on the same machine.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), steps + 1)
    params = jax.jit(Classifier().init)(keys[-1], jnp.zeros((1, *frames.shape[1:])))["params"]
    warmup = min(WARMUP, steps // 2)
    optimiser = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, warmup, steps))
    moments, losses = optimiser.init(params), []
    for step in tqdm(range(steps), desc="classifier", unit="step", disable=None):
        rows = rng.integers(len(frames), size=BATCH)
        params, moments, loss = _step(optimiser, params, moments, keys[step], frames[rows], labels[rows])
        losses.append(float(loss))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"classifier: the loss is {losses[-1]} at step {step}")
    return params, losses


@jax.jit
def _logits(params: Any, frames: jax.Array) -> jax.Array:
    return Classifier().apply({"params": params}, unit(frames))


def told(params: Any, frames: np.ndarray) -> np.ndarray:
    """Which shape the classifier sees in frames uint8 [N, H, W, 3]: labels [N]."""
    found = []
    for start in range(0, len(frames), LOOKED):
        some = frames[start : start + LOOKED]
        filled = np.concatenate([some, np.repeat(some[-1:], LOOKED - len(some), 0)])  # one size is one program
        found.append(np.asarray(_logits(params, filled)).argmax(-1)[: len(some)])
    return np.concatenate(found)


def by_shape(right: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of `right` bool [N] among the frames of each shape that there is."""
    return {name: float(right[labels == i].mean()) for i, name in enumerate(NAMES) if (labels == i).any()}


def judge(params: Any, videos: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Shares told right of videos uint8 [N, T, H, W, 3] of shapes [N].

    Returns:
      "middle": of the middle frames, "by_shape" of these, "told_as": how many were taken for what, by shape and only
      where wrong; "by_frame": T shares; "interior": their mean without the first and the last frame.
    """
    seen = told(params, videos.reshape(-1, *videos.shape[2:])).reshape(videos.shape[:2])
    right, middle = seen == labels[:, None], videos.shape[1] // 2
    wrong = [(NAMES[is_], NAMES[said]) for is_, said in zip(labels, seen[:, middle], strict=True) if is_ != said]
    taken: dict[str, dict[str, int]] = {}
    for (shape, other), count in sorted(Counter(wrong).items()):
        taken.setdefault(shape, {})[other] = count
    return {"middle": float(right[:, middle].mean()), "interior": float(right[:, 1:-1].mean()),
            "by_shape": by_shape(right[:, middle], labels), "told_as": taken,
            "by_frame": right.mean(0).tolist()}  # fmt: skip


def learn(scenes: int = SCENES, steps: int = STEPS, seed: int = 0, checked: int = CHECKED) -> tuple[Any, dict]:
    """Draws training scenes, learns, and checks: parameters, and what the classifier is worth.

    It is checked on the frames of `checked` held-out scenes behind those that clips are measured on.
    """
    began = time.perf_counter()
    params, losses = train(*drawn(range(scenes), "train"), steps=steps, seed=seed)
    frames, labels = drawn(range(10_000, 10_000 + checked), "heldout")
    right = told(params, frames) == labels
    return params, {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)), "scenes": scenes, "steps": steps,
        "seed": seed, "seconds": round(time.perf_counter() - began, 1), "last_loss": float(np.mean(losses[-50:])),
        "checked_frames": len(frames), "right": float(right.mean()), "by_shape": by_shape(right, labels),
    }  # fmt: skip


def keep(path: Path, params: Any, about: Mapping[str, Any]) -> None:
    """Writes what `learn` gives as a safetensors file, which must not be there yet.

    Raises:
      OutputError: it is, or there is no such folder.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep=".").items()}
    writing.write_bytes(path, save(arrays, {"about": json.dumps(about)}))


def kept(path: Path, size: int = 32) -> tuple[Any, dict]:
    """Reads what `keep` wrote, for frames of `size` pixels.

    Raises:
      ValueError: no such file, or another one.
    """
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
            about = json.loads(file.metadata()["about"])
    except (OSError, SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"classifier {path}: not a file of benchmarks.tiny.shapes ({first_line(error)})") from error
    frames = jnp.zeros((1, size, size, 3))
    expected = jax.eval_shape(lambda key: Classifier().init(key, frames)["params"], jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in flatten_dict(expected, sep=".").items()}
    if shapes != {name: array.shape for name, array in arrays.items()}:
        raise ValueError(f"classifier {path}: of other sizes; leave it out to learn anew")
    return unflatten_dict(arrays, sep="."), about


def arms(model: Model, clips: Sequence[Clip], settings: Mapping[str, Settings]) -> dict[str, np.ndarray]:
    """Videos uint8 [N, T, H, W, 3] of the same clips: "truth", "vae", "crossfade", and the model's by `settings`."""
    truth, captions = np.stack([one.video for one in clips]), [one.caption for one in clips]
    made = {name: evaluate.generate(model, clips, captions, one) for name, one in settings.items()}
    fade = evaluate.baselines(truth)["crossfade"]
    return {"truth": truth, "vae": evaluate.reconstruct(model, truth), "crossfade": fade} | made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.tiny.shapes", description=__doc__.split("\n")[0])
    p.add_argument("--model", default="tiny", help="'tiny' or a model folder (default %(default)s)")
    p.add_argument("--clips", type=measure.positive, default=64, help="held-out clips, and an eighth as many of "
                   "stars (default %(default)s)")  # fmt: skip
    p.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5], help="scales (default 1 1.5)")
    p.add_argument("--steps", type=int, default=10, help="sampling steps (default %(default)s)")
    p.add_argument("--scenes", type=measure.positive, default=SCENES, help="to learn from (default %(default)s)")
    p.add_argument("--training-steps", type=measure.positive, default=STEPS, help="(default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the classifier (default %(default)s)")
    p.add_argument("--classifier", type=Path, metavar="FILE", help="learnt by an earlier run; one that is not there "
                   "is written (default: learn, and keep nothing)")  # fmt: skip
    p.add_argument("--out", type=measure.output, metavar="JSON", help="report to write")
    return p


def asked_for(path: Path | None) -> tuple[Any, dict] | None:
    """An earlier classifier, or None where one is to be learnt.

    Raises:
      ValueError: a file that is none, or no folder to keep one in.
    """
    if path is None:
        return None
    if not path.parent.is_dir():
        raise ValueError(f"--classifier {path}: no folder {path.parent}; create it with mkdir -p {path.parent}")
    return kept(path) if path.exists() else None


def show(report: Mapping[str, Any]) -> None:
    """The report's shares as a table, in per cent."""
    shapes = list(report["arms"]["truth"]["by_shape"])
    rows = [[name, *(f"{100 * share:.1f}" for share in (one["middle"], one["interior"], *one["by_shape"].values()))]
            for name, one in report["arms"].items()]  # fmt: skip
    print(f"told right of {report['classifier']['checked_frames']} drawn frames: "
          f"{100 * report['classifier']['right']:.2f} %")  # fmt: skip
    measure.print_table(["% told right", "middle", "interior", *shapes], rows)


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring. Returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    measure.backend(line)
    try:
        model = checkpoint.load(args.model)
        settings = {f"guidance_{scale:g}": Settings.of(model.config, guidance=scale, steps=args.steps)
                    for scale in args.guidance}  # fmt: skip
        for one in settings.values():
            Plan.of(model.config, one)
        whole("--seed", args.seed, 0, 2**32 - 1)
        clips = looked_at(args.clips, model.config.sampling.frames)
        earlier = asked_for(args.classifier)
    except (ValueError, OSError) as error:
        line.error(str(error))

    def measured() -> bool:
        params, classifier = earlier or learn(args.scenes, args.training_steps, args.seed)
        if args.classifier is not None and earlier is None:
            keep(args.classifier, params, classifier)
        labels = np.array([label(one.scene) for one in clips])
        judged = {name: judge(params, videos, labels) for name, videos in arms(model, clips, settings).items()}
        counts = Counter(NAMES[one] for one in labels)
        report = {"model": model.config.name, "clips": len(clips), "steps": args.steps, "shapes": dict(counts),
                  "classifier": classifier, "arms": judged, "environment": measure.environment()}  # fmt: skip
        show(report)
        measure.write(args.out, report)
        return True

    return measure.guarded(line, measured)


if __name__ == "__main__":
    raise SystemExit(main())
