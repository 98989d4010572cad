"""Films from the command line: what they consist of, that stopped ones go on to the same bits, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import imageio.v3 as iio
import jax
import numpy as np
import pytest
import stopping
from nano import write_model, write_place
from PIL import Image

from samplers import command, film, pipeline, recall, request, resume, storyboard, video
from wanjax import keyframes

STEPS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, keyframes, and the films of uninterrupted runs, with overlap and without."""
    folder = write_place(tmp_path_factory.mktemp("place"), "abcd")
    write_model(folder / "other", seed=1)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 16, 3), dtype=np.uint8)).save(folder / "upright.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    for overlap in (0, 4):
        assert command.main(line(folder, folder / f"whole{overlap}.mp4", overlap)) == 0
    return folder


def images(place, names):
    return [str(place / f"{name}.png") for name in names]


def line(place, out, overlap, *extra):
    return ["--model", str(place / "nano"), "--storyboard", *images(place, "abc"), "--frames", "9", "13", "--prompts",
            "a red circle", "a blue square moves", "--steps", str(STEPS), "--save-every", "1", "--out", str(out),
            "--scale", "2", "--quiet", *(["--overlap", str(overlap)] if overlap else []), *map(str, extra)]  # fmt: skip


def same(place, out, overlap):
    for suffix in (".mp4", ".sheet.png"):
        assert out.with_suffix(suffix).read_bytes() == (place / f"whole{overlap}").with_suffix(suffix).read_bytes()
    assert not out.with_suffix(".run").exists()


@pytest.mark.parametrize("overlap", [0, 4])
def test_a_film_has_all_its_frames_and_every_keyframe_once(place, overlap, monkeypatch):
    out = place / f"whole{overlap}.mp4"
    assert len(iio.imread(out, plugin="pyav")) == 9 + 13 - 1
    told = json.loads(out.with_suffix(".json").read_text())
    board = told["storyboard"]
    assert board["places"] == [0, 8, 20] and board["overlap"] == overlap
    assert board["images"] == images(place, "abc")
    assert board["clips"] == [{"prompt": "a red circle", "frames": 9, "seed": 0},
                              {"prompt": "a blue square moves", "frames": 13, "seed": 1}]  # fmt: skip
    assert set(told["seconds"]) >= {"load", "encode", "denoise", "decode", "total"}
    with Image.open(out.with_suffix(".sheet.png")) as sheet:
        assert sheet.width > 9 * 128 - 9 * 24


@pytest.mark.parametrize("overlap", [0, 4])
def test_frames_are_those_of_the_library(place, tmp_path, overlap):
    """Lossless; without overlap also those of the single clips, the shared keyframe from the first of them."""
    from wanjax import checkpoint

    out = tmp_path / "film"
    assert command.main([*line(place, out, overlap), "--scale", "1"]) == 0
    made = np.stack([np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))])
    model = checkpoint.load(place / "nano")
    texts = ["a red circle", "a blue square moves"]
    whole = film.film(model, images(place, "abc"), texts, [9, 13], seeds=[0, 1], overlap=overlap, steps=STEPS)
    np.testing.assert_array_equal(made, whole.video)
    if not overlap:
        single = pipeline.inbetween(model, *images(place, "bc"), texts[1], frames=13, seed=1, steps=STEPS).video[0]
        np.testing.assert_array_equal(made[9:], single[1:])


def test_keyframes_in_the_sheet_are_those_given(place, tmp_path, monkeypatch):
    seen = []
    whole = video.contact_sheet
    monkeypatch.setattr(video, "contact_sheet", lambda *a, **o: (seen.append((a, o)), whole(*a, **o))[1])
    assert command.main(line(place, tmp_path / "film.mp4", 0)) == 0
    (((frames, shown), options),) = seen
    assert len(frames) == 21 and options["at"] == (0, 8, 20)
    for path, pixels in zip(images(place, "abc"), shown, strict=True):
        np.testing.assert_array_equal(np.asarray(keyframes.read(path)), pixels)


