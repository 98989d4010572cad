"""The DiT's training set: clips as latents, computed once by the trained VAE and kept in files.

Axis letters as in `wanjax.types`; N clips, each seen in V = 2 ways: by its two ends, and by keyframes drawn at random.
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
VARIETIES = ("plain", "rich", "challenges")
STARS = (28, (7, 14))
"""Of so many "challenges" clips by number, which show stars: every fourth plain one."""
DRAWN = (
    (0.25, (True, 0, False)),
    (0.10, (False, 0, True)),
    (0.10, (False, 1, False)),
    (0.30, (True, 1, True)),
    (0.10, (True, 2, True)),
    (0.075, (True, 1, False)),
    (0.075, (False, 1, True)),
)
"""Which keyframes the second view of a clip has: share, (first, inner ones, last)."""


def training_clip(number: int, variety: str, frames: int) -> Clip | ChallengeClip:
    """Training clip `number` of a variety: "challenges" are all six categories and two plain clips in seven, some
    of stars.

    Clips of another length than 25 tell other stories, so that training on several lengths sees more of them.
    """
    seed = number if frames == 25 else number + 1_000_000 * frames
    if variety == "challenges" and number % 7 >= 2:
        return challenge(seed, "train", frames)
    star = variety == "challenges" and number % STARS[0] in STARS[1]
    return clip(seed, "train", frames, rich=variety == "rich", shape="star" if star else None)


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
      condition: [N, V, F, h, w, 16], of the video that holds a view's keyframes.
      given: float32 [N, V, F, temporal_stride], the mask of them.
      images: uint8 [N, V, 2, H, W, 3], those that the vision tower sees.
      seen: bool [N, V, 2], which of these are there.
      captions: N strings.
    """

    latents: np.ndarray
    condition: np.ndarray
    given: np.ndarray
    images: np.ndarray
    seen: np.ndarray
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


def drawn_places(rng: np.random.Generator, frames: int) -> tuple[int, ...]:
    """Pixel frames of a clip's keyframes in its second view, as the shares of DRAWN have it; never none."""
    shares, kinds = zip(*DRAWN, strict=True)
    first, inner, last = kinds[rng.choice(len(kinds), p=shares)]
    inside = rng.choice(np.arange(1, frames - 1), size=inner, replace=False)
    return (*[0] * first, *sorted(map(int, inside)), *[frames - 1] * last)


def image_places(at: tuple[int, ...], frames: int) -> tuple[int | None, int | None]:
    """Which of a first-and-last-frame model's two images shows which pixel frame, as the pipeline has it: the outermost
    keyframes, and a single one in the nearer place."""
    if len(at) > 1:
        return at[0], at[-1]
    return (at[0], None) if at[0] <= (frames - 1) / 2 else (None, at[0])


def _view(video: np.ndarray, at: tuple[int, ...], stride: int) -> dict[str, np.ndarray]:
    """One clip seen by its keyframes `at`: the video that the VAE encodes, mask, images, which of them are there."""
    frames = len(video)
    told = conditioning.keyframe_video(keyframes.to_unit(video[None, list(at)]), at, frames)[0]
    places = image_places(at, frames)
    images = np.stack([np.zeros_like(video[0]) if place is None else video[place] for place in places])
    seen = np.array([place is not None for place in places])
    return {"condition": np.asarray(told), "given": np.asarray(conditioning.mask(frames, stride, at)),
            "images": images, "seen": seen}  # fmt: skip


def _shard(encode: Encoder, index: int, variety: str, frames: int, stride: int) -> dict[str, np.ndarray]:
    numbers = range(index * SHARD, (index + 1) * SHARD)
    drawn = [training_clip(number, variety, frames) for number in numbers]
    rngs = [np.random.default_rng([number, frames, 1]) for number in numbers]
    views = [
        [_view(one.video, at, stride) for at in ((0, frames - 1), drawn_places(rng, frames))]
        for one, rng in zip(drawn, rngs, strict=True)
    ]
    stacked = {name: np.array([[view[name] for view in pair] for pair in views]) for name in views[0][0]}
    told = stacked["condition"]
    condition = _encode_all(encode, told.reshape(-1, *told.shape[2:]))
    return stacked | {
        "latents": _encode_all(encode, keyframes.to_unit(np.stack([one.video for one in drawn]))),
        "condition": condition.reshape(*told.shape[:2], *condition.shape[1:]),
        "captions": np.array([one.caption for one in drawn]),
    }


def build(
    vae_folder: Path, encode: Encoder, folder: Path, clips: int, variety: str, frames: int, stride: int = 4
) -> LatentSet:
    """Computes what `folder` lacks, shard by shard, and loads it all.

    Args:
      vae_folder, encode: the VAE's files, and what `encoder` made of them.
      folder: of shards; belongs to one VAE, variety and length.
      clips: at least this many (whole shards).
      variety: a name in VARIETIES.
      frames: length of the clips.
      stride: the VAE's temporal one.

    Raises:
      ValueError: the folder belongs to another VAE, variety or length.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((vae_folder / WEIGHTS).read_bytes()).hexdigest()
    origin = json.dumps({"vae": digest, "variety": variety, "frames": frames, "drawn": DRAWN, "stars": STARS})
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
                np.savez(part, **_shard(encode, index, variety, frames, stride))
        with np.load(file) as stored:
            shards.append({name: stored[name] for name in stored.files})
    joined = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    return LatentSet(**joined | {"captions": [str(text) for text in joined["captions"]]})
