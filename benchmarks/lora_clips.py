"""Encode a folder of videos into the clips that `benchmarks.lora_14b` trains on: latents, captions, keyframes.

    python -m benchmarks.lora_clips --model wan-flf2v --videos my/videos --captions captions.json --out runs/clips

Of each video the first frames are taken, at the size asked for, and the first and the last of them are its keyframes.
Captions are a JSON object {"clip.mp4": "a dog turns round"}. All is encoded by the sampler's own programs, a part of
the model after the other, so that memory holds one at a time.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from benchmarks import measure
from benchmarks.lora_14b import EMPTY
from benchmarks.tgi.data import Item
from benchmarks.tgi.videos import videos
from samplers import pipeline
from samplers.pipeline import Inputs
from samplers.plan import Plan, Settings
from wanjax import checkpoint, keyframes, vae
from wanjax.checkpoint import Model

GROUP = 64
"""Clips for which a part of the model is read once."""


def encode(model: Model, plan: Plan, items: Sequence[Item], out: Path) -> None:
    """Writes OUT/ID.npz of each item.

    Raises:
      DataError: a video that cannot be read any more.
    """
    frames = {item.id: _fitted(item, plan) for item in items}
    ends = [Inputs.prepare([[frames[item.id][place] for place in plan.at]], plan) for item in items]
    told = pipeline.encode(model, plan, ends, [[item.caption] for item in items])
    params = model.part("vae")
    program = jax.jit(partial(vae.encode, plan.config.vae))
    for item, one in zip(items, told, strict=True):
        latents = program(params, keyframes.to_unit(frames[item.id][None]))
        arrays = {"latents": latents, "text": one.conditions.text, "images": one.conditions.images,
                  "condition": one.conditions.latent}  # fmt: skip
        _write(out / f"{item.id}.npz", {name: np.asarray(array, np.float32)[0] for name, array in arrays.items()})


def _fitted(item: Item, plan: Plan) -> np.ndarray:
    """uint8 [T, H, W, 3] as keyframes are brought to size."""
    images = [keyframes.image(frame, plan.settings.matte) for frame in item.read()]
    return np.stack(pipeline.fitted(images, plan.settings))


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all: an interrupted run leaves no clip that looks done."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez(file, **arrays)
    part.rename(path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser("python -m benchmarks.lora_clips", description=__doc__.split("\n", 1)[0])
    line.add_argument("--model", required=True, metavar="FOLDER", help="'tiny' or a model folder, with its encoders")
    line.add_argument("--videos", type=Path, required=True, metavar="FOLDER")
    line.add_argument("--captions", type=Path, metavar="FILE", help="JSON of captions by file name (default: none)")
    line.add_argument("--size", type=measure.parse_size, metavar="HxW", help="in pixels (default: the model's)")
    line.add_argument("--frames", type=measure.positive, help="4n+1 (default: the model's)")
    line.add_argument("--dtype", choices=sorted(measure.POLICIES), default="bfloat16", help="of the encoders")
    line.add_argument("--out", type=Path, required=True, help="folder of clips; those that are there are left alone")
    return line


def run(args: argparse.Namespace) -> None:
    """The command, with its arguments parsed.

    Raises:
      ValueError, OSError: what a user can mend.
    """
    model = checkpoint.load(args.model, args.dtype, policy="stage")
    device = jax.devices()[0]
    config = model.config.for_platform(device.platform, device.device_kind)
    given = {name: value for name in ("size", "frames") if (value := getattr(args, name)) is not None}
    plan = Plan.of(config, Settings.of(config, **given), platform=device.platform)
    data = videos(args.videos, plan.settings.frames, args.captions)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / EMPTY).is_file():
        text, _ = pipeline.encode_texts(model, plan, [""])
        _write(args.out / EMPTY, {"text": np.asarray(text, np.float32)[0]})
    lacking = [item for item in data.items if not (args.out / f"{item.id}.npz").is_file()]
    for first in range(0, len(lacking), GROUP):
        group = lacking[first : first + GROUP]
        encode(model, plan, group, args.out)
        print(f"{first + len(group)} of {len(lacking)} clips", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    return measure.checked(line, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
