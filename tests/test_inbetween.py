"""The command line: outputs, and every bad input noticed in one line before any computing."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import jax
import numpy as np
import pytest
from nano import edit_config, write_model
from PIL import Image

from samplers import command, files, options


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "nano")


@pytest.fixture
def job(tmp_path, model):
    """Arguments of a good run, to be spoiled one at a time."""
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (16, 24, 3)), ("b.png", (32, 40, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    return {
        "--first": tmp_path / "a.png", "--last": tmp_path / "b.png", "--prompt": "a red circle",
        "--model": model, "--out": tmp_path / "clip.mp4",
    }  # fmt: skip


def arguments(job, *extra):
    return [str(part) for pair in job.items() for part in pair] + [str(part) for part in extra]


@pytest.fixture
def no_compute(monkeypatch):
    def never(*_, **__):
        raise AssertionError("computing began")

    monkeypatch.setattr(files, "make", never)


def test_makes_video_sheet_and_settings(job, capsys):
    assert command.main(arguments(job, "--steps", 2, "--seed", 5, "--frames", 9)) == 0
    out = job["--out"]
    assert iio.imread(out, plugin="pyav").shape == (9, 256, 384, 3)
    assert iio.imread(out.with_name("clip.sheet.png")).shape[1] > 128
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["settings"]["seed"] == 5 and report["settings"]["frames"] == 9
    assert report["settings"]["size"] == [16, 24] and report["settings"]["guidance"] == 2.0
    assert {"load", "encode", "compile", "denoise", "decode", "write", "total"} == set(report["seconds"])
    assert report["versions"]["jax"]
    captured = capsys.readouterr()
    assert "last keyframe 32x40 is brought to 16x24 by stretch" in captured.err
    assert "first keyframe" not in captured.err
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "a.png", "b.png", "clip.json", "clip.mp4", "clip.sheet.png",
    ]  # fmt: skip


@pytest.mark.slow
def test_method_by_name_with_single_changes(job, tmp_path):
    extra = ["--method", "release", "--no-kab", "--s-mid", 0.9, "--branch-weights", "1,0.5,0.5", "--frames", 25]
    assert command.main(arguments(job, *extra, "--explain", tmp_path / "plots")) == 0
    report = json.loads(job["--out"].with_suffix(".json").read_text())
    method = report["settings"]["method"]
    assert method["kab"] is None and method["isolation"] == {"weights": [1.0, 0.5, 0.5]}
    assert method["retro"]["mode"] == "magnitude" and method["retro"]["s_mid"] == 0.9
    assert report["method"]["w_edge"] == 2 and len(report["method"]["retro_scale"]) == 7
    assert {path.suffix for path in (tmp_path / "plots").iterdir()} == {".png", ".json"}


@pytest.mark.slow
def test_plots_that_fail_leave_no_video(job, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.explain, "draw", fail)
    assert command.main(arguments(job, "--explain", tmp_path / "plots")) == 130
    assert "after step 3 of 3 it goes on by the same command (clip.run)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "clip.run"]


@pytest.mark.slow
def test_same_seed_same_frames(job, tmp_path):
    videos = []
    for name in ("one", "two"):
        job["--out"] = tmp_path / name
        assert command.main(arguments(job, "--scale", 1, "--quiet")) == 0
        videos.append(np.stack([iio.imread(frame) for frame in sorted((tmp_path / name).iterdir())]))
    assert videos[0].shape == (5, 16, 24, 3)
    assert np.array_equal(*videos)


def spoil(job, tmp_path, name):
    """Changes the good job in one way; returns further arguments."""
    if name == "missing image":
        job["--first"] = tmp_path / "nowhere.png"
    elif name == "empty image":
        (tmp_path / "a.png").write_bytes(b"")
    elif name == "truncated image":
        data = (tmp_path / "b.png").read_bytes()
        (tmp_path / "b.png").write_bytes(data[: len(data) // 2])
    elif name == "not an image":
        (tmp_path / "a.png").write_text("<html>not found</html>")
    elif name == "one keyframe":
        del job["--last"]
    elif name == "unknown model":
        job["--model"] = tmp_path / "wan"
    elif name == "not a model":
        (tmp_path / "wan").mkdir()
        job["--model"] = tmp_path / "wan"
    elif name == "existing output":
        job["--out"].write_bytes(b"precious")
    elif name == "existing sheet":
        job["--out"].with_name("clip.sheet.png").write_bytes(b"precious")
    elif name == "output folder missing":
        job["--out"] = tmp_path / "no" / "clip.mp4"
    elif name == "output folder is a file":
        job["--out"] = tmp_path / "a.png" / "clip.mp4"
    elif name == "unwritable output":
        job["--out"] = "/proc/clip.mp4"
    elif name == "unknown suffix":
        job["--out"] = tmp_path / "clip.avi"
    return []


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing image", "nowhere.png"),
        ("empty image", "a.png.*empty"),
        ("truncated image", "b.png.*truncated"),
        ("not an image", "a.png.*not an image"),
        ("one keyframe", "give both --first and --last"),
        ("unknown model", "wan.*no such folder"),
        ("not a model", "no config.json"),
        ("existing output", "clip.mp4.*--overwrite"),
        ("existing sheet", "clip.sheet.png.*--overwrite"),
        ("output folder missing", "mkdir"),
        ("output folder is a file", "a.png"),
        ("unwritable output", "/proc"),
        ("unknown suffix", "unknown suffix .avi"),
    ],
)
def test_bad_files(job, tmp_path, capsys, no_compute, name, message):
    extra = spoil(job, tmp_path, name)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert command.main(arguments(job, *extra)) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--frames", 24], "frames 24: must be 4n+1 with n at least 1; the nearest are 21 and 25"),
        (["--frames", 1], "nearest are 5 and 9"),
        (["--size", "18x24"], "nearest size is 16x24"),
        (["--steps", 0], "steps"),
        (["--steps", 10**9], "1 to 1000"),
        (["--guidance-interval", "0.5-0.2"], "guidance interval 0.5-0.2"),
        (["--guidance", "inf"], "guidance inf"),
        (["--shift", -3], "shift"),
        (["--seed", -1], "seed -1"),
        (["--fps", 0], "fps 0"),
        (["--scale", 0], "scale 0"),
        (["--scale", 1000], "16000x24000 pixels after scaling, the format holds 16384 a side"),
        (["--mesh", "rows=8"], "mesh axis rows"),
        (["--mesh", "data=3"], "3 places for"),
        (["--mesh", "tensor=8"], "mesh tensor=8: does not divide the 2 heads; give one of 1, 2"),
        (
            ["--mesh", "sequence=8"],
            "mesh sequence=8: does not divide the 2 heads; give one of 1, 2 and the rest to fsdp",
        ),
        (["--devices", "9"], "devices 9: there are 8; give a number from 1 to 8, or all"),
        (["--devices", "2", "--mesh", "fsdp=8"], "a mesh says already how many devices"),
        (["--size", "65536x65536"], "largest size of this shape is"),
        (["--strength-end", 0.5], "strength_end 0.5: kab is off; switch it on (--kab, or --method paper)"),
        (["--no-retro", "--s-mid", 0.9, "--method", "paper"], "s_mid 0.9: retro is off"),
        (["--kab", "--strength-end", -0.1], "strength_end -0.1: give a number from 0"),
        (["--kab", "--strength-mid", "nan"], "strength_mid nan"),
        (["--kab", "--kab-layers", "5-12"], "kab layers 5-12: the model has layers 0 to 1"),
        (["--kab", "--kab-steps", "0.4-0.1"], "kab steps 0.4-0.1"),
        (["--kab", "--kab-floor", 0], "kab floor 0"),
        (["--kab", "--anchor-curve", "0,1,1"], "anchor curve of 3 numbers: give one for each of the 2 latent frames"),
        (["--kab", "--anchor-curve", "0,1.5"], "anchor curve: every number must lie within 0..1"),
        (["--kab", "--anchor-curve", "bend"], "anchor curve 'bend': choose linear"),
        (["--isolation", "--branch-weights", "1,1"], "branch weights 1,1: give three numbers"),
        (["--isolation", "--branch-weights", "1,-1,1"], "branch weights 1,-1,1"),
        (["--retro", "--s-mid", 0], "s_mid 0.0: give a number above 0"),
        (["--retro", "--s-edge", "inf"], "s_edge inf"),
        (["--retro", "--w-edge", 4], "w_edge 4: must be from 1 to 2.5 pixel frames"),
        (["--retro", "--retro-smooth", -1], "retro smooth -1"),
        (["--explain-layer", 1], "give a folder"),
        (["--explain", "plots", "--explain-layer", 2], "layer 2"),
        (["--explain", "plots", "--explain-step", 3], "step 3"),
        (["--explain", "/proc/plots"], "/proc"),
        (["--out", "plots", "--explain", "plots"], "in each other's way"),
    ],
)
def test_bad_settings(job, capsys, no_compute, extra, message):
    assert command.main(arguments(job, *extra)) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and message in error


SYNTAX = [
    ["--preset", "turbo"], ["--timesteps", "rounded"], ["--clip-fit", "pad"], ["--guidance-interval", "0.5"],
    ["--size", "big"], ["--solver", "heun"], ["--matte", "1,2"], ["--mesh", "data"], ["--method", "ours"],
    ["--devices", "few"],
    ["--retro-mode", "twist"], ["--kab-layers", "5"], ["--kab-steps", "a-b"], ["--branch-weights", "1,x,1"],
    ["--anchor-curve", "0,x"],
]  # fmt: skip


@pytest.mark.parametrize("extra", SYNTAX, ids=str)
def test_bad_syntax_exits_with_2_and_one_line(job, extra, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments(job, *extra))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert extra[0] in line


RENAMED = [
    ("grid", "schedule", "linear"),
    ("beta-end", "strength-end", "0.5"),
    ("beta-mid", "strength-mid", "0.5"),
    ("kab-eps", "kab-floor", "0.1"),
]


@pytest.mark.parametrize("old, new, value", RENAMED)
def test_old_names_of_options(old, new, value):
    read = command.parser().parse_args
    for line in ([f"--{old}", value], [f"--{old}={value}"]):
        assert read(options.renamed(line)) == read([f"--{new}", value]) != read([])


def test_damaged_weights_fail_in_one_line(job, tmp_path, capsys):
    folder = write_model(tmp_path / "damaged")
    file = folder / "dit.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    job["--model"] = folder
    assert command.main(arguments(job)) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(r"dit.safetensors.*damaged", error) and "\n" not in error
    assert not job["--out"].exists()


def test_config_of_another_model_is_named(job, tmp_path, capsys, no_compute):
    folder = write_model(tmp_path / "odd")
    edit_config(folder, colour="red")
    job["--model"] = folder
    assert command.main(arguments(job)) == 2
    assert "colour" in capsys.readouterr().err


def test_long_prompt_is_cut_and_said(job, capsys):
    job["--prompt"] = "red " * 20
    assert command.main(arguments(job, "--steps", 1)) == 0
    assert "21 tokens, the model takes 8; the last 13 are dropped" in capsys.readouterr().err


def test_files_to_files_from_python(job, tmp_path):
    report = files.inbetween_files(
        job["--first"], job["--last"], tmp_path / "frames", model=job["--model"], prompt="a circle", steps=1
    )
    assert len(list((tmp_path / "frames").iterdir())) == 5
    assert json.loads(json.dumps(report)) == json.loads((tmp_path / "frames.json").read_text())
    assert report["settings"]["prompt"] == "a circle"


@pytest.mark.slow
def test_mesh_from_the_command_line(job, monkeypatch):
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: two)
    assert command.main(arguments(job, "--mesh", "sequence=2", "--steps", 1)) == 0
    assert json.loads(job["--out"].with_suffix(".json").read_text())["settings"]["mesh"] == {"sequence": 2}


@pytest.mark.slow
def test_matte_shows_around_padded_keyframes(job, tmp_path):
    extra = ["--fit", "pad", "--matte", "255,0,0", "--size", "16x40", "--steps", 1]
    prepared = files.prepare(job["--first"], job["--last"], job["--out"], model=job["--model"],
                             fit="pad", matte=(255, 0, 0), size=(16, 40))  # fmt: skip
    first = prepared.inputs.pixels[0, 0]
    assert (first[:, :8] == [255, 0, 0]).all() and not (first[:, 8:32] == [255, 0, 0]).all()
    assert command.main(arguments(job, *extra)) == 0
    assert json.loads(job["--out"].with_suffix(".json").read_text())["settings"]["matte"] == [255, 0, 0]


def test_output_that_is_a_keyframe(job, tmp_path, capsys, no_compute):
    job["--first"] = tmp_path / "a.gif"
    Image.new("RGB", (24, 16)).save(job["--first"])
    job["--out"] = tmp_path / "a.gif"
    assert command.main(arguments(job, "--overwrite")) == 2
    assert "is the input" in capsys.readouterr().err


def test_overwrite_replaces(job):
    assert command.main(arguments(job, "--steps", 1)) == 0
    first = job["--out"].read_bytes()
    assert command.main(arguments(job, "--overwrite", "--steps", 1, "--frames", 9)) == 0
    assert iio.imread(job["--out"], plugin="pyav").shape[0] == 9 and job["--out"].read_bytes() != first


def test_overwrite_never_replaces_what_is_not_ours(job, tmp_path, capsys, no_compute):
    """A foreign video, sheet or JSON, and a folder with the keyframes in it."""
    for name in ("clip.mp4", "clip.sheet.png", "clip.json"):
        (tmp_path / name).write_bytes(b'{"name": "precious"}')
        assert command.main(arguments(job, "--overwrite")) == 2
        assert re.search(rf"{name}.*wanjax did not write it", capsys.readouterr().err)
        assert (tmp_path / name).read_bytes() == b'{"name": "precious"}'
        (tmp_path / name).unlink()
    frames = tmp_path / "frames"
    frames.mkdir()
    for option, name in (("--first", "00000.png"), ("--last", "00009.png")):
        job[option] = (tmp_path / "a.png").rename(frames / name) if option == "--first" else frames / name
    Image.new("RGB", (24, 16)).save(frames / "00009.png")
    job["--out"] = frames
    assert command.main(arguments(job, "--overwrite")) == 2
    assert "the input" in capsys.readouterr().err
    assert sorted(path.name for path in frames.iterdir()) == ["00000.png", "00009.png"]


def test_ctrl_c_leaves_nothing(job, tmp_path):
    """A real SIGINT in the middle of denoising, of a run that keeps nothing."""
    command = [sys.executable, "-m", "samplers.inbetween", *arguments(job, "--steps", 1000, "--save-every", 0)]
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=env, bufsize=0) as process:
        seen = b""
        while b"1/1000" not in seen.replace(b" ", b"") and b"%|" not in seen:
            piece = process.stderr.read(64)
            assert piece, seen.decode()
            seen += piece
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "error, code, message",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (MemoryError(), 1, "out of memory"),
    ],
)
@pytest.mark.parametrize("writer", ["write_png", "write", "write_json"])
def test_failure_while_writing_leaves_nothing_new(job, tmp_path, capsys, monkeypatch, writer, error, code, message):
    """At each of the three outputs; what was there before --overwrite stays."""
    monkeypatch.setattr(files.work, "encode", lambda *_: None)
    monkeypatch.setattr(files.work, "denoise", lambda *_: None)
    monkeypatch.setattr(files.work, "decode", lambda *_: np.zeros((5, 16, 24, 3), np.uint8))
    written = getattr(files.video, writer)

    def fail(*arguments):
        written(*arguments)
        raise error

    monkeypatch.setattr(files.video, writer, fail)
    with monkeypatch.context() as whole:
        whole.setattr(files.video, writer, written)
        assert command.main(arguments(job)) == 0
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert command.main(arguments(job, "--overwrite")) == code
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_ctrl_c_while_checking(job, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "prepare", interrupt)
    assert command.main(arguments(job)) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted; nothing was written")


def test_device_out_of_memory_is_one_line(job, capsys, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")

    monkeypatch.setattr(files, "make", fail)
    assert command.main(arguments(job)) == 1
    assert "Out of memory allocating 9 bytes.; if memory" in capsys.readouterr().err.strip().splitlines()[-1]


def test_help_groups_options_and_gives_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in ("keyframes and text:", "sampling:", "output:", "flf2v_14b: 81 frames, 480x864, 50 steps"):
        assert part in text


@pytest.mark.slow
def test_devices_that_are_not_there_are_one_line(job, tmp_path):
    """Of any platform, also where the model's folder is bad: the devices are asked first."""
    for platform in ("cuda", "tpu", "gpu", "nonsense"):
        command_line = [sys.executable, "-m", "samplers.inbetween", *arguments(job)]
        env = os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": os.getcwd(), "XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run(command_line, capture_output=True, text=True, env=env)
        assert done.returncode == 2, done.stderr
        told = [line for line in done.stderr.splitlines() if "error" in line]
        assert len(told) == 1 and platform in told[0] and "Traceback" not in done.stderr
    assert not job["--out"].exists()


@pytest.mark.slow
def test_a_closed_output_is_no_traceback(job, tmp_path):
    """`| head -0`: the video is made, and nothing is said of the pipe."""
    line = shlex.join([sys.executable, "-m", "samplers.inbetween", *arguments(job, "--steps", 1, "--quiet")])
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(["bash", "-c", f"{line} | true"], capture_output=True, text=True, env=env)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert job["--out"].exists()


def test_help_imports_little():
    """No weights' libraries, no video library, and it does not start JAX's devices."""
    code = """
import runpy, sys
sys.argv = ["x", "--help"]
try:
    runpy.run_module("samplers.inbetween", run_name="__main__")
except SystemExit:
    print(sorted(name for name in sys.modules if "." not in name))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": os.getcwd()})  # fmt: skip
    loaded = set(re.findall(r"'(\w+)'", done.stdout.splitlines()[-1]))
    assert "samplers" in loaded
    assert not loaded & {"orbax", "tensorstore", "torch", "av", "imageio", "huggingface_hub", "transformers", "psutil"}
