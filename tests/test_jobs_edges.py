# ruff: noqa: F811 (fixtures of the other module)
"""Lists of clips where something is odd: other processes, damage, names, earlier clips, what stands in the way."""

import contextlib
import dataclasses
import io
import json
import os
import sys

import pytest
from nano import write_model
from test_jobs import GOOD, arguments, pictures, place, report, write_lines  # noqa: F401 (fixtures)

from samplers import asked, command, files, jobs, request, run, work
from samplers.plan import Plan
from wanjax.method import METHODS


def test_restart_throws_nothing_away_where_the_list_is_refused(pictures, place, capsys, monkeypatch):
    """What a stopped list kept is removed only once it begins anew."""
    path = write_lines(place / "clips.jsonl", *(GOOD | {"out": f"{n}.mp4", "seed": n} for n in range(2)))
    own = arguments(pictures, "--jobs", path, "--save-every", "1", "--restart")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(work, "decode", interrupt)
        assert command.main(own) == 130
    kept = {file: file.read_bytes() for file in place.glob("*.run/*")}
    assert len(kept) == 6
    bad = write_lines(place / "bad.jsonl", *path.read_text().splitlines(), GOOD | {"frames": 6})
    assert command.main([*own, "--jobs", str(bad)]) == 2
    assert {file: file.read_bytes() for file in place.glob("*.run/*")} == kept
    begun, original = [], run.run
    monkeypatch.setattr(run, "run", lambda *a, **o: (begun.append(o["first"]), original(*a, **o))[1])
    assert command.main(own) == 0
    assert begun == [0, 0] and not list(place.glob("*.run"))


def test_what_a_run_left_that_was_killed_at_its_very_end_goes(pictures, place, monkeypatch):
    """Results are there, and the run folder still is: it is emptied, and what is not ours is left alone."""
    path = write_lines(place / "clips.jsonl", GOOD | {"out": "0.mp4"}, GOOD | {"out": "1.mp4"})
    with monkeypatch.context() as patched:
        patched.setattr(files.Clip, "finish", lambda clip: None)
        assert command.main(arguments(pictures, "--jobs", path)) == 0
    assert len(list(place.glob("*.run/carry.safetensors"))) == 2
    (place / "1.run" / "mine.txt").write_text("years of work")
    assert command.main(arguments(pictures, "--jobs", path)) == 0
    assert {one["outcome"] for one in report(path)} == {"skipped"}
    assert [file.parent.name for file in place.glob("*.run/mine.txt")] == ["1.run"] and not (place / "0.run").exists()


@pytest.mark.parametrize("change", ["--fps 5", "--scale 3", "--keep-latents"])
def test_another_file_of_the_same_clip_is_not_taken_for_finished(pictures, place, capsys, change):
    path = write_lines(place / "clips.jsonl", GOOD | {"out": "one.mp4"})
    assert command.main(arguments(pictures, "--jobs", path)) == 0
    assert command.main([*arguments(pictures, "--jobs", path), *change.split()]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert command.main([*arguments(pictures, "--jobs", path), *change.split(), "--overwrite"]) == 0
    assert command.main([*arguments(pictures, "--jobs", path), *change.split()]) == 0
    assert [one["outcome"] for one in report(path)] == ["skipped"]


def test_a_model_that_cannot_be_loaded_ends_its_own_clips_alone(pictures, place, tmp_path_factory):
    """Damaged weights, found when they are read."""
    bad = write_model(tmp_path_factory.mktemp("bad") / "bad")
    file = bad / "vae.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    lines = [GOOD | {"out": "0.mp4", "model": str(bad)}, GOOD | {"out": "1.mp4", "model": str(bad), "seed": 1},
             GOOD | {"out": "2.mp4"}]  # fmt: skip
    path = write_lines(place / "clips.jsonl", *lines)
    assert command.main(arguments(pictures, "--jobs", path)) == 1
    told = report(path)
    assert [one["outcome"] for one in told] == ["failed", "failed", "made"]
    assert "vae" in told[0]["error"] and "vae" in told[1]["error"] and not list(place.glob("*.run"))


