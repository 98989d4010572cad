"""Runs that are stopped at any moment and go on: to the same bits, from where they were, and never as another run."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import stopping
from nano import NANO, write_model, write_place

from samplers import command, files, latents, pipeline, request, resume, run, video, work

STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, keyframes, and the clip of an uninterrupted run."""
    folder = write_place(tmp_path_factory.mktemp("place"))
    write_model(folder / "other", seed=1)
    assert command.main(line(folder, folder / "whole.mp4")) == 0
    return folder


def line(place, out, *extra):
    return ["--model", str(place / "nano"), "--first", str(place / "a.png"), "--last", str(place / "b.png"), "--quiet",
            "--prompt", "a red circle", "--steps", str(STEPS), "--save-every", "1", "--out", str(out), "--scale", "2",
            *map(str, extra)]  # fmt: skip


def same(place, out, whole="whole"):
    for suffix in (".mp4", ".sheet.png"):
        assert out.with_suffix(suffix).read_bytes() == (place / whole).with_suffix(suffix).read_bytes()
    assert not out.with_suffix(".run").exists()


def kept(out):
    return sorted(path.stem for path in out.with_suffix(".run").glob("*.safetensors"))


def stop_at(monkeypatch, point, how):
    """Calls `how` at a point of the next run."""

    def at(owner, name, count=1):
        stopping.before(monkeypatch, owner, name, how, count)

    places = {
        "loading": lambda: at(work.checkpoint, "load"),
        "encoding": lambda: at(pipeline, "encode_images"),
        "encoded": lambda: at(work, "denoise"),
        "step 3": lambda: at(resume.RunFolder, "keep", 4),  # of conditions, and of three steps the third
        "naming a step": lambda: at(resume.writing, "write_bytes", 4),  # the fourth file, the second carry
        "denoised": lambda: at(work, "decode"),
        "decoding": lambda: at(pipeline.keyframes, "from_unit"),
        "writing": lambda: stopping.after(monkeypatch, video, "write", how),
        "written": lambda: at(video, "write_json"),
    }
    places[point]()


POINTS = {
    "loading": (None, 0),
    "encoding": (None, 0),
    "encoded": (["encoded"], 0),
    "step 3": (["carry", "encoded"], 2),
    "naming a step": (["carry", "encoded"], 1),
    "denoised": (["carry", "encoded"], STEPS),
    "decoding": (["carry", "encoded"], STEPS),
    "writing": (["carry", "encoded"], STEPS),
    "written": (["carry", "encoded"], STEPS),
}


