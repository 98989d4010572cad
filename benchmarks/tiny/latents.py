"""The DiT's training set: clips as latents, computed once by the trained VAE and kept in files.

Axis letters as in `wanjax.types`; N clips, of which M have an image-to-video condition too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

import convert.vae
from benchmarks.tiny.challenges import ChallengeClip, challenge
from benchmarks.tiny.clips import Clip, clip
from convert import keymap
from wanjax import conditioning, keyframes, vae, writing
from wanjax.config import VAEConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARD = 480  # clips a file
BATCH = 16
Encoder = Callable[[np.ndarray], np.ndarray]
IMAGE_SHARE = 5  # one clip in this many can be trained on without its last keyframe
VARIETIES = ("plain", "rich", "challenges")


def training_clip(number: int, variety: str, frames: int) -> Clip | ChallengeClip:
    """Training clip `number` of a variety: "challenges" are all six categories and two plain clips in seven.

    Clips of another length than 25 tell other stories, so that training on several lengths sees more of them.
    """
    seed = number if frames == 25 else number + 1_000_000 * frames
    if variety == "challenges" and number % 7 >= 2:
        return challenge(seed, "train", frames)
    return clip(seed, "train", frames, rich=variety == "rich")


def load_vae(folder: Path, config: VAEConfig) -> tuple[VAEConfig, dict[str, Any]]:
    """Reads what `train_vae` wrote: the config with the measured latent statistics, and parameters.

    Args:
      folder: a VAE in the diffusers layout.
      config: sizes to expect.

    Raises:
      ValueError: files missing, or weights of other sizes.
    """
    files = folder / "config.json", folder / WEIGHTS
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file; run benchmarks.tiny.train_vae first and give its vae folder")
    stored = json.loads(files[0].read_text(encoding="utf-8"))
    config = dataclasses.replace(
        config, latent_mean=tuple(stored["latents_mean"]), latent_std=tuple(stored["latents_std"])
    )
    expected = jax.eval_shape(lambda key: vae.init(config, key), jax.random.key(0))
    return config, keymap.convert(convert.vae.diffusers(config), expected, load_file(files[1]))


def write_vae(folder: Path, config: VAEConfig, params: Any) -> None:
    """Writes a VAE in float32 as `load_vae` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = keymap.invert(convert.vae.diffusers(config), params)
    (folder / "config.json").write_text(json.dumps(convert.vae.diffusers_config(config), indent=1), encoding="utf-8")
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, folder / WEIGHTS)


@dataclass(frozen=True)
class LatentSet:
    """N clips ready for training. Latents are normalised and kept in float16.

    Attributes:
      latents: [N, F, h, w, 16].
      condition: [N, F, h, w, 16], of the video that holds both keyframes.
      image_condition: [M, F, h, w, 16], of the video that holds the first alone; for clips 0 .. M - 1.
      first, last: uint8 [N, H, W, 3].
      captions: N strings.
    """

    latents: np.ndarray
    condition: np.ndarray
    image_condition: np.ndarray
    first: np.ndarray
    last: np.ndarray
    captions: list[str]


def encoder(folder: Path, config: VAEConfig, params: Any) -> Encoder:
    """The VAE as a function of videos [B, T, H, W, 3] in [-1, 1], giving normalised float32 latents.

    On a CPU torch runs it, which is six times faster there at these sizes.
    """
    if jax.default_backend() != "cpu":
        run = jax.jit(lambda params, video: vae.encode(config, params, video))
        return lambda video: np.asarray(run(params, video))
    # Imported here: on accelerators this stage needs no torch.
    import torch

    from benchmarks.tiny import torch_vae

    model = torch_vae.AutoencoderKLWan.from_pretrained(folder)

    @torch.no_grad()
    def encode(video: np.ndarray) -> np.ndarray:
        mean, _ = torch_vae.encode(model, torch.tensor(video).permute(0, 4, 1, 2, 3))
        return (mean.permute(0, 2, 3, 4, 1).numpy() - config.latent_mean) / config.latent_std

    return encode


def _encode_all(encode: Encoder, videos: np.ndarray) -> np.ndarray:
    """float16 [N, F, h, w, 16], BATCH videos at a time."""
    parts = [encode(np.ascontiguousarray(videos[i : i + BATCH])) for i in range(0, len(videos), BATCH)]
    return np.concatenate(parts).astype(np.float16)


def _shard(encode: Encoder, index: int, variety: str, frames: int) -> dict[str, np.ndarray]:
    numbers = range(index * SHARD, (index + 1) * SHARD)
    drawn = [training_clip(number, variety, frames) for number in numbers]
    videos = np.stack([one.video for one in drawn])
    first, last = videos[:, 0], videos[:, -1]
    images = SHARD // IMAGE_SHARE
    ends = keyframes.to_unit(np.stack([first, last], 1))
    both = np.asarray(conditioning.keyframe_video(ends, (0, -1), frames))
    one = np.asarray(conditioning.keyframe_video(ends[:images, :1], (0,), frames))
    return {
        "latents": _encode_all(encode, keyframes.to_unit(videos)),
        "condition": _encode_all(encode, both),
        "image_condition": _encode_all(encode, one),
        "first": first,
        "last": last,
        "captions": np.array([one.caption for one in drawn]),
    }


def build(vae_folder: Path, encode: Encoder, folder: Path, clips: int, variety: str, frames: int) -> LatentSet:
    """Computes what `folder` lacks, shard by shard, and loads it all.

    Args:
      vae_folder, encode: the VAE's files, and what `encoder` made of them.
      folder: of shards; belongs to one VAE, variety and length.
      clips: at least this many (whole shards).
      variety: a name in VARIETIES.
      frames: length of the clips.

    Raises:
      ValueError: the folder belongs to another VAE, variety or length.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((vae_folder / WEIGHTS).read_bytes()).hexdigest()
    origin = json.dumps({"vae": digest, "variety": variety, "frames": frames})
    label = folder / "origin.json"
    if not label.exists():
        label.write_text(origin)
    if label.read_text() != origin:
        raise ValueError(f"{folder}: latents of another VAE, --variety or length; remove the folder")
    shards = []
    for index in tqdm(range(-(-clips // SHARD)), desc=f"latents, {frames} frames", unit="shard", mininterval=20):
        file = folder / f"{index:04d}.npz"
        if not file.exists():
            with writing.beside(file) as part:
                np.savez(part, **_shard(encode, index, variety, frames))
        with np.load(file) as stored:
            shards.append({name: stored[name] for name in stored.files})
    return _join(shards)


def _join(shards: list[dict[str, np.ndarray]]) -> LatentSet:
    """One set of all shards, the clips with an image-to-video condition first."""
    images = SHARD // IMAGE_SHARE

    def gather(name: str) -> np.ndarray:
        return np.concatenate([s[name][:images] for s in shards] + [s[name][images:] for s in shards])

    image_condition = np.concatenate([s["image_condition"] for s in shards])
    captions = [str(text) for text in gather("captions")]
    return LatentSet(gather("latents"), gather("condition"), image_condition, gather("first"), gather("last"),
                     captions)  # fmt: skip
