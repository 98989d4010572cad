"""The tiny VAE in torch: its whole-sequence form against diffusers' chunked one, and inflation."""

import numpy as np
import pytest
import torch

from benchmarks.tiny import torch_vae
from benchmarks.tiny.clips import clip
from benchmarks.tiny.train_vae import to_tensor


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def shaken_vae() -> torch_vae.AutoencoderKLWan:
    torch.manual_seed(1)
    vae = torch_vae.new_vae()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return vae


def videos(count: int, frames: int) -> torch.Tensor:
    return to_tensor(np.stack([clip(seed, frames=frames).video for seed in range(count)]))


@pytest.mark.parametrize("frames", [5, 9, pytest.param(25, marks=pytest.mark.slow)])
@torch.no_grad()
def test_whole_sequence_equals_chunks(uncompiled, frames):
    vae, video = shaken_vae(), videos(2, frames)
    mean, log_variance = torch_vae.encode(vae, video)
    theirs = vae.encode(video).latent_dist
    assert relative(mean, theirs.mean) < 1e-5
    assert relative(log_variance, theirs.logvar) < 1e-5
    decoded = torch_vae.decode(vae, mean).clamp(-1, 1)
    assert relative(decoded, vae.decode(mean).sample) < 1e-5


@torch.no_grad()
def test_a_single_frame_equals_chunks(uncompiled):
    vae, image = shaken_vae(), videos(2, 5)[:, :, :1]
    mean, _ = torch_vae.encode(vae, image)
    assert relative(mean, vae.encode(image).latent_dist.mean) < 1e-5
    assert relative(torch_vae.decode(vae, mean).clamp(-1, 1), vae.decode(mean).sample) < 1e-5


@torch.no_grad()
def test_an_inflated_vae_codes_frames_alone(uncompiled):
    vae = shaken_vae()
    video = videos(1, 9)
    alone = torch_vae.decode(vae, torch_vae.encode(vae, video[:, :, [4]])[0])
    torch_vae.inflate(vae)
    coded = torch_vae.decode(vae, torch_vae.encode(vae, video)[0])
    # Latent 1 sees frame 4, the last of its group, and is shown in frames 1 to 4.
    for frame in (1, 2, 3, 4):
        assert relative(coded[:, :, [frame]], alone) < 1e-5
