"""The runner on a random model: paired noise, one program for all variants, kill and resume, every kind of arm."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from nano import NANO, write_model

from benchmarks.tgi import __main__ as cli
from benchmarks.tgi import generate, run
from benchmarks.tgi.arms import ARMS, CLAIMS, Arm, choose, read_own, shuffled_curve
from benchmarks.tgi.generate import Batch, Clips
from benchmarks.tgi.neural import Neural
from benchmarks.tgi.procedural import procedural
from benchmarks.tgi.run import Plan
from benchmarks.tgi.scores import LINES, Scores, ScoresError, by_clip, unfinished
from samplers import pipeline
from samplers import plan as sampling
from samplers.pipeline import Inputs
from samplers.plan import Settings
from wanjax import checkpoint
from wanjax.kab import KAB
from wanjax.method import METHODS, Isolation, Method
from wanjax.retro import ReTRo, scale_vector

FRAMES = 9
VARIANTS = ("wan", "paper", "release", "kab", "retro", "kab-joint", "isolation", "retro-uniform", "retro-position",
            "shuffled-anchors", "mask-only")  # fmt: skip
CONFIG = dataclasses.replace(NANO, dit=dataclasses.replace(NANO.dit, text_length=40))  # whole captions
NANO_METHOD = Method(Isolation(), KAB(layers=(0, 1), steps=(0.0, 1.0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "nano", CONFIG)


@pytest.fixture(scope="module")
def model(folder):
    return checkpoint.load(folder)


def plan(arms, clips=3, batch=2, seeds=(0,), **more):
    settings = Settings.of(NANO, steps=3)
    chosen = choose(arms) if all(isinstance(arm, str) for arm in arms) else arms
    return Plan((procedural("dev", FRAMES, clips),), chosen, seeds, settings, batch, **more)


def start(a_plan, folder, model):
    """Runs a plan to its end; the closed scores."""
    described = a_plan.describe({"name": "nano", "sha256": "0"}, Neural(None)) | {"environments": []}
    with Scores(folder, described) as scores:
        run.run(a_plan, model, model, scores, Neural(None), quiet=True)
    return scores


@pytest.fixture(scope="module")
def batch(model):
    clips = run.clips_of(procedural("dev", FRAMES, 2).items, (16, 24))
    return Batch(model, model, Settings.of(NANO, frames=FRAMES, steps=3), clips)


def turned_round(clips):
    """The same clips in the other order."""
    return Clips(*(getattr(clips, field.name)[::-1] for field in dataclasses.fields(clips)))


def test_wan_is_the_pipeline(model, batch):
    """The arm without a method makes what the product makes from the same noise and the keyframes as they are."""
    pairs = [(item.read()[0], item.read()[-1]) for item in procedural("dev", FRAMES, 2).items]
    a_plan = sampling.Plan.of(model.config, batch.settings)
    (encoded,) = pipeline.encode(model, a_plan, [Inputs.prepare(pairs, a_plan)], [batch.clips.captions])
    latents = pipeline.denoise(model, a_plan, encoded, batch.noise(4))
    np.testing.assert_array_equal(generate.make(choose(["wan"])[0], batch, 4), pipeline.decode(model, a_plan, latents))


def test_a_clips_noise_is_its_own(model, batch):
    other = Batch(model, None, batch.settings, turned_round(batch.clips))
    noise = np.asarray(batch.noise(0))
    np.testing.assert_array_equal(noise, np.asarray(other.noise(0))[::-1])
    assert not np.array_equal(noise[0], noise[1]) and not np.array_equal(noise, batch.noise(1))
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    uses = [jax.random.key_data(batch.keys(0, use)) for use in (None, 1, 2)]
    assert len({row.tobytes() for keys in map(np.asarray, uses) for row in keys}) == 6


def test_variants_of_the_method_are_one_program(batch):
    made = {}
    first, *others = choose(VARIANTS)
    made[first.name] = generate.make(first, batch, 0)
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for arm in others:
            made[arm.name] = generate.make(arm, batch, 0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    np.testing.assert_array_equal(made["retro-uniform"], made["kab"])
    assert not np.array_equal(made["isolation"], made["wan"])
    assert not np.array_equal(made["retro"], made["wan"])


def test_random_bias_has_the_size_of_kabs(model, batch):
    """Its spread is KAB's, in KAB's layers and frames and nowhere else."""
    settings = dataclasses.replace(batch.settings, method=NANO_METHOD)
    own = sampling.Plan.of(model.config, settings)
    latents = generate._denoised(batch, NANO_METHOD, 0, until=1)
    size = generate._bias_size(own.config.dit, model.params["dit"], latents, 500.0, batch.encoded.conditions,
                               own.method, own.strength[1])  # fmt: skip
    for one in size:
        sizes = np.asarray(one)
        assert (sizes[:, :, [0, -1]] == 0).all() and (sizes[:, :, 1:-1] > 0).all()
        drawn = np.asarray(generate._gaussian(batch.keys(0, 1), one, 4000))
        np.testing.assert_allclose(np.sqrt(np.square(drawn).mean(-1)), sizes, rtol=0.06, atol=1e-9)
    arm = Arm("r", "control", "", "random-bias", NANO_METHOD)
    biased, plain = generate.make(arm, batch, 0), generate.make(dataclasses.replace(arm, kind="method"), batch, 0)
    assert np.abs(biased.astype(int) - plain).max() > 1
    other = generate.make(arm, Batch(model, None, batch.settings, turned_round(batch.clips)), 0)
    assert np.abs(other[::-1].astype(int) - biased).max() <= 1, "a clip's bias is its own"


@pytest.mark.parametrize("isolation", [Isolation(), None])
def test_the_size_of_a_bias_is_what_its_softmax_sees(model, batch, isolation):
    """A constant added to all keys of one softmax changes nothing, so it is no part of the size."""
    method = Method(isolation, NANO_METHOD.kab)
    own = sampling.Plan.of(model.config, dataclasses.replace(batch.settings, method=method))
    latents, conditions = batch.noise(0), batch.encoded.conditions
    strength = own.method.replace(strength=own.strength).strength_of(1, 2)
    _, seen = generate.WanDiT(own.config.dit, inspect=True).apply(
        {"params": model.params["dit"]},
        latents,
        np.full(2, 500.0),
        conditions,
        own.method.table,
        None,
        own.method.control,
        strength,
    )
    size = generate._bias_size(own.config.dit, model.params["dit"], latents, 500.0, conditions, own.method,
                               own.strength[1])  # fmt: skip
    text, images = (np.asarray(of, np.float64) for of in (seen.bias.text, seen.bias.images))
    first, last = np.moveaxis(images, -2, 0)
    joint = np.concatenate([first, last], -1)
    np.testing.assert_allclose(size[0], text.std(-1), rtol=1e-4, atol=1e-6)
    if isolation is None:
        squares = (np.square(np.asarray(size[1])) + np.square(np.asarray(size[2]))) / 2
        np.testing.assert_allclose(np.sqrt(squares), joint.std(-1), rtol=1e-4, atol=1e-6)
    else:
        np.testing.assert_allclose(size[1], first.std(-1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(size[2], last.std(-1), rtol=1e-4, atol=1e-6)


def test_a_uniform_scale_is_the_mean_of_the_factors(model, batch):
    retro = ReTRo("magnitude", 1.3, 0.8, smooth=0)
    mean = scale_vector(retro, FRAMES, 3).mean()
    made = generate.make(Arm("u", "own", "", "uniform-scale", Method(retro=retro)), batch, 0)
    wanted = Arm("w", "own", "", "method", Method(retro=ReTRo("magnitude", mean, mean)))
    np.testing.assert_array_equal(made, generate.make(wanted, batch, 0))
    assert not np.array_equal(made, generate.make(dataclasses.replace(wanted, method=Method()), batch, 0))


def test_wan_by_euler_steps(batch):
    euler = Batch(batch.model, None, dataclasses.replace(batch.settings, solver="euler"), batch.clips)
    wan, by_euler = choose(["wan", "wan-euler"])
    np.testing.assert_array_equal(generate.make(by_euler, batch, 0), generate.make(wan, euler, 0))
    assert batch.settings.solver != "euler"


def test_random_mask_hides_the_last_keyframe_in_half_of_the_steps(batch, monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "_varied", lambda batch, chosen, seed, varying, bias: seen.append(varying) or 0)
    monkeypatch.setattr(Batch, "decode", lambda self, latents: latents)
    long = Batch(batch.model, None, dataclasses.replace(batch.settings, steps=10), batch.clips)
    for seed in (0, 0, 1):
        generate.make(choose(["random-mask"])[0], long, seed)
    hidden = [varying.hidden for varying in seen]
    assert all(one.sum() == 5 for one in hidden)
    np.testing.assert_array_equal(hidden[0], hidden[1])
    assert not np.array_equal(hidden[0], hidden[2])


def test_nothing_hidden_and_no_bias_is_the_plain_sampler(batch):
    arm = choose(["mask-only"])[0]
    chosen = dataclasses.replace(batch.settings, method=arm.method)
    off = generate.Varying(np.zeros(3, np.float32), np.zeros(3, np.float32))
    latents = generate._varied(batch, chosen, 0, off, None)
    np.testing.assert_allclose(latents, generate._denoised(batch, arm.method, 0), rtol=2e-5, atol=2e-5)
    on = dataclasses.replace(off, hidden=np.ones(3, np.float32))
    assert not np.allclose(generate._varied(batch, chosen, 0, on, None), latents, atol=1e-2)


def test_shuffled_anchors_move_every_inner_frame():
    for frames in (5, 7, 21):
        curve = np.linspace(0, 1, frames)
        for seed in range(5):
            mixed = np.array(shuffled_curve(frames, seed))
            assert mixed[0] == 0 and mixed[-1] == 1
            np.testing.assert_allclose(np.sort(mixed), curve)
            assert (np.abs(mixed - curve)[1:-1] > 1e-9).all()


def test_every_arm_runs_and_is_scored(tmp_path, model):
    """All arms that need no large program of their own; the rest is in test_two_way."""
    arms = [arm.name for arm in ARMS if arm.kind not in ("two-way", "random-bias")]
    scores = start(plan(arms, clips=2, seeds=(0, 1), strips=1, videos=True), tmp_path / "out", model)
    for name in arms:
        seedless = choose([name])[0].seedless
        assert sum(line["arm"] == name for line in scores.lines) == (2 if seedless else 4), name
    assert set(by_clip(scores.lines, FRAMES, "truth", "psnr_interior").values()) == {60.0}
    assert set(by_clip(scores.lines, FRAMES, "cross-fade", "psnr_ends").values()) == {60.0}
    assert {line["challenge"] for line in scores.lines} == {"large motion", "linear motion"}
    strips = sorted((tmp_path / "out" / "strips" / "9").rglob("*.png"))
    assert len(strips) == len(arms) and {file.stem for file in strips} == {"dev-00000", "dev-00000-0"}
    assert (tmp_path / "out" / "videos" / "wan" / "9" / "dev-00001-1.mp4").stat().st_size > 0


def test_every_claim_and_kind_is_known():
    names = {arm.name for arm in ARMS}
    assert len(names) == len(ARMS) and {arm.kind for arm in ARMS} <= set(generate.KINDS)
    fixed = [claim for claim in CLAIMS if not claim.source.startswith("tuned")]  # those: test_tune
    assert len(fixed) == 17 and all({claim.arm, claim.against} <= names for claim in fixed)
    assert {claim.expected for claim in CLAIMS} == {"better", "worse"}


def test_files_asked_for_later_are_made_and_scores_stay(tmp_path, model):
    """--videos and --strips on a finished folder: what lacks them is made again, and no line is written twice."""
    arms = ["wan", "nearest"]
    start(plan(arms, strips=0), tmp_path / "out", model)
    lines = (tmp_path / "out" / LINES).read_bytes()
    scores = start(plan(arms, strips=2, videos=True), tmp_path / "out", model)
    assert (tmp_path / "out" / LINES).read_bytes() == lines and not unfinished(scores.config, scores.done)
    names = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*") if file.is_file()}
    videos = {f"videos/wan/9/dev-0000{n}-0.mp4" for n in range(3)} | {
        f"videos/nearest/9/dev-0000{n}.mp4" for n in range(3)
    }
    strips = {f"strips/9/wan/dev-0000{n}-0.png" for n in range(2)} | {
        f"strips/9/nearest/dev-0000{n}.png" for n in range(2)
    }
    assert names - {LINES, "config.json", ".lock"} == videos | strips
    lost = tmp_path / "out" / "videos" / "wan" / "9" / "dev-00001-0.mp4"
    lost.unlink()
    start(plan(arms, strips=2, videos=True), tmp_path / "out", model)
    assert lost.stat().st_size > 0


def test_a_video_made_once_more_must_be_the_scored_one(tmp_path, model, monkeypatch):
    """A machine or version that makes another one would mix its videos with the scores of the first."""
    start(plan(["wan"], strips=0), tmp_path / "out", model)
    made = generate.make
    monkeypatch.setattr(generate, "make", lambda *arguments: made(*arguments) // 2)
    with pytest.raises(ScoresError, match="wan, clip dev-00000-0, 9 frames: made once more, frame . has"):
        start(plan(["wan"], strips=0, videos=True), tmp_path / "out", model)
    assert not (tmp_path / "out" / "videos").exists()


def test_a_plan_is_kept_so_that_what_was_not_begun_is_missed(tmp_path, model, monkeypatch):
    monkeypatch.setattr(generate, "make", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        start(plan(["wan", "vae"], seeds=(0, 1)), tmp_path / "out", model)
    left = Scores(tmp_path / "out", None)
    assert left.config["planned"] == {"9": {"wan": [0, 1], "vae": [None]}}
    assert unfinished(left.config, left.done) == [(9, "wan", 0, 3), (9, "vae", 0, 3)]


def test_another_image_model_concerns_the_two_way_arms_alone():
    arms = plan(["wan", "trf"]).describe({}, Neural(None), {"name": "i2v", "sha256": "abc"})["arms"]
    assert arms["trf"]["image_model"] == {"name": "i2v", "sha256": "abc"} and "image_model" not in arms["wan"]
    assert "image_model" not in plan(["trf"]).describe({}, Neural(None))["arms"]["trf"]


def test_two_way_arms_with_an_image_to_video_model(tmp_path, folder):
    """A model of one keyframe, as I2V-14B is, from the command line to the scores; one of other sizes is refused."""
    one = dataclasses.replace(CONFIG, name="nano-i2v", dit=dataclasses.replace(CONFIG.dit, num_images=1))
    line = ["run", "--data", "procedural-dev", "--lengths", str(FRAMES), "--clips", "1", "--batch", "1", "--model",
            str(folder), "--arms", "trf", "--steps", "1", "--size", "16", "24"]  # fmt: skip
    image_model = write_model(tmp_path / "i2v", one)
    line += ["--image-model", str(image_model), "--out"]
    assert cli.main([*line, str(tmp_path / "out")]) == 0
    scores = Scores(tmp_path / "out", None)
    assert len(scores.lines) == 1 and scores.config["arms"]["trf"]["image_model"]["name"] == "nano-i2v"
    assert cli.main([*line, str(tmp_path / "fade"), "--arms", "cross-fade"]) == 0
    assert "image_model" not in Scores(tmp_path / "fade", None).config["arms"]["cross-fade"]
    other = dataclasses.replace(one, dit=dataclasses.replace(one.dit, patch_size=(1, 1, 1)))
    with pytest.raises(ValueError, match="of other sizes than nano"):
        run._check_image_model(CONFIG, other)


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_run_ends_with_the_same_scores(tmp_path, model, monkeypatch, stop):
    """Stopped after some appends, its last line torn: byte for byte the file of an uninterrupted run."""
    a_plan = plan(["wan", "kab", "cross-fade"], clips=3, batch=2)
    whole = start(a_plan, tmp_path / "whole", model)
    append = Scores.append

    def stopping(self, lines):
        append(self, lines)
        stopping.calls += 1
        if stopping.calls == stop:
            raise Killed

    stopping.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(Scores, "append", stopping)
        with pytest.raises(Killed):
            start(a_plan, tmp_path / "cut", model)
    file = tmp_path / "cut" / LINES
    os.truncate(file, file.stat().st_size - 7)
    start(a_plan, tmp_path / "cut", model)
    assert file.read_bytes() == (tmp_path / "whole" / LINES).read_bytes()
    assert len(whole.lines) == 9


# A background job inherits Ctrl-C ignored; the command is to be tested as a terminal starts it.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from benchmarks.tgi.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_killed_process_goes_on(tmp_path, folder, model, number, code):
    """SIGKILL or Ctrl-C in the middle of the command, then the same command again."""
    options = ["run", "--data", "procedural-dev", "--lengths", str(FRAMES), "--clips", "6", "--batch", "1", "--model",
               str(folder), "--arms", "wan", "nearest", "--steps", "3", "--size", "16", "24"]  # fmt: skip
    out = tmp_path / "killed"
    line = [sys.executable, "-c", COMMAND, *options, "--out", str(out)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if (out / LINES).exists() and (out / LINES).stat().st_size:
                break
            time.sleep(0.005)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == code, "it was to be stopped before its end"
    if number == signal.SIGINT:
        assert "stopped; the same command goes on" in error and "Traceback" not in error
    early = (out / LINES).read_bytes()
    assert 0 < early.count(b"\n") < 12
    assert cli.main([*options, "--out", str(out)]) == 0
    assert cli.main([*options, "--out", str(tmp_path / "whole")]) == 0
    assert (out / LINES).read_bytes() == (tmp_path / "whole" / LINES).read_bytes()
    assert (out / LINES).read_bytes().startswith(early[: early.rfind(b"\n") + 1])


BAD = {
    "unknown arm": (["run", "--arms", "nonsense"], "arm 'nonsense'"),
    "arm twice": (["run", "--arms", "wan", "wan"], "named twice"),
    "no model": (["run", "--model", "/nowhere"], "/nowhere"),
    "data": (["run", "--data", "tgi:"], "--data tgi:"),
    "tgi folder": (["run", "--data", "tgi:/nowhere"], "/nowhere"),
    "length": (["run", "--lengths", "24", "--data", "procedural-dev"], "frames 24"),
    "test length": (["run", "--lengths", "29"], "frozen for"),
    "lengths twice": (["run", "--lengths", "25", "25"], "named twice"),
    "clips": (["run", "--clips", "0"], "--clips 0"),
    "batch": (["run", "--batch", "0"], "--batch 0"),
    "seeds": (["run", "--seeds", "1", "1"], "--seeds"),
    "seed": (["run", "--seeds", "-1"], "--seeds"),
    "steps": (["run", "--steps", "0"], "steps"),
    "solver": (["run", "--solver", "magic"], "solver 'magic'"),
    "size": (["run", "--size", "30", "32"], "nearest size"),
    "small size": (["run", "--size", "8", "32"], "size 8x32: the metrics need 11"),
    "weights": (["run", "--weights", "/nowhere"], "--weights /nowhere"),
    "captions": (["run", "--captions", "x.json"], "--captions"),
    "own arms": (["run", "--own-arms", "/nowhere.json"], "/nowhere.json"),
    "tune on test": (["tune", "--data", "procedural-test"], "not chosen on test clips"),
    "tune on test, a colon": (["tune", "--data", "procedural-test:"], "not chosen on test clips"),
    "random bias": (["run", "--arms", "random-bias", "--steps", "2"], "KAB acts in none of 2 steps"),
    "image model": (
        ["run", "--arms", "trf", "--image-model", "FOLDER"],
        "nano takes 2 keyframes; give an image-to-video",
    ),
    "trials": (["tune", "--trials", "0"], "--trials 0"),
    "report": (["report", "/nowhere"], "/nowhere"),
    "names": (["report", "a", "b", "--names", "x"], "--names"),
    "vbench": (["report", "a", "--vbench", "x"], "--vbench x"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_code_2(tmp_path, folder, capsys, arguments, message):
    arguments = [str(folder) if one == "FOLDER" else one for one in arguments]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", [["run"], ["tune"], ["report", "x"], ["vbench", "x", "--arm", "a", "--length", "9"]]
)
def test_a_file_in_the_place_of_the_folder(tmp_path, capsys, command):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "inner"):
        assert cli.main([*command, "--out", str(out)]) == 2
        assert f"{tmp_path / 'file'} is a file; name a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_two_way_arms_need_a_model_of_one_image(tmp_path, folder, capsys):
    assert cli.main(["run", "--model", str(folder), "--arms", "trf", "--out", str(tmp_path / "out")]) == 2
    assert "arm trf: needs a model conditioned on the first frame" in capsys.readouterr().err


def test_own_arms_are_read(tmp_path):
    file = tmp_path / "arms.json"
    for name in ("strength_mid", "beta_mid"):  # as an earlier version wrote it
        text = '{"mine": {"about": "x", "isolation": {}, "kab": {"strength_mid": 0.5, "layers": [1, 1]}}}'
        file.write_text(text.replace("strength_mid", name))
        (mine,) = read_own(file)
        assert mine.method == Method(Isolation(), KAB(strength_mid=0.5, layers=(1, 1))) and mine.about == "x"
    assert choose(["wan", "mine"], (mine,))[-1] is mine
    for text in (
        "[]",
        "{",
        '{"a": {"kab": {"nonsense": 1}}}',
        '{"a": {"other": {}}}',
        '{"a": {"kab": {"strength_mid": -1}}}',
        '{"a": {"kind": "trf"}}',
        '{"a": {"kind": "random-bias", "retro": {}}}',
        '{"a": {"kind": "uniform-scale", "kab": {}}}',
        '{"../up": {}}',
        '{"": {}}',
        '{"a|b": {}}',
        '{"all": {}}',
        "[" * 100_000,
        '{"a": {"kab": {"strength_mid": 1' + 400 * "0" + "}}}",
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match="not a file of arms"):
            read_own(file)
    file.write_text('{"wan": {}}')
    with pytest.raises(ValueError, match="'wan' is taken"):
        read_own(file)


def test_profiles_are_the_products():
    for name, method in METHODS.items():
        assert choose([name])[0].method == method


def test_videos_are_laid_out_for_vbench(tmp_path, model, capsys):
    start(plan(["wan"], clips=2, videos=True), tmp_path / "out", model)
    line = ["vbench", str(tmp_path / "out"), "--arm", "wan", "--length", str(FRAMES), "--out", str(tmp_path / "vb")]
    assert cli.main(line) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and all(f"--videos_path {tmp_path / 'vb' / 'videos'}" in one for one in printed)
    assert {file.name for file in (tmp_path / "vb" / "videos").iterdir()} == {"dev-00000-0.mp4", "dev-00001-0.mp4"}
    assert cli.main([*line[:-1], str(tmp_path / "a b")]) == 2
    assert "through a shell" in capsys.readouterr().err and not (tmp_path / "a b").exists()
    assert cli.main([*line[:3], "paper", *line[4:]]) == 2
    assert "no scores for arm paper" in capsys.readouterr().err
    (tmp_path / "out" / "videos" / "wan" / str(FRAMES) / "dev-00001-0.mp4").unlink()
    assert cli.main([*line[:-1], str(tmp_path / "other")]) == 2
    assert "1 of 2 videos missing, dev-00001-0 first" in capsys.readouterr().err and not (tmp_path / "other").exists()
    lines = tmp_path / "out" / LINES
    lines.write_bytes(lines.read_bytes().splitlines(keepends=True)[0])
    assert cli.main([*line[:-1], str(tmp_path / "other")]) == 2
    assert "wan has 1 of 2 clips of 9 frames" in capsys.readouterr().err and not (tmp_path / "other").exists()
