"""The decoder's best: the VAE in torch is the model's, latents start at the encoder's and get better; bad input."""

import json

import numpy as np
import pytest
import torch
from nano import write_model

from benchmarks.tiny import best_latents, evaluate, limits, torch_vae
from benchmarks.tiny.clips import clip
from benchmarks.tiny.train_vae import to_tensor
from wanjax import checkpoint


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(1)
    return torch_vae.new_vae().requires_grad_(False)


def videos(count):
    return np.stack([clip(seed, "heldout", frames=5, size=16).video for seed in range(count)])


def test_the_vae_in_torch_is_the_models(tmp_path, uncompiled):
    model, truth = checkpoint.load(write_model(tmp_path / "nano")), videos(2)
    own = torch_vae.as_torch(model)
    with torch.no_grad():
        made = best_latents.to_video(torch_vae.decode(own, torch_vae.encode(own, to_tensor(truth))[0]))
    assert np.abs(made.astype(int) - evaluate.reconstruct(model, truth)).max() <= 1


def test_pixels_there_and_back():
    truth = videos(1)
    np.testing.assert_array_equal(best_latents.to_video(to_tensor(truth)), truth)
    assert best_latents.to_video(torch.full((1, 3, 1, 1, 1), 7.0)).max() == 255


def test_latents_start_at_the_encoders_and_get_better(vae, uncompiled):
    truth = videos(1)
    seen, far = best_latents.improve(vae, truth, steps=4, checks=2)
    assert list(seen) == [0, 2, 4] and far > 0
    with torch.no_grad():
        first = torch_vae.decode(vae, torch_vae.encode(vae, to_tensor(truth))[0])
    np.testing.assert_array_equal(seen[0], best_latents.to_video(first))
    quality = [evaluate.psnr(made, truth).mean() for made in seen.values()]
    assert quality[0] < quality[1] < quality[2]


def test_the_report(tmp_path, monkeypatch):
    """Clips go through in parts; each step's figures are of all of them."""
    monkeypatch.setattr(torch_vae, "as_torch", lambda model: torch_vae.new_vae())
    monkeypatch.setattr(best_latents, "improve", lambda vae, part, steps: ({0: part // 2, steps: part}, len(part)))
    monkeypatch.setattr(best_latents.shapes, "learn", lambda: (None, {"right": 1.0}))
    monkeypatch.setattr(limits, "figures", lambda made, clips, judge: {
        "clips": len(clips), "same": float((made == np.stack([one.video for one in clips])).all())})  # fmt: skip
    out = tmp_path / "best.json"
    assert best_latents.main(["--clips", "11", "--steps", "4", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["by_steps"] == {"0": {"clips": 11, "same": 0}, "4": {"clips": 11, "same": 1}}
    assert report["moved"] == (8 + 3) / 2


BAD = [["--model", "nowhere"], ["--clips", "0"], ["--steps", "0"], ["--classifier", "nowhere"],
       ["--out", "nowhere/it.json"]]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD, ids=str)
def test_bad_arguments_are_one_line(arguments, capsys, monkeypatch):
    monkeypatch.setattr(best_latents, "improve", lambda *_: pytest.fail("computing began"))
    with pytest.raises(SystemExit) as stop:
        best_latents.main(arguments)
    assert stop.value.code == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "error:" in line]) == 1
