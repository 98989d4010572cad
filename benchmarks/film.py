"""Does motion stop at a keyframe that two clips share? Paths that go on through it, by a chain and by what mends it.

    python -m benchmarks.film --model tiny --clips 64 --out film.json

A clip is one object on a straight path, at an even pace, slowing down or speeding up; its middle frame is the shared
keyframe. Arms: the truth, the truth through the VAE, two clips one after the other ("chain"), the same with neighbours
blended ("overlap-N"), one clip with three keyframes ("single"). All are told the caption of the whole.

The measure is the evaluation's pace (`benchmarks.tgi.metrics`): motion within the last latent frame before the joint
and within the first after it, each over the mean of two latent frames on either side of both. "slowest" is the smaller
of the two, 1 where an even motion goes on and 0 where it stops; "break" is their distance; "off" how far they are from
the truth's. Whole latent frames, as the decoder's own flicker has their period; it also moves a little where nothing
does, so that the truth through the VAE is the arm to compare with. Axis letters: N clips, T frames, H height, W width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.tgi import metrics
from benchmarks.tgi.data import stretched
from benchmarks.tgi.scores import model_identity
from benchmarks.tiny import evaluate
from benchmarks.tiny.challenges import CATEGORIES, ChallengeClip, challenge
from samplers import film, pipeline
from samplers.pipeline import Batch, Inputs
from samplers.plan import Plan, Settings
from wanjax import checkpoint
from wanjax.checkpoint import Model
from wanjax.config import ModelConfig

FAR = 2
"""Latent frames on each side that the joint's own are compared with."""
SETTINGS = ("steps", "guidance", "shift", "solver", "schedule", "frames", "size", "seed")


def paths(count: int, frames: int, split: str = "heldout", size: int = 32) -> list[ChallengeClip]:
    """The first `count` clips of a split that show one object on a straight path."""
    found, seed = [], list(CATEGORIES).index("linear motion")
    while len(found) < count:
        one = challenge(seed, split, frames, size)
        if one.story.form == "one":
            found.append(one)
        seed += len(CATEGORIES)
    return found


def speeds(video: np.ndarray, joint: int, stride: int) -> tuple[float, float]:
    """Motion before and after a joint, over that beside it.

    Args:
      video: uint8 [T, H, W, 3].
      joint: pixel frame of the shared keyframe, the last of a latent frame, FAR + 1 latent frames from either end.
      stride: pixel frames of a latent frame.

    Returns:
      (before, after); NaN where nothing moves beside the joint, 1 where nothing moves at all.
    """
    steps = metrics.pace(video)
    before, after = steps[joint - stride : joint], steps[joint : joint + stride]
    reach = (1 + FAR) * stride
    beside = np.concatenate([steps[joint - reach : joint - stride], steps[joint + stride : joint + reach]]).mean()
    return (before.mean() / beside, after.mean() / beside) if beside else (np.nan, np.nan)


def figures(made: np.ndarray, truth: np.ndarray, paced: np.ndarray, joint: int, stride: int) -> dict[str, Any]:
    """Of one arm.

    Args:
      made, truth: uint8 [N, T, H, W, 3].
      paced: bool [N], whether the object slows down or speeds up.

    Returns:
      By group of clips "all", "even" and "paced", means over clips of "before", "after", "slowest", "break", their
      standard deviation over clips, and of "off", the distance of (before, after) from the truth's own; and "profile",
      mean motion of each step, 1 on average; "psnr_interior" in dB, keyframes left out.
    """
    own, true = (np.array([speeds(one, joint, stride) for one in of]) for of in (made, truth))
    columns = {
        "before": own[:, 0],
        "after": own[:, 1],
        "slowest": own.min(1),
        "break": np.abs(own[:, 1] - own[:, 0]),
        "off": np.abs(own - true).mean(1),
    }
    groups = {"all": np.ones(len(made), bool), "even": ~paced, "paced": paced}
    found: dict[str, Any] = {
        group: {"clips": int(chosen.sum())}
        | {name: {"mean": float(values[chosen].mean()), "deviation": float(values[chosen].std())}
           for name, values in columns.items()}
        for group, chosen in groups.items() if chosen.any()
    }  # fmt: skip
    inside = np.setdiff1d(np.arange(1, truth.shape[1] - 1), joint)
    found["psnr_interior"] = float(evaluate.psnr(made[:, inside], truth[:, inside]).mean())
    found["profile"] = np.mean([metrics.pace(one) * (len(one) - 1) for one in made], 0).round(4).tolist()
    return found


def chain(
    model: Model, settings: Settings, clips: Sequence[ChallengeClip], joint: int, overlap: int, key: jax.Array
) -> np.ndarray:
    """Two clips a path that share its frame `joint`, uint8 [N, T, H, W, 3]; `settings.frames` are the path's."""
    config = model.config
    lie = film.spans([joint + 1, settings.frames - joint], overlap, config.vae.temporal_stride, settings.frames)
    of = film.plans(config, settings, lie)
    captions, seeds = [one.caption for one in clips], [settings.seed] * len(clips)
    given = [one.video[[0, joint, -1]] for one in clips]
    batches = [Batch(Inputs.prepare([one[n : n + 2] for one in given], plan), captions, seeds)
               for n, plan in enumerate(of)]  # fmt: skip
    noises = [jax.random.normal(jax.random.fold_in(key, n), (len(clips), *plan.latent_shape))
              for n, plan in enumerate(of)]  # fmt: skip
    return film.make(model, lie, of, batches, noises=noises)[0]