@pytest.mark.parametrize("overlap", [0, 4])
def test_a_film_made_again_from_its_report(place, tmp_path, overlap):
    again = ["--from", str(place / f"whole{overlap}.json"), "--quiet", "--out", str(tmp_path / "again.mp4")]
    assert command.main(again) == 0
    same(place, tmp_path / "again.mp4", overlap)
    assert recall.read(place / f"whole{overlap}.json").storyboard["overlap"] == overlap
    assert command.main([*again, "--seed", "5", "--overlap", "0", "--frames", "5", "--overwrite"]) == 0
    board = json.loads((tmp_path / "again.json").read_text())["storyboard"]
    assert [(clip["frames"], clip["seed"]) for clip in board["clips"]] == [(5, 5), (5, 6)] and board["overlap"] == 0


def stop_at(monkeypatch, point, how):
    """Calls `how` at a point of the next film."""

    def at(owner, name, count=1):
        stopping.before(monkeypatch, owner, name, how, count)

    points = {
        "loading": lambda: at(storyboard.checkpoint, "load"),
        "encoding": lambda: at(pipeline, "encode_images", 2),
        "encoded": lambda: at(film, "denoise"),
        "step 2": lambda: at(resume.RunFolder, "keep", 3),  # of conditions, and of two steps the second
        "denoised": lambda: at(pipeline, "decode"),
        "second clip": lambda: at(pipeline, "decode", 2),
        "writing": lambda: at(video, "write_png"),
        "written": lambda: at(video, "write_json"),
    }
    points[point]()


POINTS = {"loading": None, "encoding": None, "encoded": 0, "step 2": 1, "denoised": STEPS, "second clip": STEPS,
          "writing": STEPS, "written": STEPS}  # fmt: skip


@pytest.mark.parametrize("overlap", [0, 4])
@pytest.mark.parametrize("point", POINTS)
def test_an_interrupted_film_goes_on_to_the_same_bits(place, tmp_path, monkeypatch, capsys, point, overlap):
    def interrupt():
        raise KeyboardInterrupt

    out, done = tmp_path / "film.mp4", POINTS[point]
    with monkeypatch.context() as patched:
        stop_at(patched, point, interrupt)
        assert command.main(line(place, out, overlap)) == 130
    said = capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ([] if done is None else ["film.run"])
    assert done is None or f"after step {done} of {STEPS} it goes on by the same command (film.run)" in said
    begun, lockstep = [], film.lockstep
    monkeypatch.setattr(film, "lockstep", lambda *a, **o: (begun.append(o["first"]), lockstep(*a, **o))[1])
    encoded, encode = [], film.encode
    monkeypatch.setattr(film, "encode", lambda *a, **o: (encoded.append(1), encode(*a, **o))[1])
    assert command.main(line(place, out, overlap)) == 0
    assert begun == ([] if done == STEPS else [done or 0]) and len(encoded) == (done is None)
    same(place, out, overlap)


@pytest.fixture
def stopped(place, tmp_path, monkeypatch):
    """The output of a film that was stopped in its second step."""

    def interrupt():
        raise KeyboardInterrupt

    out = tmp_path / "film.mp4"
    with monkeypatch.context() as patched:
        stop_at(patched, "step 2", interrupt)
        assert command.main(line(place, out, 4)) == 130
    return out


