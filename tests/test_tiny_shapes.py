"""The classifier of shapes: what it learns from, that it learns, how it is asked; and the command's bad input."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks.tiny import evaluate, shapes
from benchmarks.tiny.clips import clip, scene


@pytest.fixture(scope="module")
def learnt():
    """(parameters, losses) of a few steps on two very different shapes."""
    frames, labels = shapes.drawn(range(280), "train")
    two = np.isin(labels, [shapes.NAMES.index("bar"), shapes.NAMES.index("square")])
    return shapes.train(frames[two], labels[two], steps=120)


@pytest.fixture
def reader(monkeypatch):
    """A stand-in for the network that reads the label which `labelled` wrote into a corner."""
    monkeypatch.setattr(shapes, "_logits", lambda params, frames: jax.nn.one_hot(frames[:, 0, 0, 0], len(shapes.NAMES)))


def labelled(labels):
    """Videos uint8 [N, T, 2, 2, 3] from labels [N, T]."""
    return np.broadcast_to(np.asarray(labels, np.uint8)[:, :, None, None, None], (*np.shape(labels), 2, 2, 3)).copy()


def test_what_is_drawn_are_the_clips_own_frames():
    frames, labels = shapes.drawn([3, 8], "heldout")
    for place, number in enumerate((3, 8)):
        one = clip(number, "heldout", frames=25)
        np.testing.assert_array_equal(frames[3 * place : 3 * place + 3], one.video[[0, 12, 24]])
        assert {shapes.NAMES[i] for i in labels[3 * place : 3 * place + 3]} == {one.scene.sprites[0].shape}
    _, labels = shapes.drawn(range(32), "train")
    assert (labels == shapes.NAMES.index("star")).sum() == 3 * 4


def test_training_and_checking_draw_other_scenes():
    """And those that clips are measured on are others again."""
    numbers = {(split, n) for split, n in [("train", 0), ("heldout", 0), ("heldout", 10_000)]}
    assert len({scene(n, split) for split, n in numbers}) == 3


def test_varied_frames_keep_edges_and_change_colours():
    frames = shapes.unit(np.stack([clip(n).video[0] for n in range(16)]))
    changed = np.asarray(shapes.varied(jax.random.key(0), frames))
    frames, mirrored, noise = np.asarray(frames), 0, 6 * shapes.NOISE
    assert np.abs(changed - frames).max() > 0.5
    for one, other in zip(frames, changed, strict=True):
        # The same values in some order of channels and sign, mirrored or not; noise is of a known size.
        ways = [(one[:, ::flip, list(order)] * sign, flip)
                for flip in (1, -1) for sign in (1, -1)
                for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))]  # fmt: skip
        error, flip = min((np.abs(way - other).max(), flip) for way, flip in ways)
        assert error < noise
        mirrored += flip == -1
    assert 0 < mirrored < 16


def test_a_few_steps_learn_two_shapes(learnt):
    params, losses = learnt
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    frames, labels = shapes.drawn(range(60), "heldout")
    two = np.isin(labels, [shapes.NAMES.index("bar"), shapes.NAMES.index("square")])
    assert (shapes.told(params, frames[two]) == labels[two]).mean() > 0.8


def test_training_is_the_same_again_and_other_by_seed(learnt):
    frames, labels = shapes.drawn(range(8), "train")
    runs = [shapes.train(frames, labels, steps=2, seed=seed)[0] for seed in (1, 1, 2)]
    first, again, other = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(run)]) for run in runs)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_a_loss_that_is_not_finite_stops(monkeypatch):
    monkeypatch.setattr(shapes, "_step", lambda optimiser, params, moments, *rest: (params, moments, np.nan))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        shapes.train(*shapes.drawn([0], "train"), steps=3)


@pytest.mark.parametrize("count", [1, shapes.LOOKED, shapes.LOOKED + 1])
def test_as_many_answers_as_frames(reader, count):
    labels = np.arange(count) % len(shapes.NAMES)
    np.testing.assert_array_equal(shapes.told(None, labelled(labels[:, None])[:, 0]), labels)


def test_judge_counts_by_frame_and_shape(reader):
    circle, square, cross = (shapes.NAMES.index(name) for name in ("circle", "square", "cross"))
    seen = [[circle, circle, circle, circle, circle], [circle, circle, cross, circle, square],
            [square, circle, circle, circle, square]]  # fmt: skip
    report = shapes.judge(None, labelled(seen), np.array([circle, circle, square]))
    assert report["middle"] == pytest.approx(1 / 3)
    assert report["by_frame"] == pytest.approx([1, 2 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert report["interior"] == pytest.approx(5 / 9)
    assert report["by_shape"] == {"circle": 0.5, "square": 0.0}
    assert report["told_as"] == {"circle": {"cross": 1}, "square": {"circle": 1}}


def test_a_kept_classifier_is_the_same(learnt, tmp_path):
    file, about = tmp_path / "classifier.safetensors", {"right": 0.5, "by_shape": {"bar": 1.0}}
    shapes.keep(file, learnt[0], about)
    params, told = shapes.kept(file)
    assert told == about
    jax.tree.map(np.testing.assert_array_equal, params, learnt[0])
    with pytest.raises(ValueError, match="exists"):
        shapes.keep(file, learnt[0], about)


def test_the_report(learnt, reader, tmp_path, monkeypatch):
    """Of a stand-in for the model that makes the truth, and a VAE that makes everything a circle."""
    monkeypatch.setattr(shapes, "learn", lambda *asked: (learnt[0], {"checked_frames": 7, "right": 0.25}))
    circle = shapes.NAMES.index("circle")

    def arms(model, clips, settings):
        truth = labelled([[shapes.label(one.scene)] * 5 for one in clips])
        return {"truth": truth, "vae": np.full_like(truth, circle), **dict.fromkeys(settings, truth)}

    monkeypatch.setattr(shapes, "arms", arms)
    out, classifier = tmp_path / "shapes.json", tmp_path / "classifier.safetensors"
    command = ["--clips", "16", "--guidance", "1", "2.5", "--out", str(out), "--classifier", str(classifier)]
    assert shapes.main(command) == 0
    report = json.loads(out.read_text())
    names = [shapes.label(one.scene) for one in evaluate.heldout(16)]
    assert report["shapes"]["star"] == 2
    assert list(report["arms"]) == ["truth", "vae", "guidance_1", "guidance_2.5"]
    assert [report["arms"][name]["middle"] for name in ("truth", "guidance_2.5")] == [1, 1]
    assert report["arms"]["vae"]["middle"] == names.count(circle) / 18
    assert sum(report["shapes"].values()) == 18 and report["classifier"]["right"] == 0.25
    monkeypatch.setattr(shapes, "learn", lambda *asked: pytest.fail("one is there"))
    assert shapes.main(command) == 0


def test_the_arms_are_of_the_same_clips(monkeypatch):
    clips = [clip(n, "heldout", frames=5, size=16) for n in range(2)]
    monkeypatch.setattr(evaluate, "generate", lambda model, clips, captions, settings: (captions, settings))
    monkeypatch.setattr(evaluate, "reconstruct", lambda model, truth: truth[:, ::-1])
    made = shapes.arms(SimpleNamespace(), clips, {"one": 1, "two": 2})
    truth = np.stack([one.video for one in clips])
    np.testing.assert_array_equal(made["truth"], truth)
    np.testing.assert_array_equal(made["vae"], truth[:, ::-1])
    np.testing.assert_array_equal(made["crossfade"][:, [0, -1]], truth[:, [0, -1]])
    assert made["two"] == ([one.caption for one in clips], 2)


BAD = [["--model", "nowhere"], ["--clips", "0"], ["--clips", "x"], ["--steps", "0"], ["--guidance", "nan"],
       ["--scenes", "0"], ["--training-steps", "0"], ["--seed", "-1"], ["--out", "nowhere/shapes.json"],
       ["--classifier", "nowhere/it.safetensors"], ["--classifier", "README.md"]]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD, ids=str)
def test_bad_arguments_are_one_line(arguments, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "learn", lambda *_: pytest.fail("computing began"))
    with pytest.raises(SystemExit) as stop:
        shapes.main(arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "Traceback" not in line


@pytest.mark.slow
def test_the_classifier_can_measure_shapes():
    """What the committed figure rests on: nearly all frames that it has not learnt from are told, of every shape."""
    _, about = shapes.learn(checked=341)
    assert about["right"] >= 0.98
    assert about["by_shape"].keys() == set(shapes.NAMES) and min(about["by_shape"].values()) >= 0.94