def single(model: Model, settings: Settings, clips: Sequence[ChallengeClip], joint: int, key: jax.Array) -> np.ndarray:
    """One clip a path with three keyframes, uint8 [N, T, H, W, 3]."""
    plan = Plan.of(model.config, settings, (0, joint, -1))
    inputs = Inputs.prepare([one.video[list(plan.at)] for one in clips], plan)
    (told,) = pipeline.encode(model, plan, [inputs], [[one.caption for one in clips]])
    noise = jax.random.normal(key, (len(clips), *plan.latent_shape))
    return pipeline.decode(model, plan, pipeline.denoise(model, plan, told, noise, chunk=settings.steps))


def check(config: ModelConfig, settings: Settings, overlaps: Sequence[int]) -> int:
    """The joint's pixel frame.

    Raises:
      ValueError: a length or an overlap that cannot be measured or made.
    """
    stride, frames = config.vae.temporal_stride, settings.frames
    least = 2 * (1 + FAR) * stride + 1
    if frames < least or (frames - 1) % (2 * stride):
        raise ValueError(f"frames {frames}: give {2 * stride}n+1, at least {least}, so that a latent frame ends in the "
                         "middle")  # fmt: skip
    joint = (frames - 1) // 2
    Plan.of(config, settings, (0, joint, -1))
    for overlap in overlaps:
        film.plans(config, settings, film.spans([joint + 1] * 2, overlap, stride, frames))
        film.check_solver(settings, overlap)
    return joint


def arms(
    model: Model, settings: Settings, clips: Sequence[ChallengeClip], joint: int, overlaps: Sequence[int], batch: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Each arm's name and videos uint8 [N, T, H, W, 3], the truth first."""
    truth = np.stack([stretched(one.video, settings.size) for one in clips])
    yield "truth", truth
    yield "vae", evaluate.reconstruct(model, truth)

    def each(make: Any, *more: Any) -> np.ndarray:
        key = jax.random.key(settings.seed)
        parts = [make(model, settings, clips[start : start + batch], joint, *more, jax.random.fold_in(key, start))
                 for start in range(0, len(clips), batch)]  # fmt: skip
        return np.concatenate(parts)

    yield "chain", each(chain, 0)
    for overlap in overlaps:
        yield f"overlap-{overlap}", each(chain, overlap)
    yield "single", each(single)


def run(options: argparse.Namespace, settings: Settings, joint: int) -> bool:
    """Measures, writes after every arm, prints a table."""
    folder, _ = checkpoint.read_config(options.model)
    model = checkpoint.load(options.model)
    stride = model.config.vae.temporal_stride
    clips = paths(options.clips, settings.frames, size=min(settings.size))
    paced = np.array([one.story.scene.sprites[0].pace != "even" for one in clips])
    report: dict[str, Any] = {
        "environment": measure.environment(),
        "model": {"name": model.config.name, "sha256": model_identity(folder)},
        "settings": {name: getattr(settings, name) for name in SETTINGS},
        "joint": joint,
        "clips": len(clips),
        "arms": {},
    }  # fmt: skip
    rows, truth = [], None
    for name, made in arms(model, settings, clips, joint, options.overlaps, options.batch):
        truth = made if truth is None else truth
        own = report["arms"][name] = figures(made, truth, paced, joint, stride)
        rows.append([name, *(f"{own[group][of]['mean']:.3f}" for group in ("all", "even", "paced") if group in own
                             for of in ("slowest", "break", "off")), f"{own['psnr_interior']:.2f}"])  # fmt: skip
        print(f"{name}: slowest {own['all']['slowest']['mean']:.3f}", file=sys.stderr, flush=True)
        measure.write(options.out, report)
    head = [f"{group} {of}" for group in ("all", "even", "paced") if group in own
            for of in ("slowest", "break", "off")]  # fmt: skip
    measure.print_table(["arm", *head, "PSNR interior"], rows)
    return True


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m benchmarks.film", description=__doc__.splitlines()[0])
    out.add_argument("--model", default="tiny", help="'tiny' or a model folder (default %(default)s)")
    out.add_argument("--clips", type=measure.positive, default=64, help="held-out paths (default %(default)s)")
    out.add_argument("--frames", type=measure.positive, default=49, help="of a path (default %(default)s)")
    out.add_argument("--overlaps", type=measure.positive, nargs="*", default=[4, 8], help="to try (default 4 8)")
    out.add_argument("--batch", type=measure.positive, default=16, help="paths at once (default %(default)s)")
    out.add_argument("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    out.add_argument("--steps", type=measure.positive, help="denoising steps (default: the model's)")
    out.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    out.add_argument("--solver", help="sampler (default: the model's)")
    out.add_argument("--out", type=measure.output, help="JSON file, written anew after every arm")
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    options = line.parse_args(argv)
    measure.backend(line)
    given = {name: getattr(options, name) for name in ("frames", "seed", "steps", "guidance", "solver")}
    try:
        _, config = checkpoint.read_config(options.model)
        settings = Settings.of(config, **{name: value for name, value in given.items() if value is not None})
        joint = check(config, settings, options.overlaps)
    except (ValueError, OSError) as error:
        line.error(str(error))
    return measure.guarded(line, lambda: run(options, settings, joint))


if __name__ == "__main__":
    sys.exit(main())
