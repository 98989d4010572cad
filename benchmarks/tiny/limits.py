"""What limits the tiny model: its VAE, its transformer, the steps, guidance, or that weights are kept in bfloat16.

    python -m benchmarks.tiny.limits --out benchmarks/results/limits_tiny.json --sheet docs/limits.sheet.png

By frame, held-out clips through the VAE and back, made by the model, and the model's against the VAE's: how far off the
model would be if the VAE were perfect. PSNR is of the pixels that the object covers at some time, averaged over clips.
"centre" is how far the object is from its place, in pixels; "shapes" the share of middle frames whose shape a
classifier tells (`shapes`). Of scales, steps and solvers the first of each is the usual one, and the others are tried
one at a time. "only_off_centre" is of clips that are perfect but for objects as far off their places as the model's;
training clips beside held-out ones tell whether more of them would help.

Axis letters: N clips, T frames, H height, W width.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.tiny import evaluate, shapes, sheets
from benchmarks.tiny.clips import COMMON_SHAPES, PACES, REFERENCE_SIZE, Clip, Scene, path, render
from benchmarks.tiny.latents import training_clip
from samplers.plan import Plan, Settings
from wanjax import checkpoint
from wanjax.checkpoint import Model

SHOWN = (0, 1, 2, 3, 4, 8, 12, 16, 20, 21, 22, 23, 24)
"""Frames on the sheet: all of the ends, some of the middle."""
FAINTEST = 0.15  # coverage below it is an error of the background, not the object
PLAIN_OF = 7  # of so many training clips the first two are plain (`latents.training_clip`)


def motion(one: Clip) -> np.ndarray:
    """Pixels that the object of a plain clip moves from each frame to the next, [T - 1]."""
    sprite, time = one.scene.sprites[0], np.linspace(0.0, 1.0, len(one.video))
    return np.linalg.norm(np.diff(path(sprite, PACES[sprite.pace](time)), axis=0), axis=1)


def by_frame(made: np.ndarray, truth: np.ndarray, region: np.ndarray) -> np.ndarray:
    """PSNR in dB [N, T] of every frame of videos [N, T, H, W, 3] over the pixels of `region` bool [N, H, W]."""
    columns = [evaluate.psnr(made[:, [t]], truth[:, [t]], region) for t in range(truth.shape[1])]
    return np.stack(columns, axis=1)


def centres(made: np.ndarray, drawn: Scene) -> np.ndarray:
    """Centre (x, y) in pixels of what has the object's colour in a video uint8 [T, H, W, 3]: [T, 2].

    How much of the object a pixel shows is where its colour lies between the background's and the object's. Nan where
    the object is nowhere.
    """
    size = made.shape[1]
    behind = render(Scene((), drawn.background), 2, size)[0][0].astype(np.float64)
    way = np.array(drawn.sprites[0].rgb[0]) * 255 - behind
    cover = ((made - behind) * way).sum(-1) / np.maximum(np.square(way).sum(-1), 1.0)
    cover = np.where(cover < FAINTEST, 0.0, np.minimum(cover, 1.0))
    places = np.arange(size) + 0.5
    with np.errstate(invalid="ignore"):
        x, y = ((cover.sum(axis) * places).sum(-1) / cover.sum((1, 2)) for axis in (1, 2))
    return np.stack([x, y], axis=-1)


def off_centre(made: np.ndarray, clips: Sequence[Clip]) -> float:
    """Mean distance in pixels of objects from where they should be, over the frames between the ends."""
    apart = [centres(video, one.scene) - centres(one.video, one.scene) for video, one in zip(made, clips, strict=True)]
    return float(np.nanmean(np.linalg.norm(np.stack(apart)[:, 1:-1], axis=-1)))


def moved(clips: Sequence[Clip], distance: float, seed: int = 0) -> np.ndarray:
    """The clips drawn anew with every object so many pixels off its place, each in one direction: [N, T, H, W, 3]."""
    rng, made = np.random.default_rng(seed), []
    for one in clips:
        (sprite,), turn = one.scene.sprites, rng.uniform(0, 2 * np.pi)
        step = distance * np.array([np.cos(turn), np.sin(turn)]) * REFERENCE_SIZE / one.video.shape[1]
        start, end = (tuple(map(float, place + step)) for place in (sprite.start, sprite.end))
        scene = dataclasses.replace(one.scene, sprites=(dataclasses.replace(sprite, start=start, end=end),))
        made.append(render(scene, len(one.video), one.video.shape[1])[0])
    return np.stack(made)


def rounded_again(params: Any, seed: int = 0) -> Any:
    """Parameters with an error as that of rounding to bfloat16: up to half of a number's last place there.

    What was lost when they were rounded cannot be had back; what losing as much again costs says what it cost.
    """
    rng = np.random.default_rng(seed)

    def nudged(leaf: Any) -> np.ndarray:
        values = np.asarray(leaf, np.float32)
        _, exponent = np.frexp(values)  # |value| in 2**(exponent - 1) .. 2**exponent, of which 8 bits are kept
        half = np.where(values == 0, 0, np.ldexp(np.float32(1), exponent - 9))
        return values + half * rng.uniform(-1, 1, values.shape).astype(np.float32)

    return jax.tree.map(nudged, params)


def seen_in_training(count: int, frames: int) -> list[Clip]:
    """The first plain clips that training by `latents.training_clip` saw, but for stars, which no held-out one is."""
    numbers = (n for n in itertools.count() if n % PLAIN_OF < 2)
    plain = (training_clip(n, "challenges", frames) for n in numbers)
    return list(itertools.islice((one for one in plain if one.scene.sprites[0].shape in COMMON_SHAPES), count))


def figures(made: np.ndarray, clips: Sequence[Clip], judge: Any) -> dict[str, float]:
    """PSNR in dB between the ends, of the motion region there and of the ends; centre in pixels; shapes told."""
    truth, region = np.stack([one.video for one in clips]), np.stack([one.motion_mask for one in clips])
    inner = made[:, 1:-1], truth[:, 1:-1]
    labels = np.array([shapes.label(one.scene) for one in clips])
    return {
        "interior": float(evaluate.psnr(*inner).mean()),
        "motion": float(evaluate.psnr(*inner, region).mean()),
        "ends": float(evaluate.psnr(made[:, [0, -1]], truth[:, [0, -1]]).mean()),
        "centre": off_centre(made, clips),
        "shapes": float((shapes.told(judge, made[:, made.shape[1] // 2]) == labels).mean()),
    }


def halves(values: np.ndarray, fast: np.ndarray) -> dict[str, list[float]]:
    """Means by frame of [N, T]: over all clips, the slower half and the faster half."""
    parts = {"all": values, "slow": values[~fast], "fast": values[fast]}
    return {name: part.mean(0).round(2).tolist() for name, part in parts.items() if len(part)}


def compare(model: Model, clips: Sequence[Clip], settings: Sequence[Settings], judge: Any) -> tuple[dict, list]:
    """The report's parts on `clips`, the first settings' video by frame; and sheet blocks of the fastest four clips."""
    truth, region = np.stack([one.video for one in clips]), np.stack([one.motion_mask for one in clips])
    captions, speed = [one.caption for one in clips], np.stack([motion(one) for one in clips])
    fast = speed.mean(1) > np.median(speed.mean(1))
    vae = evaluate.reconstruct(model, truth)
    cases, videos = [], []
    for one in settings:
        videos.append(evaluate.generate(model, clips, captions, one))
        cases.append({"guidance": one.guidance, "steps": one.steps, "solver": one.solver,
                      **figures(videos[-1], clips, judge)})  # fmt: skip
    made = videos[0]
    pairs = {"vae": (vae, truth), "model": (made, truth), "model_to_vae": (made, vae)}
    again = {**model.params} | {name: rounded_again(model.params[name]) for name in ("dit", "umt5")}
    jittered = evaluate.generate(dataclasses.replace(model, params=again), clips, captions, settings[0])
    report = {
        "pixels_a_frame": halves(speed, fast),
        "by_frame": {name: halves(by_frame(*pair, region), fast) for name, pair in pairs.items()},
        "vae": figures(vae, clips, judge),
        "model_to_vae": {"interior": float(evaluate.psnr(made[:, 1:-1], vae[:, 1:-1]).mean()),
                         "motion": float(evaluate.psnr(made[:, 1:-1], vae[:, 1:-1], region).mean()),
                         "ends": float(evaluate.psnr(made[:, [0, -1]], vae[:, [0, -1]]).mean())},
        "cases": cases,
        "rounded_again": figures(jittered, clips, judge),
        "only_off_centre": figures(moved(clips, cases[0]["centre"]), clips, judge),
    }  # fmt: skip
    order = np.argsort(-speed.mean(1))[:4]
    blocks = [sheets.Block(f"{n}: {captions[n]}", {"truth": truth[n], "VAE": vae[n], "model": made[n]}) for n in order]
    return report, blocks


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.tiny.limits", description=__doc__.split("\n")[0])
    p.add_argument("--model", default="tiny", help="'tiny' or a model folder (default %(default)s)")
    p.add_argument("--clips", type=measure.positive, default=64, help="held-out clips (default %(default)s)")
    p.add_argument("--guidance", type=float, nargs="+", default=[1.5, 1.0, 2.0], help="scales (default 1.5 1 2)")
    p.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40], help="sampling steps (default 10 20 40)")
    p.add_argument("--solvers", nargs="+", default=["unipc", "euler"], help="(default unipc euler)")
    p.add_argument("--classifier", type=Path, metavar="FILE", help="as benchmarks.tiny.shapes keeps it (else: learn)")
    p.add_argument("--out", type=measure.output, metavar="JSON", help="report to write")
    p.add_argument("--sheet", type=measure.output, metavar="PNG", help="truth, VAE and model of the four fastest clips")
    return p


def cases_of(model: Model, args: argparse.Namespace) -> list[Settings]:
    """What is tried, checked; the first is what frames are looked at by.

    Raises:
      ValueError: what the model cannot run.
    """
    first = (args.guidance[0], args.steps[0], args.solvers[0])
    asked = [first, *((scale, *first[1:]) for scale in args.guidance[1:])]
    asked += [(first[0], steps, first[2]) for steps in args.steps[1:]]
    asked += [(*first[:2], solver) for solver in args.solvers[1:]]
    made = [Settings.of(model.config, guidance=scale, steps=steps, solver=solver) for scale, steps, solver in asked]
    for one in made:
        Plan.of(model.config, one)
    return made


def show(report: dict[str, Any]) -> None:
    """By frame, then by settings."""
    lines = report["by_frame"]
    rows = [[t, *(f"{lines[name][part][t]:.1f}" for name in lines for part in ("slow", "fast") if part in lines[name])]
            for t in range(len(lines["vae"]["all"]))]  # fmt: skip
    parts = [part for part in ("slow", "fast") if part in lines["vae"]]
    measure.print_table(["frame", *(f"{name} {part}" for name in lines for part in parts)], rows)
    names = ("interior", "motion", "ends", "centre", "shapes")
    rows = [[f"guidance {one['guidance']:g}, {one['steps']} steps, {one['solver']}", one] for one in report["cases"]]
    rows += [[name, report[name]] for name in ("vae", "only_off_centre", "rounded_again", "training_clips")]
    measure.print_table(["", *names], [[name, *(f"{one[key]:.2f}" for key in names)] for name, one in rows])


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring. Returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    measure.backend(line)
    try:
        model = checkpoint.load(args.model)
        settings, frames = cases_of(model, args), model.config.sampling.frames
        if args.sheet is not None and args.sheet.suffix.lower() != ".png":
            raise ValueError(f"--sheet {args.sheet}: give a name that ends in .png")
        clips = evaluate.heldout(args.clips, frames=frames)
        earlier = shapes.kept(args.classifier) if args.classifier is not None else None
    except (ValueError, OSError) as error:
        line.error(str(error))

    def measured() -> bool:
        judge, classifier = earlier or shapes.learn()
        report, blocks = compare(model, clips, settings, judge)
        known = seen_in_training(args.clips, frames)
        made = evaluate.generate(model, known, [one.caption for one in known], settings[0])
        report = {"model": model.config.name, "clips": len(clips), **report,
                  "training_clips": figures(made, known, judge), "classifier": classifier,
                  "environment": measure.environment()}  # fmt: skip
        show(report)
        measure.write(args.out, report)
        if args.sheet is not None:
            sheets.write(args.sheet, sheets.sheet(blocks, [t for t in SHOWN if t < frames], scale=2))
        return True

    return measure.guarded(line, measured)


if __name__ == "__main__":
    raise SystemExit(main())
