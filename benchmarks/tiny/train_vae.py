"""Train the tiny model's causal video VAE in torch, on `diffusers`' AutoencoderKLWan.

XLA trains convolutions several times slower than torch on a CPU, so this one stage uses torch; the weights are
written in the diffusers layout and come into wanjax through `convert/`. Two stages: single frames first, which
teaches shapes and colours quickly, then whole clips after every temporal kernel was set to pass the present
frame through.

    python -m benchmarks.tiny.train_vae --out runs/vae --minutes 33
    python -m benchmarks.tiny.train_vae --from-model tiny --out runs/better --minutes 40    # go on with a model's VAE

Axis letters as in `torch_vae`; torch tensors here are channels first.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from benchmarks.tiny.clips import clip
from benchmarks.tiny.latents import VARIETIES, training_clip
from benchmarks.tiny.torch_vae import as_torch, decode, encode, inflate, new_vae
from wanjax import checkpoint, writing

FRAMES = 25
KL_WEIGHT = 3e-5
SQUARED_WEIGHT = 30.0  # at 2 the absolute term rules, and flat background pixels with it


@dataclass(frozen=True)
class Stage:
    """Settings of one of the two stages; lengths and batch sizes go together."""

    learning_rate: float
    lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    warmup: int


IMAGES = Stage(2e-3, (1,), (24,), 50)
CLIPS = Stage(5e-4, (25, 17, 9), (4, 5, 8), 100)


def to_tensor(videos: np.ndarray) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] to float32 [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


class ClipBank:
    """Draws training batches from clips rendered once, of every variety alike; a small share is replaced as training
    goes on."""

    def __init__(self, size: int, seed: int):
        self._rng = np.random.default_rng(seed)
        self._next = size
        self._videos = np.stack([self._draw(i) for i in range(size)])

    def _draw(self, number: int) -> np.ndarray:
        # By thirds, as the number modulo 7 or 28 says what "challenges" draws.
        return training_clip(number // 3, VARIETIES[number % 3], FRAMES).video

    def batch(self, count: int, length: int) -> torch.Tensor:
        rows = self._rng.integers(len(self._videos), size=count)
        starts = self._rng.integers(FRAMES - length + 1, size=count)
        picked = np.stack([self._videos[r, s : s + length] for r, s in zip(rows, starts, strict=True)])
        if self._rng.random() < 0.5:
            self._videos[rows[0]] = self._draw(self._next)
            self._next += 1
        return to_tensor(picked)


def loss_of(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """L1 + 30 MSE + a small KL term, means over pixels and over latent elements."""
    mean, log_variance = (part.float() for part in encode(vae, video))
    latents = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
    error = decode(vae, latents).float() - video
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    return error.abs().mean() + SQUARED_WEIGHT * error.square().mean() + KL_WEIGHT * kl


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, videos: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """Reconstruct from the latent mean.

    Returns:
      PSNR in dB per frame index [T] (mean over clips of each clip's own) and the reconstructions in [-1, 1].
    """
    outputs, psnr = [], []
    for start in range(0, len(videos), 8):
        video = to_tensor(videos[start : start + 8])
        output = decode(vae, encode(vae, video)[0]).clamp(-1, 1)
        error = (output - video).square().mean(dim=(1, 3, 4)) / 4.0
        psnr.append(-10.0 * torch.log10(error.clamp_min(1e-10)))
        outputs.append(output)
    return torch.cat(psnr).mean(0).numpy(), torch.cat(outputs)


def save_sheet(videos: np.ndarray, outputs: torch.Tensor, path: Path) -> None:
    """Originals over reconstructions, every fourth frame, enlarged three times."""
    made = ((outputs + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
    rows = []
    for original, output in zip(videos[:8], made[:8], strict=True):
        rows += [np.concatenate(list(v[::4]), axis=1) for v in (original, output)]
    sheet = np.concatenate(rows).repeat(3, 0).repeat(3, 1)
    Image.fromarray(sheet).save(path)


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, clips: int = 512) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel of the encoder's mean over training clips."""
    videos = np.stack([clip(i, "train", FRAMES).video for i in range(clips)])
    means = torch.cat([encode(vae, to_tensor(videos[i : i + 8]))[0] for i in range(0, clips, 8)])
    return means.mean(dim=(0, 2, 3, 4)).tolist(), means.std(dim=(0, 2, 3, 4)).tolist()


@dataclass
class Trainer:
    """State of a run; wall-clock time, not steps, drives the schedule, so that a slow machine ends in time too."""

    vae: AutoencoderKLWan
    average: AutoencoderKLWan
    optimiser: torch.optim.Optimizer
    clips: Stage = CLIPS
    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    decoder_only: bool = False

    @classmethod
    def new(cls) -> Trainer:
        vae, average = new_vae(), new_vae()
        average.load_state_dict(vae.state_dict())
        return cls(vae, average, cls._optimiser(vae))

    @classmethod
    def of(cls, vae: AutoencoderKLWan, decoder_only: bool) -> Trainer:
        """Go on with a VAE's weights, on clips.

        Args:
          decoder_only: leave the encoder, so that latents, and what was trained on them, stay valid.
        """
        trainer = cls(vae, copy.deepcopy(vae), cls._optimiser(vae), stage=1)
        if decoder_only:
            trainer._freeze_encoder()
        return trainer

    @staticmethod
    def _optimiser(vae: AutoencoderKLWan) -> torch.optim.Optimizer:
        trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def start_clips(self) -> None:
        """Go on from images to clips with fresh optimiser moments."""
        self.vae.load_state_dict(self.average.state_dict())
        inflate(self.vae)
        self.average.load_state_dict(self.vae.state_dict())
        self.optimiser = self._optimiser(self.vae)
        self.stage, self.step, self.seconds = 1, 0, 0.0

    def _freeze_encoder(self) -> None:
        for part in (self.vae.encoder, self.vae.quant_conv):
            part.requires_grad_(False)
        self.optimiser = self._optimiser(self.vae)
        self.decoder_only = True

    def update(self, bank: ClipBank, total_seconds: float, bfloat16: bool) -> float:
        """One step; `total_seconds` is the length of the present stage, `bfloat16` that of convolutions."""
        stage = (IMAGES, self.clips)[self.stage]
        began = time.monotonic()
        done = min(1.0, self.seconds / total_seconds)
        rate = stage.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in self.optimiser.param_groups:
            group["lr"] = rate * min(1.0, (self.step + 1) / stage.warmup)
        pick = (0, 1, 0, 2)[self.step % 4] if self.stage else 0
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = loss_of(self.vae, bank.batch(stage.batch_sizes[pick], stage.lengths[pick]))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimiser.step()
        decay = min(0.995, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.vae.parameters()), 1.0 - decay)
        self.step += 1
        self.seconds += time.monotonic() - began
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all, in the place of an earlier one."""
        state = {
            "vae": self.vae.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": [self.stage, self.step, self.seconds],
            "decoder_only": self.decoder_only,
        }
        content = io.BytesIO()
        torch.save(state, content)
        writing.write_bytes(path, content.getvalue(), overwrite=True, anything=True)

    def load(self, path: Path, decoder_only: bool = False) -> None:
        """Continue from a checkpoint written by `save`.

        Args:
          decoder_only: whether it is meant to be one of the decoder alone.

        Raises:
          ValueError: no such file, or one of encoder and decoder where the decoder alone was meant.
        """
        if not path.is_file():
            raise ValueError(f"--resume: there is no checkpoint at {path}; leave --resume out to start anew")
        state = torch.load(path, weights_only=True)
        if decoder_only and not state.get("decoder_only", False):
            raise ValueError(f"--decoder-only: {path} trains the encoder too; leave the option out, or begin anew")
        if state["progress"][0] == 1 and self.stage == 0:
            self.start_clips()
        if state.get("decoder_only", False):
            self._freeze_encoder()
        self.vae.load_state_dict(state["vae"])
        self.average.load_state_dict(state["average"])
        self.stage, self.step, self.seconds = state["progress"]
        self.optimiser.load_state_dict(state["optimiser"])


def train(trainer: Trainer, out: Path, minutes: float, image_minutes: float, bank: ClipBank, bfloat16: bool) -> None:
    """Run both stages to their end, with a checkpoint, a measurement and a sheet every two minutes."""
    heldout = np.stack([clip(i, "heldout", FRAMES).video for i in range(48)])
    durations = (image_minutes * 60, (minutes - image_minutes) * 60)
    last, recent = time.monotonic(), []
    while True:
        if trainer.seconds >= durations[trainer.stage]:
            if trainer.stage == 1:
                break
            trainer.start_clips()
        recent.append(trainer.update(bank, durations[trainer.stage], bfloat16))
        if not math.isfinite(recent[-1]):
            raise FloatingPointError(f"the loss is {recent[-1]} at step {trainer.step}; resume with a lower rate")
        if time.monotonic() - last > 120 or len(recent) == 20 and trainer.step == 20:
            length = FRAMES if trainer.stage else 1
            psnr, outputs = evaluate(trainer.average, heldout[:, :length])
            save_sheet(heldout[:, :length], outputs, out / "sheet.png")
            trainer.save(out / "checkpoint.pt")
            print(
                f"stage {trainer.stage} step {trainer.step} {trainer.seconds / 60:.1f} min loss "
                f"{np.mean(recent):.4f} held-out PSNR {psnr.mean():.2f} dB, worst frame {psnr.min():.2f} dB",
                flush=True,
            )
            last, recent = time.monotonic(), []
    trainer.save(out / "checkpoint.pt")


def finish(vae: AutoencoderKLWan, out: Path) -> None:
    """Write DIR/vae in the diffusers layout with its latent statistics, and DIR/vae.json with the held-out PSNR."""
    mean, std = latent_statistics(vae)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    heldout = np.stack([clip(i, "heldout", FRAMES).video for i in range(256)])
    psnr, outputs = evaluate(vae, heldout)
    save_sheet(heldout, outputs, out / "sheet.png")
    with writing.beside(out / "vae", folder=True) as part:
        vae.save_pretrained(part, safe_serialization=True)
    figures = {"psnr_mean": float(psnr.mean()), "psnr_worst_frame": float(psnr.min()), "psnr": psnr.tolist()}
    (out / "vae.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"256 held-out clips: PSNR {psnr.mean():.2f} dB, worst frame {psnr.min():.2f} dB", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the VAE of the tiny model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and results")
    parser.add_argument("--minutes", type=float, default=33.0, help="length of both stages (default %(default)s)")
    parser.add_argument("--image-minutes", type=float, default=7.0, help="of which images (default %(default)s)")
    parser.add_argument("--clip-rate", type=float, default=CLIPS.learning_rate, help="peak learning rate on clips "
                        "(default %(default)s)")  # fmt: skip
    parser.add_argument("--float32", action="store_true", help="no bfloat16 in training: for older processors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--from-model", metavar="MODEL", help="'tiny' or a model folder: go on with its VAE, on clips, "
                        "for --minutes less --image-minutes")  # fmt: skip
    parser.add_argument("--decoder-only", action="store_true", help="with --from-model: leave the encoder, so that "
                        "latents stay what they are")  # fmt: skip
    options = parser.parse_args(arguments)
    if (options.out / "vae").exists():
        parser.error(f"--out: {options.out / 'vae'} exists already; choose another folder or move it away")
    if options.decoder_only and options.from_model is None:
        parser.error("--decoder-only: give --from-model, whose encoder stays")
    try:
        earlier = None if options.from_model is None else checkpoint.load(options.from_model)
    except (ValueError, OSError) as error:
        parser.error(f"--from-model: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    trainer = Trainer.new() if earlier is None else Trainer.of(as_torch(earlier), options.decoder_only)
    trainer.clips = dataclasses.replace(CLIPS, learning_rate=options.clip_rate)
    if options.resume:
        if not (options.out / "checkpoint.pt").is_file():
            parser.error(f"--resume: there is no checkpoint.pt in {options.out}")
        try:
            trainer.load(options.out / "checkpoint.pt", options.decoder_only)
        except ValueError as error:
            parser.error(str(error))
    bank = ClipBank(4096, seed=trainer.step + 1)
    train(trainer, options.out, options.minutes, options.image_minutes, bank, not options.float32)
    finish(trainer.average, options.out)


if __name__ == "__main__":
    main()