def test_a_clip_that_another_process_made_meanwhile_is_left_alone(pictures, place, monkeypatch):
    """Two processes on one list: the second comes to what the first finished after both had looked."""
    path = write_lines(place / "clips.jsonl", GOOD | {"out": "0.mp4"}, GOOD | {"out": "1.mp4", "seed": 1})
    own, make = arguments(pictures, "--jobs", path), jobs.make

    def later(*told, **more):
        with monkeypatch.context() as patched:
            patched.setattr(jobs, "make", make)
            assert command.main(own) == 0
        return make(*told, **more)

    monkeypatch.setattr(jobs, "make", later)
    monkeypatch.setattr(work, "loaded", (lambda loaded, count=[]: lambda *a: (count.append(1), loaded(*a))[
        len(count) > 1 and pytest.fail("computed twice") or 1])(work.loaded))  # fmt: skip
    assert command.main(own) == 0
    assert [one["outcome"] for one in report(path)] == ["skipped"] * 2 and not list(place.glob("*.run"))


def test_a_long_list_goes_in_parts(pictures, place, monkeypatch):
    """What clips hold on the device and their open locks are bounded."""
    monkeypatch.setattr(jobs, "MOST_AT_ONCE", 2)
    most, whole = [], work.encode
    monkeypatch.setattr(work, "encode", lambda model, clips, *a: (most.append(len(clips)), whole(model, clips, *a))[1])
    path = write_lines(place / "clips.jsonl", *(GOOD | {"out": f"{n}.mp4", "seed": n} for n in range(3)))
    assert command.main(arguments(pictures, "--jobs", path)) == 0
    assert most == [2, 1] and [one["outcome"] for one in report(path)] == ["made"] * 3


@pytest.mark.parametrize("lines, name", [
    ([{"out": "x.mp4", "explain": "plots", "method": "paper"}, {"out": "y.mp4", "explain": "plots", "method": "paper"}],
     "plots"),
    ([{"out": "x.mp4", "seeds": "0-1"}, {"out": "x.mp4", "seeds": "1-2"}], "x-seed1"),
    ([{"out": "x.mp4", "seeds": "0-1"}, {"out": "x.mp4", "seeds": "2-3", "frames": 9}], "x.variants.png"),
    ([{"out": "x.mp4"}, {"out": "x.gif"}], "x.json"),
])  # fmt: skip
def test_outputs_in_each_others_way(pictures, place, capsys, lines, name):
    path = write_lines(place / "clips.jsonl", *(GOOD | line for line in lines))
    assert command.main(arguments(pictures, "--jobs", path)) == 2
    assert f"line 2: out {name}" in (error := capsys.readouterr().err) and "of line 1 too" in error


@pytest.mark.parametrize("what", ["folder", "text", "list"])
def test_what_stands_in_the_reports_place(pictures, place, capsys, what):
    path, own = write_lines(place / "clips.jsonl", GOOD), place / "clips.report.jsonl"
    own.mkdir() if what == "folder" else own.write_text("years of work" if what == "text" else '{"first": "a.png"}\n')
    assert command.main(arguments(pictures, "--jobs", path)) == 2
    assert "clips.report.jsonl: exists and is not a report of jobs; move it away" in capsys.readouterr().err
    assert own.is_dir() or own.read_text()[:6] in ("years ", '{"firs')


def test_texts_hold_any_character(pictures, place):
    """Also those that Python takes for ends of lines."""
    text = "one\u2028two\x85three\x0bfour \u7ea2 \U0001f534"
    path = place / "clips.jsonl"
    path.write_text(json.dumps(GOOD | {"prompt": text, "out": "\u7ea2 \u00e9.mp4"}, ensure_ascii=False) + "\r\n")
    assert command.main(arguments(pictures, "--jobs", path)) == 0
    assert json.loads((place / "\u7ea2 \u00e9.json").read_text())["settings"]["prompt"] == text
    table = place / "table.csv"
    table.write_text(f'first,last,prompt,out\na.png,b.png,"{text}",t.mp4\n', encoding="utf-8")
    assert command.main(arguments(pictures, "--jobs", table)) == 0
    assert json.loads((place / "t.json").read_text())["settings"]["prompt"] == text


def test_no_list_is_no_clip(pictures, capsys):
    assert command.main(arguments(pictures, "--jobs", "")) == 2
    assert "give a .jsonl file" in capsys.readouterr().err


def test_what_cannot_be_printed_changes_nothing(pictures, place, monkeypatch):
    """A name that the terminal cannot show, and one that nobody can."""
    told = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", told)
    path = write_lines(place / "clips.jsonl", GOOD | {"out": "\u7ea2.mp4"})
    assert command.main(arguments(pictures, "--jobs", path)) == 0
    own = [
        "--first",
        place / "a.png",
        "--last",
        place / "b.png",
        "--out",
        os.fsdecode(os.fsencode(place) + b"/\xff.mp4"),
    ]
    assert command.main(arguments(pictures, *own)) == 0
    assert b"\\u7ea2.mp4: made" in told.buffer.getvalue() and b"udcff.mp4" in told.buffer.getvalue()