@pytest.mark.parametrize(
    "change, named",
    [
        (["--steps", "5"], "steps 3 there, 5 now"),
        (["--seed", "7"], "clips"),
        (["--prompts", "a red circle"], "prompt"),
        (["--frames", "13", "9"], "frames"),
        (["--overlap", "0"], "clips 1.settings.frames 13 there, 9 now"),
        (["--storyboard", "a.png", "b.png", "d.png"], "keyframes"),
        (["--storyboard", "a.png", "b.png"], "clips"),
        (["--model", "other"], "model"),
    ],
)
def test_another_film_is_refused(place, stopped, capsys, change, named):
    change = [str(place / part) if part.endswith(".png") or part == "other" else part for part in change]
    if change[-1].endswith("b.png"):
        change += ["--frames", "9", "--prompts", "a red circle"]
    before = {path.name: path.read_bytes() for path in stopped.with_suffix(".run").iterdir()}
    assert command.main([*line(place, stopped, 4), *change]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert named in message and "--restart" in message
    assert {path.name: path.read_bytes() for path in stopped.with_suffix(".run").iterdir()} == before


def test_a_stopped_film_goes_on_or_begins_anew(place, stopped, monkeypatch):
    begun, lockstep = [], film.lockstep
    monkeypatch.setattr(film, "lockstep", lambda *a, **o: (begun.append(o["first"]), lockstep(*a, **o))[1])
    assert command.main([*line(place, stopped, 4), "--restart", "--memory", "stage"]) == 0
    assert begun == [0]
    same(place, stopped, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--storyboard", "a.png"], "storyboard: 1 image; a film takes at least 2"),
        (["--prompts", "a", "b", "c"], "prompts: 3 given for 2 clips; give one for each, or one"),
        (["--frames", "9", "9", "9"], "frames: 3 given for 2 clips; give one for each, or one"),
        (["--frames", "9", "12"], "frames 12"),
        (["--frames", "1"], "frames 1"),
        (["--overlap", "3"], "overlap 3: give a multiple of 4"),
        (["--overlap", "-4"], "overlap -4"),
        (["--overlap", "8"], "overlap 8: more than half of a clip of 9 frames; give at most 4"),
        (["--frames", "85"], "clip 1: 85 frames; the weights know at most 81"),
        (["--frames", "81", "--overlap", "4"], "clip 1: 85 frames with its overlap; the weights know at most 81"),
        (["--first", "a.png"], "--storyboard: --first is of a single clip"),
        (["--keyframe", "a.png@3"], "--storyboard: --keyframe is of a single clip"),
        (["--prompt", "a"], "--storyboard: --prompt is of a single clip"),
        (["--seeds", "0-3"], "--storyboard: --seeds is of a single clip"),
        (["--count", "2"], "--storyboard: --count is of a single clip"),
        (["--keep-latents"], "--storyboard: --keep-latents is of a single clip"),
        (["--preview-every", "1"], "--storyboard: --preview-every is of a single clip"),
        (["--explain", "plots"], "--storyboard: --explain is of a single clip"),
        (["--jobs", "x.jsonl"], "--jobs and --storyboard: give one of them"),
        (["--decode", "x.safetensors"], "--decode and --storyboard: give one of them"),
        (["--method", "auto"], "--method auto: chooses for one clip"),
        (["--solver", "lcm", "--overlap", "4"], "overlap: solver lcm"),
        (["--storyboard", "a.png", "none.png"], "none.png"),
        (["--storyboard", "a.png", "broken.png"], "broken.png"),
        (["--out", "film.avi"], "unknown suffix"),
        (["--out", "none/film.mp4"], "no folder"),
    ],
)
def test_what_is_no_film(place, tmp_path, capsys, monkeypatch, change, message):
    def never(*_, **__):
        raise AssertionError("computing began")

    monkeypatch.setattr(storyboard, "make", never)
    monkeypatch.chdir(tmp_path)
    if "--storyboard" in change:
        change = [*change, "--frames", "9", "--prompts", "a"]
    change = [str(place / part) if part.endswith(".png") else part for part in change]
    assert command.main([*line(place, tmp_path / "film.mp4", 0), *change]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options, message", [
    (["--prompts", "a"], "--prompts: belongs to --storyboard"),
    (["--overlap", "4"], "--overlap: belongs to --storyboard"),
    (["--frames", "5", "9"], "--frames: several belong to --storyboard"),
])  # fmt: skip
def test_what_belongs_to_a_film(place, tmp_path, capsys, options, message):
    own = ["--first", str(place / "a.png"), "--last", str(place / "b.png"), "--out", str(tmp_path / "x.mp4")]
    assert command.main([*own, *options]) == 2
    assert message in capsys.readouterr().err


def test_all_clips_have_the_size_of_the_first_keyframe(place, tmp_path):
    """--size auto, keyframes of several shapes."""
    own = {"model": place / "nano", "frames": [5], "size": "auto"}
    board = storyboard.prepare(images(place, ["a", "upright", "b"]), tmp_path / "film.mp4", **own)
    assert [clip.settings.size for clip in board.clips] == [board.clips[0].settings.size] * 2
    upright = storyboard.prepare(images(place, ["upright", "a", "b"]), tmp_path / "film.mp4", **own)
    assert {clip.settings.size for clip in upright.clips} == {board.clips[0].settings.size[::-1]}


def test_all_clips_use_the_memory_of_the_longest(place, tmp_path, monkeypatch):
    """There is one model for all of them."""
    choose = request.memory.choose

    def scarce(config, settings, mesh, *, policy, **more):
        policy = "stage" if policy == "auto" and settings.frames > 9 else policy
        return choose(config, settings, mesh, policy=policy, **more)

    monkeypatch.setattr(request.memory, "choose", scarce)
    own = {"model": place / "nano", "frames": [5, 13]}
    board = storyboard.prepare(images(place, "abc"), tmp_path / "film.mp4", **own)
    assert [clip.memory.policy for clip in board.clips] == ["stage", "stage"]
    assert board.clips[0].config == board.clips[1].config


