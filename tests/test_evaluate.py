"""Figures of the evaluation, on arrays whose answers are known."""

import dataclasses

import numpy as np
import pytest
from nano import NANO, write_model

from benchmarks.tiny import evaluate
from benchmarks.tiny.clips import clip
from wanjax import checkpoint


def test_psnr_of_known_errors():
    truth = np.full((2, 3, 4, 4, 3), 100, np.uint8)
    made = truth.copy()
    made[0] += 10
    made[1, :, :2] += 20
    np.testing.assert_allclose(evaluate.psnr(made, truth)[0], 20 * np.log10(25.5), rtol=1e-9)
    np.testing.assert_allclose(evaluate.psnr(made, truth)[1], 10 * np.log10(255**2 / 200), rtol=1e-9)
    region = np.zeros((2, 4, 4), bool)
    region[:, :1] = True
    np.testing.assert_allclose(evaluate.psnr(made, truth, region)[1], 20 * np.log10(255 / 20), rtol=1e-9)


def test_equal_videos_have_a_finite_psnr():
    truth = np.zeros((1, 2, 4, 4, 3), np.uint8)
    assert 70 < evaluate.psnr(truth, truth)[0] < 100


def test_baselines_keep_the_keyframes():
    truth = np.stack([clip(seed).video for seed in range(2)])
    simple = evaluate.baselines(truth)
    for made in simple.values():
        np.testing.assert_array_equal(made[:, [0, -1]], truth[:, [0, -1]])
    np.testing.assert_array_equal(simple["nearest"][:, 11], truth[:, 0])
    np.testing.assert_array_equal(simple["nearest"][:, 13], truth[:, -1])
    middle = (truth[:, 0].astype(float) + truth[:, -1]) / 2
    assert np.abs(simple["crossfade"][:, 12] - middle).max() <= 0.5


def test_held_out_clips_are_the_held_out_ones():
    assert evaluate.heldout(3)[2].caption == clip(2, "heldout").caption
    with pytest.raises(ValueError, match="split"):
        clip(0, "valid")


@pytest.mark.slow
def test_measure_runs_the_model(tmp_path):
    """Random weights lose to a cross-fade, and an untold model's caption gain is what the videos say."""
    config = dataclasses.replace(NANO, dit=dataclasses.replace(NANO.dit, text_length=32))
    model = checkpoint.load(write_model(tmp_path / "nano", config))
    clips = [clip(seed, "heldout", frames=5, size=16) for seed in (0, 3)]
    settings = evaluate.Settings.of(model.config, frames=5, size=(16, 16), steps=1, guidance=1.0)
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate.Settings, "of", classmethod(lambda cls, config, **changes: settings))
    with patch.context():
        figures = evaluate.measure(model, clips, guidance=(1.0,), steps=1, sheet=tmp_path / "sheet.png")
    patch.undo()
    assert figures["guidance_1_wins"] == 0 and figures["guidance_1_interior"] < figures["crossfade_interior"]
    assert all(np.isfinite(value) for value in figures.values())
    assert (tmp_path / "sheet.png").stat().st_size > 0


BAD = [["--model", "nowhere"], ["--clips", "0"], ["--clips", "x"], ["--steps", "0"], ["--solver", "heun"],
       ["--guidance", "nan"], ["--out", "nowhere/figures.json"], ["--sheet", "nowhere/sheet.png"]]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD, ids=str)
def test_bad_arguments_are_one_line(arguments, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", lambda *_: pytest.fail("computing began"))
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "error:" in line]) == 1
