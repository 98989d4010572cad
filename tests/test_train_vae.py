"""Training code of the tiny VAE: its whole-sequence form against diffusers' chunked one, inflation, resume."""

import numpy as np
import pytest
import torch

from wanjax.tiny import train_vae
from wanjax.tiny.clips import clip


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def shaken_vae() -> train_vae.AutoencoderKLWan:
    torch.manual_seed(1)
    vae = train_vae.new_vae()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return vae


def videos(count: int, frames: int) -> torch.Tensor:
    return train_vae.to_tensor(np.stack([clip(seed, frames=frames).video for seed in range(count)]))


@pytest.fixture
def uncompiled(monkeypatch):
    """The fused kernel is the same function; compiling it would only cost time."""
    monkeypatch.setattr(train_vae, "_fused_norm_silu", lambda: train_vae.norm_silu)


@pytest.mark.parametrize("frames", [5, 9, 25])
@torch.no_grad()
def test_whole_sequence_equals_chunks(uncompiled, frames):
    vae, video = shaken_vae(), videos(2, frames)
    mean, log_variance = train_vae.encode(vae, video)
    theirs = vae.encode(video).latent_dist
    assert relative(mean, theirs.mean) < 1e-5
    assert relative(log_variance, theirs.logvar) < 1e-5
    decoded = train_vae.decode(vae, mean).clamp(-1, 1)
    assert relative(decoded, vae.decode(mean).sample) < 1e-5


@torch.no_grad()
def test_a_single_frame_equals_chunks(uncompiled):
    vae, image = shaken_vae(), videos(2, 5)[:, :, :1]
    mean, _ = train_vae.encode(vae, image)
    assert relative(mean, vae.encode(image).latent_dist.mean) < 1e-5
    assert relative(train_vae.decode(vae, mean).clamp(-1, 1), vae.decode(mean).sample) < 1e-5


@torch.no_grad()
def test_an_inflated_vae_codes_frames_alone(uncompiled):
    vae = shaken_vae()
    video = videos(1, 9)
    alone = train_vae.decode(vae, train_vae.encode(vae, video[:, :, [4]])[0])
    train_vae.inflate(vae)
    coded = train_vae.decode(vae, train_vae.encode(vae, video)[0])
    # Latent 1 sees frame 4, the last of its group, and is shown in frames 1 to 4.
    for frame in (1, 2, 3, 4):
        assert relative(coded[:, :, [frame]], alone) < 1e-5


def test_steps_lower_the_loss_and_resume_exactly(uncompiled, tmp_path):
    torch.manual_seed(0)
    trainer, bank = train_vae.Trainer.new(), train_vae.ClipBank(8, 0.25, seed=1)
    losses = [trainer.update(bank, 1e9, bfloat16=False) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save(tmp_path / "checkpoint.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    other = train_vae.Trainer.new()
    other.load(tmp_path / "checkpoint.pt")
    assert (other.stage, other.step, other.seconds) == (trainer.stage, trainer.step, trainer.seconds)
    results = []
    for one in (trainer, other):
        torch.manual_seed(3)
        results.append(one.update(train_vae.ClipBank(4, 0.0, seed=2), 1e9, bfloat16=False))
        results.append(next(iter(one.average.parameters())).detach().sum().item())
    assert results[:2] == pytest.approx(results[2:], rel=1e-6)


def test_clips_stage_uses_every_length(uncompiled):
    torch.manual_seed(0)
    trainer, bank = train_vae.Trainer.new(), train_vae.ClipBank(8, 0.0, seed=1)
    trainer.start_clips()
    trainer.clips = train_vae.Stage(1e-4, (9, 5, 1), (1, 1, 1), 1)
    before = [parameter.clone() for parameter in trainer.vae.parameters()]
    assert all(np.isfinite(trainer.update(bank, 1e9, bfloat16=True)) for _ in range(4))
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.vae.parameters(), strict=True)]
    assert all(moved)


def test_decoder_alone_leaves_the_latents(uncompiled, tmp_path):
    """The encoder stays what the average was, bit for bit, also after a resume; the decoder moves."""
    torch.manual_seed(0)
    trainer, bank = train_vae.Trainer.new(), train_vae.ClipBank(8, 0.0, seed=1)
    trainer.update(bank, 1e9, bfloat16=False)
    before = {name: value.clone() for name, value in trainer.average.state_dict().items()}
    trainer.start_decoder()
    trainer.clips = train_vae.Stage(1e-4, (5, 1, 1), (1, 1, 1), 1)
    trainer.update(bank, 1e9, bfloat16=False)
    trainer.save(tmp_path / "checkpoint.pt")
    other = train_vae.Trainer.new()
    other.load(tmp_path / "checkpoint.pt")
    other.clips = trainer.clips
    other.update(bank, 1e9, bfloat16=False)
    for weights in (other.vae.state_dict(), other.average.state_dict()):
        for name, value in weights.items():
            encoder = name.startswith(("encoder", "quant_conv"))
            assert torch.equal(value, before[name]) == encoder, name


def test_resume_without_a_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_vae.main(["--out", str(tmp_path), "--resume"])
    assert "no checkpoint.pt" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no checkpoint"):
        train_vae.Trainer.new().load(tmp_path / "none.pt")


def test_existing_result_is_kept(tmp_path, capsys):
    (tmp_path / "vae").mkdir()
    with pytest.raises(SystemExit):
        train_vae.main(["--out", str(tmp_path)])
    assert "exists already" in capsys.readouterr().err
