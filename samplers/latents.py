"""Latents in a file, to be decoded alone: in other pieces, at another precision, into another kind of file.

A safetensors file holds the latents of one clip, its keyframes as they were fitted, and in its metadata what the clip
is made of.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from samplers import memory, pipeline, recall, resume, video
from samplers.plan import Plan
from samplers.recall import Recalled
from samplers.request import of_the_file
from wanjax import checkpoint, environment, hosts, marks
from wanjax.config import VAEConfig

TOLD, VAE = "clip", "vae"
"""Keys of the metadata: what the clip is made of, and a digest of how its latents are normalised."""


@dataclass(frozen=True)
class Stored:
    """What such a file holds.

    Attributes:
      latents: float32 [F, h, w, C], normalised.
      keyframes: uint8 [A, H, W, 3].
      at: pixel frames of these.
      made_of: settings, model, frames per second.
      normalised: digest of the VAE's statistics.
    """

    latents: np.ndarray
    keyframes: np.ndarray
    at: tuple[int, ...]
    made_of: Recalled
    normalised: str


def write(path: Path, latents: jax.Array, vae: VAEConfig, told: str, keyframes: np.ndarray, at: Sequence[int]) -> None:
    """Writes the latents [1, F, h, w, C] of a clip to a name that is not there.

    Args:
      vae: that normalised them.
      told: what the clip is made of, of `recall.to_text`.
      keyframes: uint8 [A, H, W, 3]; at: their pixel frames.

    Raises:
      OSError: a full disk.
    """
    arrays = {"latents": np.asarray(hosts.fetch(latents)[0], np.float32), "keyframes": keyframes,
              "at": np.asarray(at, np.int32)}  # fmt: skip
    save_file(arrays, path, {marks.KEY: marks.mark(), TOLD: told, VAE: _normalised(vae)})


def read(path: str | Path) -> Stored:
    """Reads such a file.

    Raises:
      ValueError: not there, damaged, or another kind of file; one line.
    """
    try:
        with safe_open(path, "np") as opened:
            told, normalised = ((opened.metadata() or {})[key] for key in (TOLD, VAE))
            found, keyframes, at = (opened.get_tensor(name) for name in ("latents", "keyframes", "at"))
    except KeyError as error:
        raise ValueError(f"{path}: holds no latents of a clip; give a file that --keep-latents wrote") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: cannot be read as latents ({error}); give a file that --keep-latents wrote"
        ) from error
    if found.ndim != 4 or keyframes.ndim != 4 or len(keyframes) != len(at) or not np.isfinite(found).all():
        raise ValueError(f"{path}: latents {found.shape} of another shape, or not finite; make them again")
    return Stored(found, keyframes, tuple(map(int, at)), recall.from_text(told, str(path)), normalised)


def _normalised(vae: VAEConfig) -> str:
    return resume.digest([*vae.latent_mean, *vae.latent_std])


@dataclass(frozen=True)
class Decoding:
    """Latents that are to be decoded, checked.

    Attributes:
      stored: what is in the file; path: of it.
      folder, dtype: of the model, and its policy.
      plan: of the clip, by the model that decodes.
      outputs, fps, scale: of the video.
      notes: lines that the user should see.
    """

    path: str
    stored: Stored
    folder: checkpoint.Folder
    dtype: str | None
    plan: Plan
    outputs: video.Outputs
    fps: float
    scale: int
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """What the hosts of a run must have in common."""
        return resume.digest([self.stored.made_of.model, float(self.stored.latents.sum())])


def prepare(
    path: str | Path,
    out: str | Path,
    *,
    model: str | Path = "tiny",
    dtype: str | None = None,
    fps: float | None = None,
    scale: int | None = None,
    overwrite: bool = False,
    vae_memory: int | None = None,
) -> Decoding:
    """Reads and checks what is needed to decode latents; computes nothing.

    Args:
      path: of a file that `write` wrote; others: as `request.prepare`.

    Raises:
      ValueError: one clear line; also for latents that are not this model's.
    """
    stored, folder = read(path), checkpoint.open_folder(model)
    config = folder.config if dtype is None else checkpoint.with_dtype(folder.config, dtype)
    settings, notes = stored.made_of.settings, folder.notes
    tiles = memory.decode_tiles(config, settings, vae_memory)
    config = dataclasses.replace(config, vae=dataclasses.replace(config.vae, tiles=tiles))
    plan = Plan.of(config, settings, stored.at)
    if stored.latents.shape != plan.latent_shape or stored.normalised != _normalised(config.vae):
        raise ValueError(f"{path}: latents of another autoencoder than {config.name}'s; they are of "
                         f"{stored.made_of.model}, give that as --model")  # fmt: skip
    fps, scale = of_the_file(config, settings, stored.made_of.fps if fps is None else fps, scale)
    outputs = video.check_output(out, overwrite, inputs=(path, folder.path))
    video.check_sides(out, *(side * scale for side in settings.size))
    return Decoding(str(path), stored, folder, dtype, plan, outputs, fps, scale, (*notes, *outputs.notes))


def make(decoding: Decoding) -> dict[str, float]:
    """Decodes and writes video, contact sheet and JSON, all or none. Seconds by stage.

    Raises:
      ValueError: damaged weights, or a file that came to the output's name meanwhile. FloatingPointError: NaN or inf.
      OSError: a full disk.
    """
    start, d = time.perf_counter(), decoding
    with video.staged(d.outputs) as outputs:
        model = checkpoint.load(d.folder, d.dtype, policy="stage")
        (frames,) = pipeline.decode(model, d.plan, jnp.asarray(d.stored.latents)[None])
        decoded = time.perf_counter() - start
        text = recall.to_text(d.plan.settings, model=d.plan.config.name, fps=d.fps, scale=d.scale,
                              keyframes=d.stored.keyframes, at=d.stored.at)  # fmt: skip
        video.write(outputs.video, frames, d.fps, d.scale, text)
        video.write_png(outputs.sheet, video.contact_sheet(frames, d.stored.keyframes, at=d.stored.at), text)
        seconds = {"decode": decoded, "total": time.perf_counter() - start}
        video.write_json(outputs.settings, {**json.loads(text), "latents": d.path, "video": str(d.outputs.video),
                                            "seconds": seconds, **environment.report()})  # fmt: skip
    return seconds
