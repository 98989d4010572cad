"""A day's list, from the first mistake to the last clip: bad lines, a damaged picture, a process that is killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from nano import write_place

from samplers import command, pipeline, run

CLIPS, STEPS = 12, 3
FIRST = 5
"""Clips of the first group; the others have more frames."""


@pytest.fixture
def place(tmp_path):
    return write_place(tmp_path)


def clips():
    return [{"first": "abc"[n % 3] + ".png", "last": "abc"[(n + 1) % 3] + ".png", "prompt": f"a red circle {n}",
             "seed": n, "frames": 5 if n < FIRST else 9, "out": f"{n}.mp4"} for n in range(CLIPS)]  # fmt: skip


def arguments(place, path):
    return ["--model", str(place / "nano"), "--steps", str(STEPS), "--scale", "1", "--save-every", "1", "--quiet",
            "--jobs", str(path)]  # fmt: skip


def write(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def files(place):
    return {path.relative_to(place): path.read_bytes() for path in place.rglob("*")
            if path.is_file() and "nano" not in path.parts}  # fmt: skip


@pytest.mark.slow
def test_twelve_clips_with_bad_lines_an_unreadable_image_and_a_killed_process(place, capsys, monkeypatch):
    path, whole = place / "clips.jsonl", place / "whole"
    whole.mkdir()
    for name in "abc":
        (whole / f"{name}.png").write_bytes((place / f"{name}.png").read_bytes())
    write(whole / "clips.jsonl", clips())
    assert command.main(arguments(place, whole / "clips.jsonl")) == 0
    capsys.readouterr()

    # Three bad lines and an unreadable image: each is named, and nothing is begun.
    bad = clips()
    bad[1] = {**bad[1], "stpes": 9}
    bad[6] = json.dumps(bad[6])[:-3]
    bad[11] = {**bad[11], "frames": 10}
    readable = (place / "b.png").read_bytes()
    bad[3] = {**bad[3], "last": "d.png"}
    (place / "d.png").write_bytes(readable[:200])
    write(path, bad)
    before = files(place)
    assert command.main(arguments(place, path)) == 2
    *named, total = [line.split("error: ")[-1] for line in capsys.readouterr().err.strip().splitlines()]
    assert [line.split(":")[0] for line in named] == [f"clips.jsonl line {n}" for n in (2, 4, 7, 12)]
    for line, word in zip(named, ("stpes: no such option", "d.png", "not JSON", "frames 10"), strict=True):
        assert word in line
    assert total.endswith("4 of its lines cannot be made; nothing was begun") and files(place) == before

    # The lines are mended, the image is not: it is named alone.
    write(path, [{**line, "last": "d.png"} if n == 3 else line for n, line in enumerate(clips())])
    before = files(place)
    assert command.main(arguments(place, path)) == 2
    first, total = capsys.readouterr().err.strip().splitlines()
    assert "clips.jsonl line 4:" in first and "d.png" in first and "1 of its lines" in total
    assert files(place) == before

    # Mended too; the process is killed in the second group, in the second step of its third clip.
    (place / "d.png").write_bytes((place / (clips()[3]["last"])).read_bytes())
    kill(place, path, carries=FIRST * STEPS + 2 * STEPS + 1)
    there = {f"{n}.mp4" for n in range(FIRST)}
    assert {one.name for one in place.glob("*.mp4")} == there
    assert {one.name for one in place.glob("*.run")} == {f"{n}.run" for n in range(FIRST, CLIPS)}

    # The same command goes on: what is finished stays, what was encoded and denoised is not computed again.
    stamps = {name: (place / name).stat().st_mtime_ns for name in there}
    begun, original, encoded, encode = [], run.run, [], pipeline.encode
    monkeypatch.setattr(run, "run", lambda *a, **o: (begun.append(o["first"]), original(*a, **o))[1])
    monkeypatch.setattr(pipeline, "encode", lambda *a, **o: (encoded.append(1), encode(*a, **o))[1])
    assert command.main(arguments(place, path)) == 0
    assert begun == [1, *[0] * (CLIPS - FIRST - 3)] and not encoded
    assert {name: (place / name).stat().st_mtime_ns for name in there} == stamps
    for n in range(CLIPS):
        for suffix in (".mp4", ".sheet.png"):
            assert (place / f"{n}{suffix}").read_bytes() == (whole / f"{n}{suffix}").read_bytes(), n
    assert not list(place.glob("*.run")) and not list(place.glob(".wanjax*"))
    told = [json.loads(line) for line in (place / "clips.report.jsonl").read_text().splitlines()]
    assert [(one["line"], one["seed"], one["out"]) for one in told] == [
        (n + 1, n, str(place / f"{n}.mp4")) for n in range(CLIPS)]  # fmt: skip
    assert [one["outcome"] for one in told] == ["skipped"] * FIRST + ["made"] * (CLIPS - FIRST)
    assert all("error" not in one for one in told)
    denoised = ["denoise" in one["seconds"] for one in told]
    assert denoised == [False] * (FIRST + 2) + [True] * (CLIPS - FIRST - 2)


def kill(place, path, carries):
    """A process of its own that is killed when so many carries were kept."""
    script = textwrap.dedent(f"""
        import os, signal
        from samplers import command, resume
        keep, calls = resume.RunFolder.keep, []

        def killed(folder, name, *told, **more):
            keep(folder, name, *told, **more)
            calls.append(name)
            if calls.count(resume.CARRY) == {carries}:
                os.kill(os.getpid(), signal.SIGKILL)

        resume.RunFolder.keep = killed
        command.main({arguments(place, path)!r})
    """)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.getcwd()},
                          capture_output=True)  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
