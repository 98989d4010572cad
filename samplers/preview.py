"""Pictures of a clip while it is denoised: its data estimate's latents as colours, by a linear map (`LatentRGB`).

A picture of each latent frame, a pixel a latent position, in one strip (PNG) or moving (GIF), beside the output.
Nothing runs on the device but the copy of the latents. At 480x864 and 81 frames these are 9 MB, the arithmetic takes
3 ms of one CPU core, writing a PNG 50 ms and a GIF 250 ms (of noise; pictures less), where a guided step of 14B takes
6 s on one H200: a PNG after each step is within 1 %, a GIF after each fifth. Axis letters as in `wanjax.types`.
"""

import math
import warnings
from pathlib import Path

import numpy as np

from samplers import video
from samplers.plan import Plan
from samplers.run import OnStep
from samplers.sample import Carry
from wanjax import hosts
from wanjax.config import ModelConfig
from wanjax.writing import OutputError, Target, absolute

SUFFIXES = (".png", ".gif")
COLUMNS = 7
"""Frames in a row of a strip."""
SHOWN, LARGE = 96, 48
"""Pixels that the shorter side is enlarged to; from `LARGE` on it stays, as writing takes longer than anything else."""


class PreviewWarning(UserWarning):
    """Previews stopped; the run goes on."""


def missing(config: ModelConfig) -> str | None:
    """A line for the user where a model's latents have no colours, and so no previews; None where they have."""
    if config.vae.preview_rgb is not None:
        return None
    return (f"no previews: model {config.name} has no colours for its latents; fit vae.latent_rgb of its config.json "
            "(benchmarks/tiny/fit_preview.py does for the tiny model)")  # fmt: skip


def picture(config: ModelConfig, latents: np.ndarray) -> np.ndarray:
    """uint8 [..., F, h, w, 3] of normalised latents float [..., F, h, w, C], on the host.

    Raises:
      ValueError: a model without colours.
    """
    rgb = config.vae.preview_rgb
    if rgb is None:
        raise ValueError(missing(config))
    colours = np.asarray(latents, np.float32) @ np.asarray(rgb.factors, np.float32) + np.asarray(rgb.bias, np.float32)
    return np.rint((np.clip(np.nan_to_num(colours), -1, 1) + 1) * 127.5).astype(np.uint8)


def strip(frames: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """Frames uint8 [F, h, w, 3] row by row in one picture [H, W, 3], a pixel apart; the rest is dark."""
    frames = np.pad(frames, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=24)
    count, height, width, _ = frames.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    filled = np.full((rows * columns, height, width, 3), 24, np.uint8)
    filled[:count] = frames
    filled = filled.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return filled.reshape(rows * height, columns * width, 3)[:-1, :-1]


def target(path: str | Path) -> Target:
    """Where previews go, to be checked before a run with its other outputs (`video.check_output(..., also=...)` is for
    what a run leaves; a preview is written while it runs, so ask `writing.check([target(path)], overwrite=...)`).

    Raises:
      OutputError: neither .png nor .gif.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise OutputError(f"preview {path}: give a name that ends in .png (frames in rows) or .gif (moving)")
    return Target(absolute(path))


def write(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Frames uint8 [F, h, w, 3] as a strip or, by the name's suffix, a GIF; whole or not at all, over an earlier one.

    Args:
      fps: of the latent frames, in a GIF.

    Raises:
      OutputError: something stands there that wanjax did not write. OSError: a full disk.
    """
    path = target(path).path
    small = min(frames.shape[1:3]) < LARGE
    factor = video.enlarge_factor(*frames.shape[1:3], SHOWN) if small else 1
    if path.suffix.lower() == ".gif":
        video.write(path, frames, fps, factor)
    else:
        video.write_png(path, video.enlarge(strip(frames), factor))


def previews(plan: Plan, path: str | Path, every: int = 1, fps: float | None = None) -> OnStep:
    """An `OnStep` that writes what the clip is estimated to be, after each `every` steps and the last.

    Of a batch the clips lie below each other (in a GIF too). Of several hosts, all of which must call it, the first
    writes. What cannot be written ends the previews with a `PreviewWarning`, not the run.

    Args:
      path: .png or .gif.
      every: steps, at least 1.
      fps: of the clip; None takes the model's.

    Raises:
      ValueError: a model without colours, another suffix, or `every` below 1.
    """
    if every < 1:
        raise ValueError(f"preview every {every} steps: give a whole number of at least 1")
    if plan.config.vae.preview_rgb is None:
        raise ValueError(missing(plan.config))
    path = target(path).path
    rate = max(0.1, (plan.config.sampling.fps if fps is None else fps) / plan.config.vae.temporal_stride)
    broken = False

    def on_step(done: int, carry: Carry) -> None:
        nonlocal broken
        if not done or (done % every and done != plan.settings.steps):
            return
        latents = hosts.fetch(carry.data_1)  # also where nothing is written: the other hosts wait for it
        if not hosts.is_first() or broken:
            return
        frames = picture(plan.config, latents)
        try:
            write(path, np.concatenate(list(frames), axis=1), rate)
        except (OSError, OutputError) as error:
            broken = True
            warnings.warn(f"preview {path}: {' '.join(str(error).split())}; no more are written", PreviewWarning, 2)

    return on_step
