"""Figures of the evaluation, on arrays whose answers are known."""

import dataclasses
from types import SimpleNamespace

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


def test_baselines_between_more_keyframes_keep_them_all():
    truth = np.stack([clip(seed, frames=49).video for seed in range(2)])
    at = evaluate.places(49, 3)
    assert at == (0, 24, 48) and evaluate.places(25, 2) == (0, 24) and evaluate.places(25, 4) == (0, 8, 16, 24)
    three, two = evaluate.baselines(truth, at), evaluate.baselines(truth[:, :25])
    for name, made in three.items():
        assert made.shape == truth.shape
        np.testing.assert_array_equal(made[:, list(at)], truth[:, list(at)])
        np.testing.assert_array_equal(made[:, :25], two[name])
    np.testing.assert_array_equal(three["nearest"][:, 35], truth[:, 24])
    for bad in (1, 26, 0):
        with pytest.raises(ValueError, match="keyframes"):
            evaluate.places(25, bad)


def test_held_out_clips_are_the_held_out_ones():
    assert evaluate.heldout(3)[2].caption == clip(2, "heldout").caption
    with pytest.raises(ValueError, match="split"):
        clip(0, "valid")


def test_the_middle_keyframe_is_given_and_left_out(monkeypatch):
    """A stand-in for the model that copies its keyframes and knows nothing between them but the last one before: given
    the middle one it gains what the clips say, measured on the other frames alone."""
    clips = [clip(seed, "heldout", frames=9, size=16) for seed in range(4)]
    truth, asked = np.stack([one.video for one in clips]), []

    def generate(model, clips, captions, settings, at=(0, -1)):
        asked.append((tuple(at), settings.frames, bool(captions[0])))
        given = sorted(place % 9 for place in at)
        return truth[:, [max(place for place in given if place <= frame) for frame in range(9)]]

    monkeypatch.setattr(evaluate, "generate", generate)
    monkeypatch.setattr(evaluate, "reconstruct", lambda model, truth: truth)
    model = SimpleNamespace(config=NANO)
    figures = evaluate.measure(model, clips, guidance=(1.0,), keyframes=3)
    assert asked == [((0, 4, 8), 9, True), ((0, 4, 8), 9, False), ((0, -1), 9, True)]
    frames = [1, 2, 3, 5, 6, 7]
    with_inner = evaluate.psnr(truth[:, [0, 0, 0, 4, 4, 4]], truth[:, frames]).mean()
    without = evaluate.psnr(truth[:, [0] * 6], truth[:, frames]).mean()
    np.testing.assert_allclose(figures["guidance_1_interior"], with_inner)
    np.testing.assert_allclose(figures["guidance_1_without_inner_interior"], without)
    np.testing.assert_allclose(figures["guidance_1_inner_gain"], with_inner - without)
    assert figures["guidance_1_inner"] > 70
    plain = evaluate.measure(model, clips, guidance=(1.0,))
    assert not any("inner" in name for name in plain)
    ends = evaluate.psnr(truth[:, [0] * 7], truth[:, 1:-1]).mean()
    np.testing.assert_allclose(plain["guidance_1_interior"], ends)


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
       ["--guidance", "nan"], ["--keyframes", "1"], ["--keyframes", "26"], ["--frames", "26"], ["--frames", "1"],
        ["--out", "nowhere/figures.json"], ["--sheet", "nowhere/sheet.png"]]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD, ids=str)
def test_bad_arguments_are_one_line(arguments, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", lambda *_: pytest.fail("computing began"))
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "error:" in line]) == 1