@pytest.mark.parametrize("change", [{"overlap": None}, {"overlap": "4"}, {"images": [1, 2, 3]}, {"images": None},
                                    {"clips": []}, {"clips": [{"prompt": "a"}]}])  # fmt: skip
def test_a_report_that_is_damaged(place, tmp_path, capsys, change):
    told = json.loads((place / "whole4.json").read_text())
    told["storyboard"] |= change
    (tmp_path / "film.json").write_text(json.dumps(told))
    assert command.main(["--from", str(tmp_path / "film.json"), "--out", str(tmp_path / "x.mp4")]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert "film.json: its storyboard is damaged" in message


@pytest.mark.parametrize("options, message", [
    (["--first", "a.png"], "--storyboard: --first is of a single clip"),
    (["--seeds", "0-3"], "--storyboard: --seeds is of a single clip"),
    (["--prompt", "a"], "--storyboard: --prompt is of a single clip"),
    (["--jobs", "x.jsonl"], "--jobs and --storyboard"),
])  # fmt: skip
def test_what_a_film_of_a_report_does_not_take(place, tmp_path, capsys, options, message):
    own = ["--from", str(place / "whole4.json"), "--out", str(tmp_path / "x.mp4")]
    assert command.main([*own, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_clips_settings_for_a_film(place, tmp_path):
    """--from a single clip, --storyboard beside it: the settings are its, its keyframes are not."""
    own = ["--model", str(place / "nano"), "--first", str(place / "a.png"), "--last", str(place / "b.png"), "--prompt",
           "a red circle", "--guidance", "1.5", "--steps", "1", "--quiet"]  # fmt: skip
    assert command.main([*own, "--out", str(tmp_path / "clip.mp4")]) == 0
    again = ["--from", str(tmp_path / "clip.json"), "--storyboard", *images(place, "cd"), "--quiet"]
    assert command.main([*again, "--out", str(tmp_path / "film.mp4")]) == 0
    told = json.loads((tmp_path / "film.json").read_text())
    assert told["storyboard"]["images"] == images(place, "cd") and told["settings"]["guidance"] == 1.5


@pytest.mark.slow
@pytest.mark.parametrize("point", ["encoded", "step 2", "second clip", "written"])
def test_a_killed_film_goes_on_to_the_same_bits(place, tmp_path, point):
    """SIGKILL, of a process of its own."""
    out = tmp_path / "film.mp4"
    script = textwrap.dedent(f"""
        import os, signal, pytest, test_storyboard
        from samplers import command
        with pytest.MonkeyPatch.context() as patched:
            test_storyboard.stop_at(patched, {point!r}, lambda: os.kill(os.getpid(), signal.SIGKILL))
            command.main({line(place, out, 4)!r})
    """)
    path = os.pathsep.join([os.path.dirname(__file__), os.getcwd()])
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not out.exists() and not out.with_suffix(".json").exists()
    assert command.main(line(place, out, 4)) == 0
    same(place, out, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.json", "film.mp4", "film.sheet.png"]


@pytest.mark.slow
def test_a_film_on_a_mesh(place, tmp_path, monkeypatch):
    """Two devices share the tokens: the film of one device but for rounding, also when it was stopped (same bits)."""

    def interrupt():
        raise KeyboardInterrupt

    def frames(folder):
        return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]).astype(int)

    devices = jax.devices()[:2]
    assert command.main([*line(place, tmp_path / "one", 4), "--scale", "1"]) == 0
    monkeypatch.setattr(jax, "devices", lambda: devices)  # a mesh takes all there are
    shared = ["--scale", "1", "--mesh", "sequence=2"]
    assert command.main([*line(place, tmp_path / "two", 4), *shared]) == 0
    with monkeypatch.context() as patched:
        stop_at(patched, "step 2", interrupt)
        assert command.main([*line(place, tmp_path / "stopped", 4), *shared]) == 130
    assert command.main([*line(place, tmp_path / "stopped", 4), *shared]) == 0
    np.testing.assert_array_equal(frames(tmp_path / "two"), frames(tmp_path / "stopped"))
    assert np.abs(frames(tmp_path / "two") - frames(tmp_path / "one")).max() <= 1
