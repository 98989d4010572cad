"""Schedules of skipped passes: their cost against brute force, the command, and what `--skip-passes` takes of it."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from nano import NANO, write_model
from PIL import Image
from reference import relative_error

from benchmarks import residuals
from benchmarks import skipping as benchmark
from samplers import calibrate, calibrate_command, command, files, pipeline, skipping
from samplers.calibrate import Whole
from samplers.plan import Plan, Settings
from wanjax import checkpoint, marks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "nano")


def plan_of(steps=8, **changes):
    return Plan.of(NANO, Settings.of(NANO, steps=steps, **changes))


def made_up(plan, seed=0):
    """Velocities [steps, 2, n] that bend over the steps, and the `Whole` that they make."""
    rng, s = np.random.default_rng(seed), plan.settings
    scale = plan.table.guidance[: s.steps].astype(np.float64)
    levels = np.append(plan.table.step.sigma[: s.steps].astype(np.float64), 0)
    curves = levels[:-1, None] ** np.arange(5) * np.array([1, 1, 2, 3, 3])
    velocities = np.einsum("ik,kpn->ipn", curves, rng.normal(size=(5, 2, 40))) + 0.01 * rng.normal(
        size=(s.steps, 2, 40)
    )
    velocities[:, 1] *= (scale != 1)[:, None]
    flat = velocities.reshape(2 * s.steps, -1)
    return velocities, Whole(flat @ flat.T, levels, scale)


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.25, 0.75)])
def test_costs_are_those_of_the_velocities_themselves(span):
    plan = plan_of(guidance_interval=span)
    velocities, whole = made_up(plan)
    for skipped in ((2,), (3, 4), (2, 4, 5, 6)):
        flags, errors = skipping.flags(skipped, whole.scale, False), []
        for step in range(8):
            error = np.zeros(40)
            for which, weight in enumerate((whole.scale[step], 1 - whole.scale[step])):
                if flags[step, which]:
                    ran = [i for i in range(step) if not flags[i, which] and (not which or whole.scale[i] != 1)]
                    b, a = ran[-2:]
                    slope = (velocities[a, which] - velocities[b, which]) / (whole.sigmas[a] - whole.sigmas[b])
                    guess = velocities[a, which] + slope * (whole.sigmas[step] - whole.sigmas[a])
                    error += weight * (guess - velocities[step, which])
            errors.append((whole.sigmas[step + 1] - whole.sigmas[step]) * error)
        assert whole.together(flags) == pytest.approx(np.square(sum(errors)).sum(), rel=1e-9)
        assert whole.apart(flags) == pytest.approx(sum(np.square(error).sum() for error in errors), rel=1e-9)


@pytest.mark.parametrize("cost", calibrate.COSTS)
def test_the_search_against_all_schedules(cost):
    """At most a tenth above the least of all, and never above an even one."""
    for seed in range(3):
        plan = plan_of(10)
        whole = made_up(plan, seed)[1]

        def worth(steps, whole=whole):
            return cost(whole, skipping.flags(steps, whole.scale, False))

        every = sorted(map(worth, itertools.combinations(skipping.free(10), 3)))
        found = calibrate.search(whole, plan, 3, cost)
        assert len(found) == 3 and worth(found) <= 1.1 * every[0] < every[len(every) // 2]
        assert worth(found) <= worth(skipping.even(3, skipping.free(10)))


def test_what_is_seen_and_found(folder):
    """The products are those of the velocities of an ordinary run; the schedule is the nearest of those tried."""
    model, plan = checkpoint.load(folder), plan_of(solver="euler", guidance_interval=(0.0, 0.7))
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 2, 16, 24, 3)).astype(np.uint8)
    inputs = [pipeline.Inputs.prepare([pair], plan) for pair in pictures]
    encoded = pipeline.encode(model, plan, inputs, [["a red circle"], ["a blue square"]])
    clips = [(one, pipeline.noise(plan, [seed])) for seed, one in enumerate(encoded)]
    whole, latents = calibrate.observe(model, plan, clips)
    total, entering = np.zeros((8, 8)), []
    for one, noise in clips:
        entering.clear()
        end = pipeline.denoise(model, plan, one, noise, on_step=lambda done, carry: entering.append(carry.sample))
        states = np.stack([*(np.asarray(x, np.float64).ravel() for x in entering)])
        velocity = np.diff(states, axis=0) / np.diff(whole.sigmas)[:, None]
        total += velocity @ velocity.T
        assert np.array_equal(end, latents[len(latents) - len(clips) + [c is one for c, _ in clips].index(True)])
    mixed = np.zeros((8, 16))
    mixed[np.arange(8), 2 * np.arange(8)], mixed[np.arange(8), 2 * np.arange(8) + 1] = whole.scale, 1 - whole.scale
    np.testing.assert_allclose(mixed @ whole.products @ mixed.T, total, rtol=1e-3)
    found, tried = calibrate.find(model, plan, 0.4, clips, (whole, latents))
    assert found.error == min(tried.values()) == tried[found.skip_passes] and found.clips == 2
    assert skipping.even(3, skipping.free(8)) in tried and all(len(steps) == 3 for steps in tried)


@pytest.fixture
def clips(tmp_path):
    """A folder of two pairs, and the same as lines."""
    rng, place, lines = np.random.default_rng(0), tmp_path / "clips", []
    place.mkdir()
    for name in "ab":
        for end in ("first", "last"):
            Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(place / f"{name}.{end}.png")
        (place / f"{name}.txt").write_text("a red circle\n")
        lines.append({"first": f"clips/{name}.first.png", "last": f"clips/{name}.last.png", "prompt": "a red circle"})
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return place


def arguments(folder, clips, out, *more):
    return ["--model", str(folder), "--steps", "8", "--share", "0.3", "--clips", str(clips), "--out", str(out), *more]


def test_the_command_and_what_takes_its_file(folder, clips, tmp_path, capsys):
    out = tmp_path / "own.json"
    assert calibrate_command.main(arguments(folder, clips, out)) == 0
    shown, report = capsys.readouterr().out, json.loads(out.read_text())
    assert "from the whole run: steps " in shown and f"--skip-passes {out}" in shown
    assert report[marks.KEY] and report["steps"] == 8 and report["clips"] == 2 and len(report["skip_passes"]) == 2
    assert calibrate_command.pairs(clips) == calibrate_command.pairs(tmp_path / "clips.jsonl")
    assert calibrate_command.main(arguments(folder, tmp_path / "clips.jsonl", out)) == 0, "its own file is replaced"
    assert json.loads(out.read_text()) == report

    def job(value, **settings):
        ends = clips / "a.first.png", clips / "a.last.png", tmp_path / "clip.mp4"
        return files.prepare(*ends, model=folder, skip_passes=value, **{"steps": 8} | settings)

    assert job(str(out)).settings.skip_passes == tuple(report["skip_passes"])
    assert np.flatnonzero(job(str(out)).plan.table.skip.any(1)).tolist() == report["skip_passes"]
    for changes, name in (({"steps": 9}, "steps"), ({"solver": "euler"}, "solver"), ({"method": "paper"}, "method"),
                          ({"shift": 5.0}, "shift")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^skip passes {out}: made for another {name}; make one by"):
            job(str(out), **changes)
    with pytest.raises(ValueError, match=r"^skip passes auto: the model's folder has no skip\.json; make one by "
                                         r"python -m samplers\.calibrate --out .*skip\.json"):  # fmt: skip
        job("auto")
    kept = folder / skipping.FILE
    kept.write_text(out.read_text())
    try:
        assert job("auto").settings.skip_passes == tuple(report["skip_passes"])
    finally:
        kept.unlink()
    for text in ("", "[]", "{}", '{"skip_passes": 3}', json.dumps(report | {"skip_passes": [0, 1]}),
                 json.dumps(report | {"more": 1})):  # fmt: skip
        out.write_text(text)
        with pytest.raises(ValueError, match="not a schedule of python -m samplers.calibrate; make one") as caught:
            job(str(out))
        assert "\n" not in str(caught.value)


def test_skip_passes_on_the_command_line(folder, clips, tmp_path, capsys, monkeypatch):
    prepared = []
    monkeypatch.setattr(files, "prepare", lambda **options: prepared.append(options) or 1 / 0)
    ends = ["--first", "a.png", "--last", "b.png"]
    for given, wanted in (("0.3", 0.3), ("auto", "auto"), ("own.json", "own.json")):
        with pytest.raises(ZeroDivisionError):
            command.main([*ends, "--skip-passes", given, "--no-skip-in-kab"])
        assert prepared[-1]["skip_passes"] == wanted and prepared[-1]["skip_in_kab"] is False
    monkeypatch.undo()
    line = ["--first", str(clips / "a.first.png"), "--last", str(clips / "a.last.png"), "--model", str(folder),
            "--out", str(tmp_path / "clip.mp4"), "--skip-passes"]  # fmt: skip
    for given, message in (("0.9", "skip passes 0.9: give a share"), ("auto", "has no skip.json"),
                           ("nowhere.json", "skip passes nowhere.json: No such file")):  # fmt: skip
        assert command.main([*line, given]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def spoil(clips, name):
    """Arguments that are bad in one way."""
    lines = clips.parent / "clips.jsonl"
    if name == "half a pair":
        (clips / "b.last.png").unlink()
    elif name == "no picture":
        (clips / "b.last.png").write_text("none")
    elif name == "empty folder":
        for one in clips.iterdir():
            one.unlink()
    elif name == "bad line":
        lines.write_text(lines.read_text() + '{"first": "a.png"}\n')
    elif name == "no JSON":
        lines.write_text("first,last\n")
    elif name == "foreign output":
        (clips.parent / "own.json").write_text('{"mine": 1}')


@pytest.mark.parametrize("name, extra, message", [
    ("half a pair", [], "b.first.png has no b.last.png; give both keyframes"),
    ("no picture", [], "b.last.png"),
    ("empty folder", [], "there are none; give NAME.first.png"),
    ("bad line", ["--clips", "clips.jsonl"], 'line 3: give {"first": "a.png", "last": "b.png"'),
    ("no JSON", ["--clips", "clips.jsonl"], "line 1: give"),
    ("missing", ["--clips", "nowhere"], "nowhere"),
    ("model", ["--model", "nowhere"], "nowhere"),
    ("much", ["--share", "0.7"], "skip passes 0.7: give a share of the steps from 0 to 0.6"),
    ("none", ["--share", "0.05"], "share 0.05: comes to none of 8 steps"),
    ("few steps", ["--steps", "3"], "share 0.3: comes to none of 3 steps"),
    ("frames", ["--frames", "24"], "nearest are 21 and 25"),
    ("seed", ["--seed", "-1"], "seed -1"),
    ("foreign output", [], "own.json"),
])  # fmt: skip
def test_bad_input_is_one_line(folder, clips, tmp_path, capsys, monkeypatch, name, extra, message):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("computing began"))
    monkeypatch.chdir(tmp_path)
    spoil(clips, name)
    assert calibrate_command.main(arguments(folder, clips, tmp_path / "own.json", *extra)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_failures_and_interruptions(folder, clips, tmp_path, capsys, monkeypatch):
    for error, code, message in ((KeyboardInterrupt(), 130, "interrupted; nothing was written"),
                                 (FloatingPointError("latents: NaN"), 1, "latents: NaN"),
                                 (MemoryError(), 1, "out of memory")):  # fmt: skip

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(calibrate, "find", fail)
        assert calibrate_command.main(arguments(folder, clips, tmp_path / "own.json")) == code
        assert message in capsys.readouterr().err and not (tmp_path / "own.json").exists()


def test_steps_in_which_nothing_can_be_skipped_are_not_taken():
    """Both passes as one run really in the first two steps of guidance, which would be the cheapest to choose."""
    plan = plan_of(12, guidance_mode="batched", guidance_interval=(0.5, 1.0))
    whole = made_up(plan)[1]
    found = calibrate.search(whole, plan, 5, Whole.apart)
    assert len(found) == 5 and not set(found) & {6, 7}
    assert skipping.flags(found, whole.scale, True)[list(found)].any(1).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::wanjax.tokenizer.PromptCut")
def test_the_benchmark_compares_with_the_uncached_clips(tmp_path, monkeypatch):
    """On a nano model of the tiny one's size: rows of every kind, passes counted, the same clips in all."""
    own = dataclasses.replace(NANO.sampling, frames=25, size=(32, 32))
    folder = write_model(tmp_path / "square", dataclasses.replace(NANO, sampling=own))
    monkeypatch.setattr(benchmark, "BATCH", 2)
    monkeypatch.setattr(benchmark, "CALIBRATION", 1)
    case = benchmark.Case(str(folder), "wan", "euler", 6, ((0.3, 3),), True)
    found = list(benchmark.rows(case))
    assert [row["kind"] for row in found] == ["all", "even", "calibrated", "guidance", "guidance", "guidance"]
    assert [row["passes"] for row in found] == [12, 8, 8, 8, 8, 8]
    assert [row["clips"] for row in found] == [3, 3, 3, 2, 2, 2]
    report = {"cases": [dataclasses.asdict(case) | {"rows": json.loads(json.dumps(found, default=float))}]}
    assert len(benchmark.tables(report)) == 3 + 1 + 5
    for row in found[1:3]:
        assert row["truth"] - row["change"] == pytest.approx(found[0]["truth"]) and 20 < row["uncached"] < 78
        assert row["uncached_least"] <= row["uncached"]


