"""Fit the colours of a small model's latents for previews (`samplers.preview`) on drawn training clips.

    python -m benchmarks.tiny.fit_preview --out benchmarks/results/preview_tiny.json   # look
    python -m benchmarks.tiny.fit_preview --write                                      # and keep it in the model

Least squares of patches of pixels, averaged, on the latents that the VAE makes of them and a constant; R^2 and error on
clips that were not fitted. A latent frame stands for several frames of pixels: the first for one, each other for the
mean of its own. Axis letters as in `wanjax.types`; N clips.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.tiny.latents import training_clip
from wanjax import checkpoint, keyframes, vae, writing
from wanjax.config import VAEConfig
from wanjax.latent_rgb import LatentRGB

BATCH = 16
DIGITS = 5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.tiny.fit_preview", description=__doc__.split("\n")[0])
    p.add_argument("--model", default="tiny", help="'tiny' or a model folder (default %(default)s)")
    p.add_argument("--clips", type=measure.positive, default=224, help="to fit on (default %(default)s)")
    p.add_argument("--checked", type=measure.positive, default=64, help="to measure on (default %(default)s)")
    p.add_argument("--frames", type=measure.positive, default=25, help="of each (default %(default)s)")
    p.add_argument("--out", type=measure.output, metavar="JSON", help="report to write")
    p.add_argument("--write", action="store_true", help="keep the fit in the model's config.json, and sign the folder")
    return p


def patches(video: np.ndarray, config: VAEConfig) -> np.ndarray:
    """float32 [N, F, h, w, 3] in -1..1, what each latent stands for, of uint8 [N, T, H, W, 3]."""
    count, frames, height, width, _ = video.shape
    space, time = config.spatial_stride, config.temporal_stride
    small = keyframes.to_unit(video).reshape(count, frames, height // space, space, width // space, space, 3)
    small = small.mean((3, 5))
    later = small[:, 1:].reshape(count, -1, time, *small.shape[2:]).mean(2)
    return np.concatenate([small[:, :1], later], 1)


def fit(latents: np.ndarray, colours: np.ndarray) -> LatentRGB:
    """Least squares of colours [..., 3] on normalised latents [..., C]."""
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    found, *_ = np.linalg.lstsq(np.c_[flat, np.ones(len(flat))], colours.reshape(-1, 3), rcond=None)
    rows = [tuple(round(float(value), DIGITS) for value in row) for row in found]
    return LatentRGB(tuple(rows[:-1]), rows[-1])


def quality(rgb: LatentRGB, latents: np.ndarray, colours: np.ndarray) -> dict[str, Any]:
    """R^2 of red, green, blue, and root mean square error in -1..1."""
    error = np.square(latents @ np.asarray(rgb.factors) + np.asarray(rgb.bias) - colours).reshape(-1, 3)
    spread = np.square(colours - colours.reshape(-1, 3).mean(0)).reshape(-1, 3)
    return {"r2": (1 - error.mean(0) / spread.mean(0)).round(4).tolist(), "rmse": round(float(error.mean() ** 0.5), 4),
            "std": round(float(spread.mean() ** 0.5), 4)}  # fmt: skip


def pairs(config: VAEConfig, params: Any, numbers: range, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents and colours of training clips by number."""
    latents, colours = [], []
    for start in range(0, len(numbers), BATCH):
        some = [training_clip(n, "challenges", frames).video for n in numbers[start : start + BATCH]]
        filled = np.stack([*some, *some[-1:] * (BATCH - len(some))])  # a smaller batch would be another program
        latents.append(np.asarray(_encode(config, params, keyframes.to_unit(filled)))[: len(some)])
        colours.append(patches(filled[: len(some)], config))
    return np.concatenate(latents), np.concatenate(colours)


@partial(jax.jit, static_argnums=0)
def _encode(config: VAEConfig, params: Any, video: jax.Array) -> jax.Array:
    return vae.encode(config, params, video)


def keep(folder: Path, rgb: LatentRGB) -> None:
    """Puts a fit into a folder's config.json, the rest of which stays as it is, and signs the folder."""
    file = folder / checkpoint.CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config["vae"]["latent_rgb"] = {"factors": rgb.factors, "bias": rgb.bias}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    writing.write_text(file, text, overwrite=True, anything=True)
    if (folder / checkpoint.MANIFEST).is_file():
        checkpoint.sign(folder)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    measure.backend(line)
    try:
        folder, config = checkpoint.read_config(args.model)
    except ValueError as error:
        line.error(str(error))
    measure.check_clip(line, config, config.sampling.size, args.frames)

    def measured() -> bool:
        model = checkpoint.load(args.model)
        own, params = config.for_platform(jax.default_backend()).vae, model.part("vae")
        rgb = fit(*pairs(own, params, range(args.clips), args.frames))
        checked = quality(rgb, *pairs(own, params, range(args.clips, args.clips + args.checked), args.frames))
        print(f"{args.checked} other clips: R^2 {checked['r2']}, error {checked['rmse']} where colours spread by "
              f"{checked['std']}")  # fmt: skip
        measure.write(args.out, {"model": config.name, "clips": args.clips, "checked": args.checked,
                                 "frames": args.frames, "latent_rgb": {"factors": rgb.factors, "bias": rgb.bias},
                                 **checked, "environment": measure.environment()})  # fmt: skip
        if args.write:
            keep(folder, rgb)
        return True

    return measure.guarded(line, measured)


if __name__ == "__main__":
    raise SystemExit(main())