@pytest.mark.parametrize("point", POINTS)
def test_an_interrupted_run_goes_on_to_the_same_bits(place, tmp_path, monkeypatch, capsys, point):
    def interrupt():
        raise KeyboardInterrupt

    out, (names, done) = tmp_path / "clip.mp4", POINTS[point]
    with monkeypatch.context() as patched:
        stop_at(patched, point, interrupt)
        assert command.main(line(place, out)) == 130
    said = capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ([] if names is None else ["clip.run"])
    if names is not None:
        assert kept(out) == names and f"after step {done} of {STEPS} it goes on by the same command (clip.run)" in said
    begun = []
    original = run.run
    monkeypatch.setattr(run, "run", lambda *a, **o: (begun.append(o["first"]), original(*a, **o))[1])
    encoded = []
    whole = pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda *a, **o: (encoded.append(1), whole(*a, **o))[1])
    assert command.main(line(place, out)) == 0
    assert begun == ([] if done == STEPS else [done]) and len(encoded) == (names is None)
    if names is not None:
        assert "goes on" in capsys.readouterr().err
    same(place, out)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_to_the_same_bits(place, tmp_path, point):
    """SIGKILL, of a process of its own."""
    out = tmp_path / "clip.mp4"
    script = textwrap.dedent(f"""
        import os, signal, pytest, test_resume
        from samplers import command
        with pytest.MonkeyPatch.context() as patched:
            test_resume.stop_at(patched, {point!r}, lambda: os.kill(os.getpid(), signal.SIGKILL))
            command.main({line(place, out)!r})
    """)
    path = os.pathsep.join([os.path.dirname(__file__), os.getcwd()])
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not out.exists() and not out.with_suffix(".json").exists()
    assert command.main(line(place, out)) == 0
    same(place, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.json", "clip.mp4", "clip.sheet.png"]


@pytest.fixture
def stopped(place, tmp_path, monkeypatch):
    """The output of a run that was stopped after its second step."""

    def interrupt():
        raise KeyboardInterrupt

    out = tmp_path / "clip.mp4"
    with monkeypatch.context() as patched:
        stop_at(patched, "step 3", interrupt)
        assert command.main(line(place, out)) == 130
    return out


@pytest.mark.parametrize(
    "change, named",
    [
        (["--steps", "5"], "settings.steps 4 there, 5 now"),
        (["--seed", "7"], "settings.seed 0 there, 7 now"),
        (["--prompt", "a blue square"], "settings.prompt"),
        (["--method", "paper"], "settings.method"),
        (["--last", "c.png"], "keyframes.digest"),
        (["--keyframe", "c.png@2"], "keyframes.at"),
        (["--model", "other"], "model.digest"),
        (["--dtype", "bfloat16"], "model.digest"),
    ],
)
def test_another_run_is_refused(place, stopped, capsys, change, named):
    before = {path.name: path.read_bytes() for path in stopped.with_suffix(".run").iterdir()}
    change = [str(place / part) if part.endswith(".png") or part == "other" else part for part in change]
    change = [f"{place / 'c.png'}@2" if part.endswith("@2") else part for part in change]
    assert command.main([*line(place, stopped), *change]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert named in message and "--restart" in message
    assert {path.name: path.read_bytes() for path in stopped.with_suffix(".run").iterdir()} == before
    assert command.main(line(place, stopped)) == 0
    same(place, stopped)


def test_restart_begins_anew(place, stopped, monkeypatch):
    begun, original = [], run.run
    monkeypatch.setattr(run, "run", lambda *a, **o: (begun.append(o["first"]), original(*a, **o))[1])
    assert command.main([*line(place, stopped), "--restart"]) == 0
    assert begun == [0]
    same(place, stopped)


@pytest.mark.parametrize("how", ["--memory stage", "--memory stream", "--save-every 3"])
def test_how_it_is_computed_may_change(place, stopped, how):
    """Where the model lies changes no bit on a CPU."""
    assert command.main([*line(place, stopped), *how.split()]) == 0
    same(place, stopped)


@pytest.mark.parametrize("name", ["carry", "encoded"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "of another run"])
def test_damage_is_told_before_anything_is_lost(place, stopped, capsys, name, damage):
    file = stopped.with_suffix(".run") / f"{name}.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-5] ^= 1
    told = json.loads((stopped.with_suffix(".run") / "run.json").read_text())
    token = resume.digest({key: value for key, value in told.items() if key != "written_by"})
    other = bytes(data).replace(token.encode(), token[::-1].encode())
    file.write_bytes({"cut": data[:-100], "empty": b"", "of another run": other}.get(damage, data))
    code = command.main(line(place, stopped))
    (message,) = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("note")]
    assert code in (1, 2) and str(file) in message and "--restart" in message
    assert kept(stopped) == ["carry", "encoded"]
    assert command.main([*line(place, stopped), "--restart"]) == 0
    same(place, stopped)


@pytest.mark.parametrize("what", ["a file", "a folder of somebody", "a link", "no run.json"])
def test_what_is_not_ours_is_left_alone(place, tmp_path, capsys, what):
    out = tmp_path / "clip.mp4"
    folder = out.with_suffix(".run")
    if what == "a file":
        folder.write_text("years of work")
    elif what == "a link":
        folder.symlink_to(tmp_path)
    else:
        folder.mkdir()
        (folder / ("thesis.txt" if what != "no run.json" else "carry.safetensors")).write_text("years of work")
    for extra in ([], ["--restart"]):
        assert command.main([*line(place, out), *extra]) == 2
        assert "run folder" in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.run"]


def test_two_runs_at_once(place, tmp_path, capsys):
    out = tmp_path / "clip.mp4"
    job = request.prepare(
        place / "a.png", place / "b.png", out, model=place / "nano", prompt="a red circle", steps=STEPS
    )
    with job.kept.opened():
        assert command.main(line(place, out)) == 1
    assert "another run works in it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_where_it_is_not_wanted(place, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        stop_at(patched, "denoised", interrupt)
        assert command.main([*line(place, tmp_path / "clip.mp4"), "--save-every", "0"]) == 130
    assert list(tmp_path.iterdir()) == []


def test_noise_that_is_drawn_anew_goes_on_too(place, tmp_path, monkeypatch):
    """The consistency sampler's random keys are kept with the carry."""

    def interrupt():
        raise KeyboardInterrupt

    assert command.main([*line(place, tmp_path / "whole.mp4"), "--solver", "lcm"]) == 0
    out = tmp_path / "clip.mp4"
    with monkeypatch.context() as patched:
        stop_at(patched, "step 3", interrupt)
        assert command.main([*line(place, out), "--solver", "lcm"]) == 130
    assert command.main([*line(place, out), "--solver", "lcm"]) == 0
    same(tmp_path, out)


@pytest.mark.slow
def test_plots_of_a_run_that_went_on(place, tmp_path, monkeypatch):
    """The latents that enter the step in question are kept too, and where they are not, the run begins anew."""

    def interrupt():
        raise KeyboardInterrupt

    def numbers(folder):
        return json.loads((folder / "attention.json").read_text())

    explain = ["--method", "paper", "--explain-step", "1", "--explain"]
    assert command.main([*line(place, tmp_path / "whole.mp4"), *explain, str(tmp_path / "whole")]) == 0
    out = tmp_path / "clip.mp4"
    for asked in (True, False):
        folder = tmp_path / f"plots{asked}"
        own = [*line(place, out), *explain, str(folder)]
        with monkeypatch.context() as patched:
            stop_at(patched, "denoised", interrupt)
            assert command.main(own if asked else [*line(place, out), "--method", "paper"]) == 130
        assert command.main([*own, "--overwrite"]) == 0
        assert numbers(folder) == numbers(tmp_path / "whole")
        for path in (out, out.with_suffix(".json"), out.with_suffix(".sheet.png")):
            path.unlink()


def test_latents_are_kept_and_decoded_alone(place, tmp_path):
    out = tmp_path / "clip.mp4"
    assert command.main([*line(place, out), "--keep-latents"]) == 0
    file = tmp_path / "clip.latents.safetensors"
    stored = latents.read(file)
    assert stored.latents.shape == (2, 4, 6, 16) and stored.at == (0, 4) and stored.made_of.settings.steps == STEPS
    again = ["--decode", str(file), "--model", str(place / "nano"), "--scale", "2", "--quiet"]
    assert command.main([*again, "--out", str(tmp_path / "again.mp4")]) == 0
    assert (tmp_path / "again.mp4").read_bytes() == out.read_bytes()
    assert (tmp_path / "again.sheet.png").read_bytes() == out.with_suffix(".sheet.png").read_bytes()
    assert command.main([*again, "--out", str(tmp_path / "more.gif"), "--fps", "5"]) == 0


@pytest.mark.parametrize("kind", ["missing", "a picture", "cut", "another file", "not finite", "another model"])
def test_latents_that_cannot_be_decoded(place, tmp_path, capsys, kind):
    assert command.main([*line(place, tmp_path / "clip.mp4"), "--keep-latents"]) == 0
    file, model = tmp_path / "clip.latents.safetensors", str(place / "nano")
    if kind == "missing":
        file = tmp_path / "none.safetensors"
    elif kind == "a picture":
        file = place / "a.png"
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    elif kind == "another file":
        file = place / "nano" / "dit.safetensors"
    elif kind == "not finite":
        stored = latents.read(file)
        job = files.prepare(place / "a.png", place / "b.png", tmp_path / "x.mp4", model=place / "nano")
        file.unlink()
        bad = np.full((1, *stored.latents.shape), np.nan)
        latents.write(file, bad, job.config.vae, files.made_of(job), stored.keyframes, (0, 4))
    else:
        model = "tiny"
    there = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert command.main(["--decode", str(file), "--model", model, "--out", str(tmp_path / "again.mp4")]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert str(file) in message
    assert sorted(tmp_path.iterdir()) == there


def test_decoding_makes_nothing_anew(place, tmp_path, capsys):
    for option in ("first", "prompt", "seeds", "from"):
        value = "0-3" if option == "seeds" else str(place / "a.png")
        if option == "from":
            value = str(place / "whole.json")
        assert command.main(["--decode", "x.safetensors", f"--{option}", value]) == 2
        assert f"leave --{option} away" in capsys.readouterr().err


def test_out_of_memory_in_the_decoder_loses_nothing(place, tmp_path, monkeypatch, capsys):
    import jax

    out = tmp_path / "clip.mp4"

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "decode", fail)
        assert command.main(line(place, out)) == 1
    assert f"after step {STEPS} of {STEPS} it goes on by the same command" in capsys.readouterr().err
    assert command.main([*line(place, out), "--vae-memory", "1"]) == 0
    same(place, out)


def test_differences_are_told_by_name():
    one, other = {"a": {"b": 1, "c": [1]}, "d": "x"}, {"a": {"b": 2, "c": [1]}, "e": "y" * 100}
    assert list(resume.differences(one, other)) == ["a.b 1 there, 2 now", 'd "x" there, null now',
                                                    "e null there, another now"]  # fmt: skip


def test_config_of_the_model_is_the_nano(place):
    assert NANO.sampling.steps != STEPS, "so that the defaults cannot stand in for what was asked"


@pytest.mark.parametrize("left", [["lock"], [".wanjax-01234567/new/run.json"], ["lock", ".wanjax-01234567/lock"]])
def test_a_run_that_was_killed_in_its_first_moment_is_none(place, tmp_path, capsys, left):
    """Before its folder says what it is of: nothing is lost, and any run may go on there."""
    out = tmp_path / "clip.mp4"
    for name in left:
        (out.with_suffix(".run") / name).parent.mkdir(parents=True, exist_ok=True)
        (out.with_suffix(".run") / name).write_bytes(b"")
    assert command.main(line(place, out)) == 0
    same(place, out)


def test_lists_are_told_item_by_item():
    one, other = [{"a": 1, "b": 2}, {"a": 3}], [{"a": 1, "b": 2}, {"a": 4}]
    assert list(resume.differences({"clips": one}, {"clips": other})) == ["clips 2.a 3 there, 4 now"]
    assert list(resume.differences({"clips": one}, {"clips": one[:1]})) == [
        'clips [{"a": 1, "b": 2}, {"a": 3}] there, [{"a": 1, "b": 2}] now'
    ]


def test_what_was_left_is_told_also_where_it_is_damaged(place, stopped):
    job = request.prepare(place / "a.png", place / "b.png", stopped.with_name("x.mp4"), model=place / "nano")
    folder = resume.RunFolder(stopped.with_suffix(".run"), job.told)
    assert "after step 2 of 4" in resume.left(folder, 4)
    (folder.path / "carry.safetensors").write_bytes(b"x")
    assert "--restart" in resume.left(folder, 4)