def test_the_residual_of_the_comparison(folder):
    """With nothing skipped it is the ordinary run; its rule skips what a slow ratio lets it, late or early."""
    model, plan = checkpoint.load(folder), plan_of(method="paper", solver="euler")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)
    (encoded,) = pipeline.encode(model, plan, [pipeline.Inputs.prepare([pictures], plan)], [["a red circle"]])
    clips = [(encoded, pipeline.noise(plan, [0]))]
    wanted = pipeline.denoise(model, plan, *clips[0])
    (found,), norms = residuals.denoise(model, plan, clips, ())
    assert relative_error(found, wanted) < 1e-5 and norms.shape == (8, 2) and (norms > 0).all()
    (cached,), _ = residuals.denoise(model, plan, clips, (3, 5))
    assert 1e-4 < relative_error(cached, wanted) < 0.5
    fading = 0.999 ** np.cumsum(np.arange(20.0))[:, None] * np.ones((1, 2))  # changes ever faster
    early, most = residuals.schedule(fading, 4), residuals.schedule(fading, 16)
    assert early == (4, 6, 8, 10) and len(most) > 8
    assert not set(most) & {0, 1, 2, 3, 19} and all(
        len(run) <= 4 for run in np.split(most, np.flatnonzero(np.diff(most) > 1) + 1)
    )