def test_keyframes_beside_an_earlier_clip(pictures, place, capsys):
    """Those given take the place of the earlier ones at their frames; the others stay."""
    own = ["--first", place / "a.png", "--keyframe", f"{place / 'c.png'}@2", "--last", place / "b.png"]
    assert command.main(arguments(pictures, *own, "--out", place / "clip.mp4")) == 0

    def again(*more):
        assert command.main([*map(str, ["--from", place / "clip.json", "--out", place / "x.mp4", "--overwrite",
                                        "--quiet", *more])]) == 0  # fmt: skip
        told = json.loads((place / "x.json").read_text())["keyframes"]
        return [(one["path"][-5], one["frame"]) for one in told]

    assert again() == [("a", 0), ("c", 2), ("b", 4)]
    assert again("--keyframe", f"{place / 'd.png'}@2") == [("a", 0), ("d", 2), ("b", 4)]
    assert again("--keyframe", f"{place / 'd.png'}@-1") == [("a", 0), ("c", 2), ("d", 4)]
    assert again("--keyframe", f"{place / 'd.png'}@3") == [("a", 0), ("c", 2), ("d", 3), ("b", 4)]
    assert again("--loop") == [("a", 0), ("c", 2), ("a", 4)]
    assert again("--last", place / "d.png") == [("a", 0), ("c", 2), ("d", 4)]
    assert command.main(["--from", str(place / "clip.json"), "--frames", "5", "9"]) == 2
    assert "several belong to --storyboard" in capsys.readouterr().err


def test_a_report_from_before_keyframes_had_places(pictures, place):
    own = ["--first", place / "a.png", "--last", place / "b.png", "--out", place / "clip.mp4"]
    assert command.main(arguments(pictures, *own)) == 0
    told = json.loads((place / "clip.json").read_text())
    told["keyframes"] = [one["path"] for one in told["keyframes"]]
    (place / "old.json").write_text(json.dumps(told))
    assert command.main(["--from", str(place / "old.json"), "--quiet", "--out", str(place / "again.mp4")]) == 0
    assert (place / "again.mp4").read_bytes() == (place / "clip.mp4").read_bytes()


def test_variants_have_plots_of_their_own():
    options = {"seeds": (2, 3), "count": None, "seed": 0, "out": "clip.mp4", "explain": "plots"}
    made = [(one["seed"], one["out"], one["explain"]) for one in asked.variants(options)]
    assert made == [(2, "clip-seed2.mp4", "plots-seed2"), (3, "clip-seed3.mp4", "plots-seed3")]
    assert asked.variants(options | {"explain": None})[0]["explain"] is None


@pytest.mark.parametrize("mesh, passes, sizes", [
    ({}, 1, [1] * 5), ({"data": 1}, 1, [1] * 5), ({"data": 2}, 1, [2, 2, 1]), ({"data": 2}, 2, [1] * 5),
    ({"data": 4}, 2, [2, 2, 1]), ({"data": 4, "sequence": 2}, 1, [4, 1]),
])  # fmt: skip
def test_as_many_clips_at_once_as_the_mesh_has_room_for(pictures, place, mesh, passes, sizes):
    lines = []
    for seed in range(5):
        job = request.prepare(place / "a.png", place / "b.png", place / f"{seed}.mp4", model=pictures / "nano",
                              seed=seed, guidance_mode="batched" if passes == 2 else "sequential")  # fmt: skip
        lines.append(jobs.Line(1, dataclasses.replace(job, mesh=mesh), False))
    running = [jobs._Running(one, work.Clip(one.job), contextlib.ExitStack()) for one in lines]
    made = list(jobs._side_by_side(running))
    assert [len(one) for one in made] == sizes and sum(made, []) == running


def test_clips_whose_methods_were_chosen_go_together_only_where_they_are_equal(pictures, place):
    own = {"model": pictures / "nano", "method": "auto"}
    job = request.prepare(place / "a.png", place / "b.png", place / "x.mp4", **own)
    line = jobs.Line(1, dataclasses.replace(job, mesh={"data": 4}), False)
    running = [jobs._Running(line, work.Clip(line.job), contextlib.ExitStack()) for _ in range(3)]
    other = dataclasses.replace(job.settings, method=METHODS["paper"])
    running[1].clip.job = dataclasses.replace(line.job, plan=Plan.of(job.config, other, job.plan.at))
    assert [len(one) for one in jobs._side_by_side(running)] == [2, 1]
