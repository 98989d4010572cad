"""Measure a model on held-out procedural clips, against simple baselines and against its own VAE.

    python -m benchmarks.tiny.evaluate --model tiny --clips 64 --guidance 1 2
    python -m benchmarks.tiny.evaluate --clips 64 --frames 49 --keyframes 3      what the middle one is worth

PSNR is of each clip's mean squared error (8-bit, peak 255), averaged over clips. "Interior" leaves out the keyframes,
the first and last frame or more of them, evenly spaced; "motion" counts only pixels that an object covers at some time;
an "ambiguous" clip moves along an arc that its first and last frame do not tell. With more than two keyframes
"without_inner" is of the same frames of clips made from the first and last alone, "inner_gain" the difference, and
"inner" of the inner keyframes themselves, as "ends" of the outer two.
Axis letters: N clips, T frames, H height, W width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure as command
from benchmarks.tiny import sheets
from benchmarks.tiny.clips import Clip, clip
from samplers import pipeline
from samplers.pipeline import Inputs
from samplers.plan import Plan, Settings
from wanjax import keyframes, vae
from wanjax.checkpoint import Model, load
from wanjax.config import VAEConfig
from wanjax.settings import whole

BATCH = 16


def heldout(count: int, rich: bool = False, frames: int = 25) -> list[Clip]:
    """The first `count` held-out clips."""
    return [clip(seed, "heldout", frames, rich=rich) for seed in range(count)]


def places(frames: int, keyframes: int) -> tuple[int, ...]:
    """Pixel frames of so many keyframes, evenly spaced from the first to the last, whole.

    Raises:
      ValueError: fewer than two, or more than there are frames.
    """
    whole("keyframes", keyframes, 2, frames)
    return tuple(int(place) for place in np.linspace(0, frames - 1, keyframes).round())


def psnr(made: np.ndarray, truth: np.ndarray, region: np.ndarray | None = None) -> np.ndarray:
    """PSNR in dB [N] of uint8 videos [N, T, H, W, 3], over the pixels of `region` bool [N, H, W] if given."""
    error = np.square(made.astype(np.float64) - truth).mean(axis=(1, 4))
    weight = np.ones(error.shape) if region is None else region.astype(np.float64)
    mean = (error * weight).sum(axis=(1, 2)) / weight.sum(axis=(1, 2))
    return -10 * np.log10(np.maximum(mean, 1e-3) / 255**2)


def baselines(truth: np.ndarray, at: Sequence[int] = (0, -1)) -> dict[str, np.ndarray]:
    """What can be done without a model: the nearer keyframe, and a linear cross-fade; uint8 [N, T, H, W, 3].

    `at`: pixel frames of the keyframes, ascending, the first and the last among them.
    """
    if len(at) > 2:
        parts = [baselines(truth[:, first : last + 1]) for first, last in pairwise(at)]
        joined = {name: [parts[0][name], *(part[name][:, 1:] for part in parts[1:])] for name in parts[0]}
        return {name: np.concatenate(videos, axis=1) for name, videos in joined.items()}
    share = np.linspace(0, 1, truth.shape[1])[None, :, None, None, None]
    first, last = truth[:, :1].astype(np.float64), truth[:, -1:].astype(np.float64)
    fade = np.round(first + (last - first) * share).astype(np.uint8)
    return {"nearest": np.where(share < 0.5, truth[:, :1], truth[:, -1:]), "crossfade": fade}


@partial(jax.jit, static_argnums=0)
def _encode(config: VAEConfig, params: Any, video: jax.Array) -> jax.Array:
    return vae.encode(config, params, video)


@partial(jax.jit, static_argnums=0)
def _decode(config: VAEConfig, params: Any, latents: jax.Array) -> jax.Array:
    return vae.decode(config, params, latents)


def reconstruct(model: Model, truth: np.ndarray) -> np.ndarray:
    """The clips through the VAE and back: the best that any latents of its encoder could give."""
    config, params = model.config.for_platform(jax.default_backend()).vae, model.part("vae")
    parts = [truth[i : i + BATCH] for i in range(0, len(truth), BATCH)]
    latents = [_encode(config, params, keyframes.to_unit(part)) for part in parts]
    return np.concatenate([keyframes.from_unit(_decode(config, params, one)) for one in latents])


def generate(
    model: Model, clips: Sequence[Clip], captions: Sequence[str], settings: Settings, at: Sequence[int] = (0, -1)
) -> np.ndarray:
    """Videos uint8 [N, T, H, W, 3] from the keyframes of `clips` at some pixel frames, told `captions`."""
    videos, plan = [], Plan.of(model.config, settings, at)
    for start in range(0, len(clips), BATCH):
        part = clips[start : start + BATCH]
        inputs = Inputs.prepare([one.video[list(plan.at)] for one in part], plan)
        (encoded,) = pipeline.encode(model, plan, [inputs], [captions[start : start + BATCH]])
        # One draw for the batch, as the published figures have it.
        noise = jax.random.normal(jax.random.key(settings.seed), (len(part), *plan.latent_shape))
        latents = pipeline.denoise(model, plan, encoded, noise, chunk=settings.steps)
        videos.append(pipeline.decode(model, plan, latents))
    return np.concatenate(videos)


def measure(
    model: Model,
    clips: Sequence[Clip],
    guidance: Sequence[float] = (1.0, 2.0),
    steps: int = 15,
    solver: str = "unipc",
    sheet: Path | None = None,
    keyframes: int = 2,
) -> dict[str, float]:
    """All figures, in dB but for shares.

    Args:
      clips: held-out clips of one length, best a multiple of 16.
      guidance: scales to try.
      steps, solver: of the sampler.
      sheet: PNG to write: truth, cross-fade and model (last guidance) of the first clips.
      keyframes: that the model is given, evenly spaced.

    Raises:
      ValueError: settings that the model cannot run.
    """
    truth = np.stack([one.video for one in clips])
    region = np.stack([one.motion_mask for one in clips])
    ambiguous = np.array([one.ambiguous for one in clips])
    at = places(truth.shape[1], keyframes)
    inside, inner = np.setdiff1d(np.arange(truth.shape[1]), at), list(at[1:-1])
    figures: dict[str, float] = {}

    def add(name: str, made: np.ndarray) -> np.ndarray:
        interior = psnr(made[:, inside], truth[:, inside])
        figures[f"{name}_interior"] = float(interior.mean())
        figures[f"{name}_motion"] = float(psnr(made[:, inside], truth[:, inside], region).mean())
        return interior

    fades = baselines(truth, at)
    simple = {name: add(name, made) for name, made in fades.items()}
    add("vae", reconstruct(model, truth))
    for scale in guidance:
        settings = Settings.of(model.config, guidance=scale, steps=steps, solver=solver, frames=truth.shape[1])
        captions, name = [one.caption for one in clips], f"guidance_{scale:g}"
        made = generate(model, clips, captions, settings, at)
        blind = generate(model, clips, [""] * len(clips), settings, at)
        told, untold = add(name, made), add(f"{name}_empty", blind)
        figures[f"{name}_wins"] = float((told > simple["crossfade"]).mean())
        figures[f"{name}_ends"] = float(psnr(made[:, [0, -1]], truth[:, [0, -1]]).mean())
        figures[f"{name}_caption_gain"] = float((told - untold)[ambiguous].mean()) if ambiguous.any() else 0.0
        if inner:
            less = add(f"{name}_without_inner", generate(model, clips, captions, settings))
            figures[f"{name}_inner_gain"] = float((told - less).mean())
            figures[f"{name}_inner"] = float(psnr(made[:, inner], truth[:, inner]).mean())
    if sheet is not None and guidance:
        save_sheet({"truth": truth, "cross-fade": fades["crossfade"], "model": made}, captions, sheet)
    return figures


def save_sheet(videos: Mapping[str, np.ndarray], captions: Sequence[str], path: Path, clips: int = 10) -> None:
    """A PNG of the first clips: under its caption one row of every third frame for each of `videos`, by name."""
    count = min(clips, len(captions))
    blocks = [
        sheets.Block(f"{n}: {captions[n]}", {name: made[n] for name, made in videos.items()}) for n in range(count)
    ]
    sheets.write(path, sheets.sheet(blocks, range(0, next(iter(videos.values())).shape[1], 3), scale=3))


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure a model on held-out procedural clips.")
    parser.add_argument("--model", default="tiny", help="'tiny' or a model folder (default %(default)s)")
    parser.add_argument("--clips", type=int, default=64, help="held-out clips (default %(default)s)")
    parser.add_argument("--frames", type=int, default=25, help="of each clip (default %(default)s)")
    parser.add_argument("--keyframes", type=int, default=2, help="given, evenly spaced (default: the two ends)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0], help="scales (default 1 2)")
    parser.add_argument("--steps", type=int, default=15, help="sampling steps (default %(default)s)")
    parser.add_argument("--solver", default="unipc", help="sampler (default %(default)s)")
    parser.add_argument("--rich", action="store_true", help="clips that also turn, grow, change colour, come in pairs")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--sheet", type=command.output, metavar="PNG", help="truth, cross-fade and model in turn")
    options = parser.parse_args(arguments)
    try:
        if options.clips < 1:
            raise ValueError(f"--clips {options.clips}: give a whole number of at least 1")
        for path in (options.out, options.sheet):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{path}: no folder {path.parent}; create it with mkdir -p {path.parent}")
        model = load(options.model)
        for scale in options.guidance:
            settings = Settings.of(model.config, guidance=scale, steps=options.steps, solver=options.solver,
                                   frames=options.frames)  # fmt: skip
            Plan.of(model.config, settings, places(options.frames, options.keyframes))
        clips = heldout(options.clips, options.rich, options.frames)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    figures = measure(model, clips, options.guidance, options.steps, options.solver, options.sheet, options.keyframes)
    for name, value in figures.items():
        print(f"{name:32s} {value:7.2f}")
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
