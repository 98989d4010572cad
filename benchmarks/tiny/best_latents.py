"""What the VAE's decoder could give if its latents were the best there are: whether encoder or decoder limits it.

    python -m benchmarks.tiny.best_latents --clips 16 --out benchmarks/results/best_latents_tiny.json

Each clip's latents, at first the encoder's, are moved down the gradient of the decoder's squared error. No encoder can
do better with this decoder; how near the encoder comes is what training it further could win. In torch, which takes
gradients of convolutions several times faster than XLA on a CPU.

Axis letters: N clips, T frames, H height, W width; torch tensors are channels first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from benchmarks import measure
from benchmarks.tiny import evaluate, limits, shapes, torch_vae
from benchmarks.tiny.train_vae import to_tensor
from wanjax import checkpoint

BATCH = 8
RATE = 0.05  # of Adam, in units of the latents, which spread by 1.5 to 4
CHECKS = 4  # measured so many times on the way


def to_video(made: torch.Tensor) -> np.ndarray:
    """float [B, 3, T, H, W] in -1..1 to uint8 [B, T, H, W, 3]."""
    return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def improve(
    vae: AutoencoderKLWan, videos: np.ndarray, steps: int, checks: int = CHECKS
) -> tuple[dict[int, np.ndarray], float]:
    """What the decoder shows of videos uint8 [N, T, H, W, 3] as their latents get better.

    Returns:
      the videos by steps taken, from 0 (the encoder's latents) to `steps`, and how far latents went, root mean square.
    """
    video = to_tensor(videos)
    with torch.no_grad():
        first, _ = torch_vae.encode(vae, video)
    latents = first.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([latents], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    at, seen = {round(steps * share / checks) for share in range(checks + 1)}, {}
    for step in range(steps + 1):
        made = torch_vae.decode(vae, latents)
        if step in at:
            seen[step] = to_video(made.detach())
        if step < steps:
            optimiser.zero_grad()
            (made - video).square().mean().backward()
            optimiser.step()
            schedule.step()
    return seen, float((latents.detach() - first).square().mean().sqrt())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.tiny.best_latents", description=__doc__.split("\n")[0])
    p.add_argument("--model", default="tiny", help="'tiny' or a model folder (default %(default)s)")
    p.add_argument("--clips", type=measure.positive, default=16, help="held-out clips (default %(default)s)")
    p.add_argument("--steps", type=measure.positive, default=60, help="of the latents (default %(default)s)")
    p.add_argument("--classifier", type=Path, metavar="FILE", help="as benchmarks.tiny.shapes keeps it (else: learn)")
    p.add_argument("--out", type=measure.output, metavar="JSON", help="report to write")
    return p


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring. Returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    measure.backend(line)
    try:
        model = checkpoint.load(args.model)
        clips = evaluate.heldout(args.clips, frames=model.config.sampling.frames)
        earlier = shapes.kept(args.classifier) if args.classifier is not None else None
    except (ValueError, OSError) as error:
        line.error(str(error))

    def measured() -> bool:
        judge, classifier = earlier or shapes.learn()
        vae, truth = torch_vae.as_torch(model).requires_grad_(False), np.stack([one.video for one in clips])
        parts, moved = [], []
        for start in range(0, len(truth), BATCH):
            seen, far = improve(vae, truth[start : start + BATCH], args.steps)
            parts.append(seen)
            moved.append(far)
            print(f"{start + len(next(iter(seen.values())))} of {len(truth)} clips", flush=True)
        made = {step: np.concatenate([part[step] for part in parts]) for step in parts[0]}
        report: dict[str, Any] = {
            "model": model.config.name, "clips": len(clips), "rate": RATE, "moved": float(np.mean(moved)),
            "by_steps": {str(step): limits.figures(videos, clips, judge) for step, videos in made.items()},
            "classifier": classifier, "environment": measure.environment(),
        }  # fmt: skip
        names = list(report["by_steps"]["0"])
        rows = [[step, *(f"{one[name]:.2f}" for name in names)] for step, one in report["by_steps"].items()]
        measure.print_table(["steps", *names], rows)
        measure.write(args.out, report)
        return True

    return measure.guarded(line, measured)


if __name__ == "__main__":
    raise SystemExit(main())
