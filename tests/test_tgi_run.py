"""The runner on a random model: every arm is scored, kill and resume, bad input."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
from nano import write_model
from tgi_nano import CONFIG, FRAMES, plan, start

from benchmarks.tgi import __main__ as cli
from benchmarks.tgi import generate, run
from benchmarks.tgi.arms import ARMS, choose
from benchmarks.tgi.neural import Neural
from benchmarks.tgi.scores import LINES, Scores, ScoresError, by_clip, unfinished
from wanjax import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "nano", CONFIG)


@pytest.fixture(scope="module")
def model(folder):
    return checkpoint.load(folder)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "number, code",
    [
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
        (signal.SIGINT, 130),
    ],
)
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
    "three keyframes": (
        ["run", "--arms", "three-overlap", "--lengths", "9", "--data", "procedural-dev"],
        "arm three-overlap: overlap 4",
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
