"""Training of the tiny VAE: steps, resume, and what its command refuses."""

import re

import numpy as np
import pytest
import torch

from benchmarks.tiny import train_vae
from benchmarks.tiny.clips import clip


def videos(count: int, frames: int) -> torch.Tensor:
    return train_vae.to_tensor(np.stack([clip(seed, frames=frames).video for seed in range(count)]))


@pytest.mark.slow
def test_steps_lower_the_loss_and_resume_exactly(uncompiled, tmp_path):
    torch.manual_seed(0)
    trainer, bank = train_vae.Trainer.new(), train_vae.ClipBank(8, seed=1)
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
        results.append(one.update(train_vae.ClipBank(4, seed=2), 1e9, bfloat16=False))
        results.append(next(iter(one.average.parameters())).detach().sum().item())
    assert results[:2] == pytest.approx(results[2:], rel=1e-6)


@pytest.mark.slow
def test_clips_stage_uses_every_length(uncompiled):
    torch.manual_seed(0)
    trainer, bank = train_vae.Trainer.new(), train_vae.ClipBank(8, seed=1)
    trainer.start_clips()
    trainer.clips = train_vae.Stage(1e-4, (9, 5, 1), (1, 1, 1), 1)
    before = [parameter.clone() for parameter in trainer.vae.parameters()]
    assert all(np.isfinite(trainer.update(bank, 1e9, bfloat16=True)) for _ in range(4))
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.vae.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.slow
@pytest.mark.parametrize("decoder_only", [True, False])
def test_going_on_from_a_vae(uncompiled, tmp_path, decoder_only):
    """Every part moves; of the decoder alone the encoder stays, bit for bit, also after a resume."""
    torch.manual_seed(0)
    start, bank = train_vae.new_vae(), train_vae.ClipBank(8, seed=1)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    trainer = train_vae.Trainer.of(start, decoder_only)
    trainer.clips = train_vae.Stage(1e-4, (5, 1, 1), (1, 1, 1), 1)
    trainer.update(bank, 1e9, bfloat16=False)
    trainer.save(tmp_path / "checkpoint.pt")
    other = train_vae.Trainer.new()
    other.load(tmp_path / "checkpoint.pt")
    other.clips = trainer.clips
    other.update(bank, 1e9, bfloat16=False)
    assert other.stage == 1 and other.step == 2
    if not decoder_only:
        with pytest.raises(ValueError, match="--decoder-only: .*trains the encoder too"):
            train_vae.Trainer.new().load(tmp_path / "checkpoint.pt", decoder_only=True)
    for weights in (other.vae.state_dict(), other.average.state_dict()):
        for name, value in weights.items():
            encoder = name.startswith(("encoder", "quant_conv"))
            assert torch.equal(value, before[name]) == (encoder and decoder_only), name


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--decoder-only"], "--decoder-only: give --from-model"),
        (["--from-model", "missing"], "--from-model: .*missing"),
    ],
)
def test_what_to_go_on_from(tmp_path, arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_vae.main(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2 and re.search(told, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out").exists()


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
