"""The measure of the stop at a shared keyframe, on videos whose speed is known, and its command line."""

import json

import jax
import numpy as np
import pytest
from nano import write_model
from tgi_nano import CONFIG

from benchmarks import film as benchmark
from samplers import film, pipeline
from samplers.plan import Plan, Settings
from wanjax import checkpoint


def moving(steps):
    """A video [T, 12, 12, 3] whose grey level rises by so much from frame to frame."""
    levels = np.concatenate([[0], np.cumsum(steps)])
    return np.broadcast_to(levels[:, None, None, None], (len(levels), 12, 12, 3)).astype(np.uint8)


EVEN = np.full(48, 4)


@pytest.mark.parametrize("before, after", [(4, 4), (0, 4), (4, 0), (0, 0), (2, 6), (1, 1)])
def test_speeds_at_the_joint_are_those_put_in(before, after):
    steps = EVEN.copy()
    steps[20:24], steps[24:28] = before, after
    found = benchmark.speeds(moving(steps), 24, 4)
    np.testing.assert_allclose(found, (before / 4, after / 4))


def test_speeds_look_no_further_than_they_say():
    steps = EVEN.copy()
    steps[:12], steps[36:] = 0, 1
    np.testing.assert_allclose(benchmark.speeds(moving(steps), 24, 4), (1, 1))
    steps[12:20] = 2
    np.testing.assert_allclose(benchmark.speeds(moving(steps), 24, 4), (4 / 3, 4 / 3))
    steps[12:36], steps[24] = 0, 9
    assert not np.isfinite(benchmark.speeds(moving(steps), 24, 4)).any()
    assert benchmark.speeds(moving(0 * EVEN), 24, 4) == (1, 1)


def test_figures_are_means_by_group():
    stop = EVEN.copy()
    stop[20:24] = 0
    truth = np.stack([moving(EVEN), moving(EVEN), moving(stop)])
    made = np.stack([moving(EVEN), moving(stop), moving(stop)])
    found = benchmark.figures(made, truth, np.array([False, False, True]), 24, 4)
    assert {group: found[group]["clips"] for group in ("all", "even", "paced")} == {"all": 3, "even": 2, "paced": 1}
    assert found["even"]["slowest"] == {"mean": 0.5, "deviation": 0.5} and found["paced"]["slowest"]["mean"] == 0
    assert found["even"]["break"]["mean"] == 0.5 and found["even"]["after"]["mean"] == 1
    assert found["even"]["off"]["mean"] == 0.25 and found["paced"]["off"]["mean"] == 0
    assert len(found["profile"]) == 48 and np.mean(found["profile"]) == pytest.approx(1, abs=1e-3)
    same = benchmark.figures(truth[:1], truth[:1], np.array([False]), 24, 4)
    assert "paced" not in same and same["psnr_interior"] > 70


def test_paths_go_straight_on_through_the_middle():
    clips = benchmark.paths(12, 49)
    sprites = [one.story.scene.sprites for one in clips]
    assert all(len(one) == 1 and one[0].arc == "straight" and one[0].start != one[0].end for one in sprites)
    assert {one[0].pace for one in sprites} == {"even", "early", "late"}
    assert len({one.caption for one in clips}) > 6
    truth = np.stack([one.video for one in clips])
    paced = np.array([one[0].pace != "even" for one in sprites])
    found = benchmark.figures(truth, truth, paced, 24, 4)
    assert found["even"]["slowest"]["mean"] > 0.85 and found["all"]["off"]["mean"] == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "nano", CONFIG)


def test_every_arm_is_measured(folder, tmp_path, capsys, monkeypatch):
    """Stand-ins for what the model makes: the first frame for a chain, the middle one for a single clip."""

    def still(place):
        return lambda model, settings, clips, joint, *more: np.stack(
            [np.repeat(benchmark.stretched(one.video[[place]], settings.size), settings.frames, 0) for one in clips]
        )

    monkeypatch.setattr(benchmark.evaluate, "reconstruct", lambda model, truth: truth)
    monkeypatch.setattr(benchmark, "chain", still(0))
    monkeypatch.setattr(benchmark, "single", still(12))
    out = tmp_path / "film.json"
    line = ["--model", str(folder), "--clips", "3", "--batch", "2", "--frames", "25", "--overlaps", "4", "--steps", "2"]
    assert benchmark.main([*line, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert list(report["arms"]) == ["truth", "vae", "chain", "overlap-4", "single"] and report["joint"] == 12
    values = [one["all"][of]["mean"] for one in report["arms"].values() for of in ("slowest", "break", "off")]
    assert np.isfinite(values).all() and report["arms"]["truth"]["all"]["off"]["mean"] == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.slow
def test_what_is_measured_is_the_products(folder):
    """What `samplers.film` and the pipeline make of the same keyframes and noise."""
    model, clips = checkpoint.load(folder), benchmark.paths(2, 17, size=16)
    settings = Settings.of(CONFIG, frames=17, steps=2)
    made = benchmark.chain(model, settings, clips, 8, 4, jax.random.key(3))
    assert made.shape == (2, 17, 16, 24, 3)
    lie = film.spans([9, 9], 4, 4)
    plans = film.plans(CONFIG, settings, lie)
    noises = [jax.random.normal(jax.random.fold_in(jax.random.key(3), n), (2, *plan.latent_shape))[1:]
              for n, plan in enumerate(plans)]  # fmt: skip
    pair = clips[1].video[[0, 8]], clips[1].video[[8, 16]]
    batches = [film.Batch(film.Inputs.prepare([one], plan), [clips[1].caption], [0])
               for one, plan in zip(pair, plans, strict=True)]  # fmt: skip
    alone = film.make(model, lie, plans, batches, noises=noises)[0]
    assert np.abs(made[1].astype(int) - alone[0]).max() <= 1, "but for rounding in another batch"
    plan = Plan.of(CONFIG, settings, (0, 8, 16))
    (told,) = pipeline.encode(model, plan, [film.Inputs.prepare([clips[1].video[[0, 8, 16]]], plan)],
                              [[clips[1].caption]])  # fmt: skip
    noise = jax.random.normal(jax.random.key(3), (1, *plan.latent_shape))
    one = pipeline.decode(model, plan, pipeline.denoise(model, plan, told, noise, chunk=2))
    np.testing.assert_array_equal(benchmark.single(model, settings, clips[1:], 8, jax.random.key(3)), one)


@pytest.mark.parametrize("arguments, message", [
    (["--frames", "48"], "frames 48: give 8n+1, at least 25"),
    (["--frames", "29"], "frames 29"),
    (["--frames", "17"], "at least 25"),
    (["--overlaps", "6"], "overlap 6: give a multiple of 4"),
    (["--overlaps", "16"], "overlap 16: more than half of a clip of 25 frames"),
    (["--solver", "lcm"], "solver lcm"),
    (["--solver", "magic"], "solver 'magic'"),
    (["--seed", "-1"], "seed -1"),
    (["--steps", "1001"], "steps"),
    (["--model", "nowhere"], "nowhere"),
])  # fmt: skip
def test_bad_arguments_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "run", lambda *_: pytest.fail("computing began"))
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]