def test_the_benchmarks_tables(tmp_path, capsys):
    figures = {"clips": 8, "truth": 27.04, "change": -0.014, "standard_error": None, "uncached": 55.25}
    rows = [{"kind": "all", "passes": 40}, {"kind": "even", "share": 0.5, "passes_skipped": 0.5} | figures,
            {"kind": "calibrated", "share": 0.5, "passes_skipped": 0.5} | figures | {"standard_error": 0.006},
            {"kind": "guidance", "guidance_interval": [0, 1 / 3], "passes_skipped": 0.325} | figures]  # fmt: skip
    case = {"model": "models/seed11", "method": "wan", "solver": "euler", "steps": 20, "rows": rows}
    (tmp_path / "report.json").write_text(json.dumps({"cases": [case]}))
    assert benchmark.main(["--show", str(tmp_path / "report.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| seed11 | wan | euler | 20 | 50% | 8 | 27.04 (-0.014) | 55.2 | 27.04 (-0.014 ±0.006) | 55.2 |"
    assert lines[6] == "| seed11 | wan | euler | 20 | 0.00-0.33 of the run | 32% | 8 | 27.04 (-0.014) |"


def test_the_benchmarks_cases():
    cases = benchmark.cases()
    assert {(one.method, one.solver) for one in cases} == {(m, s) for m in ("wan", "paper") for s in ("unipc", "euler")}
    assert {one.steps for one in cases} == {10, 20, 50} and len({one.model for one in cases}) == 2
    assert all((0.5, 64) in one.shares for one in cases if one.model == "tiny" and one.steps == 20)
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["--scale", "0"])
    assert caught.value.code == 2
