"""Many clips from one file, variants of one clip, and clips made again from what they were."""

import csv
import json
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
from nano import write_place

from samplers import command, files, jobs, pipeline, run, work
from wanjax import keyframes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = write_place(tmp_path_factory.mktemp("pictures"), "abcd")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    return folder


@pytest.fixture
def place(pictures, tmp_path):
    """A folder with keyframes, and arguments that hold for all clips."""
    for name in ("a", "b", "c", "d", "broken"):
        shutil.copy(pictures / f"{name}.png", tmp_path)
    return tmp_path


def arguments(pictures, *more):
    return ["--model", str(pictures / "nano"), "--steps", "2", "--scale", "2", "--quiet", *map(str, more)]


def write_lines(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def report(path):
    return [json.loads(line) for line in path.with_suffix("").with_suffix(".report.jsonl").read_text().splitlines()]


GOOD = {"first": "a.png", "last": "b.png", "prompt": "a red circle"}


def test_a_list_is_made_stage_by_stage_and_not_again(pictures, place, capsys, monkeypatch):
    """Every part of the model is asked for once a group; results are those of single runs, bit for bit."""
    path = write_lines(
        place / "clips.jsonl", GOOD | {"out": "one.mp4"}, GOOD | {"out": "two.webm", "method": "paper", "seed": 3}, "",
        GOOD | {"last": "c.png", "guidance": 1.5, "kab": True, "kab-layers": "0-0"},
        GOOD | {"frames": 9, "out": "long.gif"},
    )  # fmt: skip
    stages, compiled = [], []
    for name in ("encode", "denoise", "decode"):
        whole = getattr(work, name)
        monkeypatch.setattr(work, name, lambda *a, whole=whole, name=name: (stages.append(name), whole(*a))[1])
    loaded = work.loaded
    monkeypatch.setattr(work, "loaded", lambda *a: (compiled.append(1), loaded(*a))[1])
    assert command.main(arguments(pictures, "--jobs", path)) == 0
    assert stages == ["encode", *["denoise"] * 3, *["decode"] * 3, "encode", "denoise", "decode"] and len(compiled) == 2
    told = report(path)
    assert [(one["line"], one["seed"], one["outcome"]) for one in told] == [
        (1, 0, "made"), (2, 3, "made"), (4, 0, "made"), (5, 0, "made")]  # fmt: skip
    assert all(one["seconds"]["total"] > 0 for one in told)
    assert (place / "clips-004.mp4").exists() and not list(place.glob("*.run"))
    alone = place / "alone"
    alone.mkdir()
    single = ["--first", place / "a.png", "--last", place / "c.png", "--prompt", "a red circle", "--guidance", "1.5",
              "--kab", "--kab-layers", "0-0", "--out", alone / "x.mp4"]  # fmt: skip
    assert command.main(arguments(pictures, *single)) == 0
    assert (alone / "x.mp4").read_bytes() == (place / "clips-004.mp4").read_bytes()

    stages.clear()
    written = {file: file.stat().st_mtime_ns for file in place.glob("*.mp4")}
    assert command.main(arguments(pictures, "--jobs", path)) == 0
    assert stages == [] and {one["outcome"] for one in report(path)} == {"skipped"}
    assert {file: file.stat().st_mtime_ns for file in place.glob("*.mp4")} == written
    with path.open("a") as file:
        file.write(json.dumps(GOOD | {"out": "new.mp4"}) + "\n")
    assert command.main(arguments(pictures, "--jobs", path)) == 0
    assert [one["outcome"] for one in report(path)] == ["skipped"] * 4 + ["made"]


def test_settings_that_changed_are_not_taken_for_finished(pictures, place, capsys):
    path = write_lines(place / "clips.jsonl", GOOD | {"out": "one.mp4"})
    assert command.main(arguments(pictures, "--jobs", path)) == 0
    write_lines(path, GOOD | {"out": "one.mp4", "seed": 1})
    assert command.main(arguments(pictures, "--jobs", path)) == 2
    assert "line 1: output" in (error := capsys.readouterr().err) and "pass --overwrite" in error
    assert command.main(arguments(pictures, "--jobs", path, "--overwrite")) == 0
    assert report(path)[0]["seed"] == 1


def test_every_bad_line_is_named_before_any_work(pictures, place, capsys, monkeypatch):
    """Twelve clips, three bad lines, an unreadable image: all named, nothing begun."""

    def never(*_, **__):
        raise AssertionError("computing began")

    monkeypatch.setattr(jobs, "make", never)
    lines = [GOOD | {"out": f"{n}.mp4"} for n in range(12)]
    lines[2] = GOOD | {"out": "2.mp4", "stpes": 5}
    lines[5] = '{"first": "a.png", '
    lines[7] = GOOD | {"out": "7.mp4", "frames": 6}
    lines[9] = GOOD | {"out": "9.mp4", "last": "broken.png"}
    path = write_lines(place / "clips.jsonl", *lines)
    there = sorted(place.iterdir())
    assert command.main(arguments(pictures, "--jobs", path)) == 2
    error = capsys.readouterr().err
    for number, word in ((3, "stpes: no such option"), (6, "not JSON"), (8, "frames 6"), (10, "broken.png")):
        assert [line for line in error.splitlines() if f"line {number}:" in line and word in line], (number, error)
    assert "4 of its lines cannot be made; nothing was begun" in error
    assert sorted(place.iterdir()) == there


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("out", "1.mp4", "of line 1 too"),
        ("quiet", True, "belongs on the command line"),
        ("jobs", "x", "belongs on the command line"),
        ("first", "none.png", "no such file"),
        ("overwrite", "perhaps", "give true or false"),
        ("prompt", {"a": 1}, "give text, a number or a list"),
        ("solver", "magic", "invalid choice"),
        ("size", "17x24", "size"),
        ("keyframe", ["c.png"], "IMAGE@FRAME"),
        ("keyframe", ["c.png@2", "d.png@2"], "given twice"),
        ("keyframe", "c.png@0", "two at one frame"),
        ("seeds", "4-2", "A-B or A,B"),
        ("count", 0, "whole number from 1"),
        ("from", "a.png", "a.png"),
        ("model", "nowhere", "nowhere"),
        ("out", "none/1.mp4", "no folder"),
        ("out", "a.png/x.mp4", "a.png"),
        ("storyboard", ["a.png", "b.png"], "--storyboard: --first is of a single clip"),
        ("prompts", ["a"], "--prompts: belongs to --storyboard"),
        ("overlap", 4, "--overlap: belongs to --storyboard"),
        ("help", True, "belongs on the command line"),
        ("first", ["a.png"], "give one value, not a list"),
        ("steps", [2, 3], "give one value, not a list"),
        ("skip_passes", "none.json", "none.json"),
    ],
)
def test_bad_fields(pictures, place, capsys, field, value, message):
    path = write_lines(place / "clips.jsonl", GOOD | {"out": "1.mp4"}, GOOD | {"out": "2.mp4", field: value})
    assert command.main(arguments(pictures, "--jobs", path)) == 2
    first, last = capsys.readouterr().err.strip().splitlines()
    assert "clips.jsonl line 2:" in first and message in first and "1 of its lines" in last


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("clips.txt", "", "give a .jsonl file"),
        ("clips.jsonl", "", "holds no clip"),
        ("clips.jsonl", "[1, 2]\n", "line 1: not a JSON object"),
        ("clips.jsonl", '{"first": "C:\\clips\\a.png"}\n', "write / or two backslashes in paths"),
        ("clips.jsonl", '{"seed": 1, "seed": 2}\n', "line 1: seed: given twice"),
        ("clips.jsonl", '{"save-every": 1, "save_every": 2}\n', "line 1: save_every: given twice"),
        ("clips.csv", "first,last\n", "holds no clip"),
        ("clips.csv", "first,last\na.png\n", "line 2: another number of cells"),
        ("clips.csv", 'first,last\n"a.png,b.png\n', "not CSV"),
        (
            "clips.csv",
            "first;last;prompt\na.png;b.png;red, blue\n",
            "line 1: cells divided by ';'; save it with commas",
        ),
        ("clips.csv", "first\tlast\na.png\tb.png\n", "cells divided by '\\t'"),
        ("clips.csv", "first,keyframe, keyframe\na.png,b.png@2,c.png@3\n", "'keyframe' heads two columns"),
    ],
)
def test_bad_lists(pictures, place, capsys, name, text, message):
    (place / name).write_text(text)
    assert command.main(arguments(pictures, "--jobs", place / name)) == 2
    assert message in capsys.readouterr().err


def test_a_list_that_is_not_there_or_no_text(pictures, place, capsys):
    assert command.main(arguments(pictures, "--jobs", place / "none.jsonl")) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err
    (place / "bytes.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    assert command.main(arguments(pictures, "--jobs", place / "bytes.jsonl")) == 2
    assert "not text in UTF-8" in capsys.readouterr().err


def test_a_table_with_a_header(pictures, place):
    """CSV as spreadsheets write it: quoted commas, a byte order mark, empty cells, switches by word."""
    path = place / "clips.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(["first", "last", "prompt", "out", "seeds", "kab", "size"])
        table.writerow(["a.png", "b.png", "a red circle, then left", "one.mp4", "", "true", "16x24"])
        table.writerow(["a.png", "c.png", "", "two.mp4", "4,6", "no", ""])
    assert command.main(arguments(pictures, "--jobs", path)) == 0
    settings = json.loads((place / "one.json").read_text())["settings"]
    assert settings["prompt"] == "a red circle, then left" and settings["method"]["kab"] is not None
    assert sorted(file.name for file in place.glob("two*.mp4")) == ["two-seed4.mp4", "two-seed6.mp4"]
    assert json.loads((place / "two-seed6.json").read_text())["settings"]["method"]["kab"] is None
    assert iio.imread(place / "two.variants.png").shape[0] > 200


def test_one_that_fails_is_told_and_the_others_are_made(pictures, place, capsys, monkeypatch):
    """At each stage, by NaN, a full disk and too little memory."""
    import jax

    path = write_lines(place / "clips.jsonl", *(GOOD | {"out": f"{n}.mp4", "seed": n} for n in range(4)))
    stages = {name: getattr(work, name) for name in ("encode", "denoise", "decode")}
    too_little = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
    full = OSError(28, "No space left on device")
    errors = {"encode": FloatingPointError("text: NaN or inf"), "denoise": too_little, "decode": full}

    def failing(name, seed):
        def stage(model, own, *rest):
            clips = own if isinstance(own, list) else [own]
            if any(clip.job.settings.seed == seed for clip in clips):
                raise errors[name]
            return stages[name](model, own, *rest)

        return stage

    with monkeypatch.context() as patched:
        for seed, name in enumerate(stages):
            patched.setattr(work, name, failing(name, seed))
        assert command.main(arguments(pictures, "--jobs", path)) == 1
    told = report(path)
    assert [one["outcome"] for one in told] == ["failed"] * 3 + ["made"]
    for one, word in zip(told, ["NaN", "RESOURCE_EXHAUSTED", "No space left"], strict=False):
        assert word in one["error"]
    assert "0.mp4: failed: text: NaN or inf" in capsys.readouterr().out
    assert command.main(arguments(pictures, "--jobs", path)) == 0
    assert [one["outcome"] for one in report(path)] == ["made"] * 3 + ["skipped"]


def test_a_list_that_was_stopped_goes_on(pictures, place, capsys, monkeypatch):
    """Interrupted in the second clip's second step: the first stages are not done again, and all bits are the same."""
    lines = [GOOD | {"out": f"{n}.mp4", "seed": n} for n in range(3)]
    path = write_lines(place / "clips.jsonl", *lines)
    whole = write_lines(place / "whole.jsonl", *(line | {"out": f"whole{n}.mp4"} for n, line in enumerate(lines)))
    assert command.main(arguments(pictures, "--jobs", whole)) == 0
    own = arguments(pictures, "--jobs", path, "--save-every", "1")
    keep, calls = files.Clip.keep, []

    def stopping(clip, *told, **more):
        keep(clip, *told, **more)
        calls.append(told[0])
        if calls.count("carry") == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files.Clip, "keep", stopping)
        assert command.main(own) == 130
    assert "run it again to go on" in capsys.readouterr().err
    assert report(path) == [] and not (place / "0.mp4").exists()
    begun, original = [], run.run
    encoded, encode = [], pipeline.encode
    monkeypatch.setattr(run, "run", lambda *a, **o: (begun.append(o["first"]), original(*a, **o))[1])
    monkeypatch.setattr(pipeline, "encode", lambda *a, **o: (encoded.append(1), encode(*a, **o))[1])
    assert command.main(own) == 0
    assert begun == [1, 0] and encoded == []
    for n in range(3):
        assert (place / f"{n}.mp4").read_bytes() == (place / f"whole{n}.mp4").read_bytes()
    assert not list(place.glob("*.run"))


def test_variants_of_one_clip(pictures, place, capsys):
    own = ["--first", place / "a.png", "--last", place / "b.png", "--out", place / "clip.mp4"]
    assert command.main(arguments(pictures, *own, "--seeds", "2-4")) == 0
    names = [f"clip-seed{n}.mp4" for n in (2, 3, 4)]
    assert sorted(file.name for file in place.glob("*.mp4")) == names
    assert "clip.variants.png" in capsys.readouterr().out
    sheet = np.asarray(keyframes.read(place / "clip.variants.png"))
    assert len({(place / name).read_bytes() for name in names}) == 3 and sheet.std() > 10
    assert command.main(arguments(pictures, *own, "--count", "2", "--seed", "4")) == 0
    assert (place / "clip-seed5.mp4").exists()
    assert command.main(arguments(pictures, *own, "--count", "2", "--seeds", "4,5")) == 2


@pytest.mark.parametrize("suffix", [".json", ".mp4", ".webm", ".gif", ".webp", ".sheet.png"])
def test_a_clip_made_again_from_itself(pictures, place, suffix):
    """With single options changed; keyframes are told by the JSON alone."""
    out = place / f"clip{suffix if suffix not in ('.json', '.sheet.png') else '.mp4'}"
    images = ["--first", place / "a.png", "--keyframe", f"{place / 'c.png'}@2", "--last", place / "b.png"]
    own = [*images, "--method", "paper", "--strength-mid", "0.2", "--prompt", "a red circle", "--seed", "7", "--fps",
           "6", "--guidance-interval", "0-0.6", "--out", out]  # fmt: skip
    assert command.main(arguments(pictures, *own)) == 0
    source = place / f"clip{suffix}"
    again = ["--from", source, *(images if suffix != ".json" else []), "--quiet"]
    again += [] if suffix == ".json" else ["--model", pictures / "nano"]
    assert command.main([str(part) for part in [*again, "--out", place / f"again{out.suffix}"]]) == 0
    if out.suffix == ".webm":  # its bytes differ by a random track number
        frames = (iio.imread(place / f"{name}.webm", plugin="pyav") for name in ("again", "clip"))
        np.testing.assert_array_equal(*frames)
    else:
        assert (place / f"again{out.suffix}").read_bytes() == out.read_bytes()
    assert command.main([str(part) for part in [*again, "--seed", "8", "--out", place / "other.mp4"]]) == 0
    before, after = (json.loads((place / f"{name}.json").read_text())["settings"] for name in ("clip", "other"))
    assert after.pop("seed") == 8 and before.pop("seed") == 7 and after == before


def test_a_clip_does_not_tell_its_keyframes(pictures, place, capsys):
    own = ["--first", place / "a.png", "--last", place / "b.png", "--out", place / "clip.mp4"]
    assert command.main(arguments(pictures, *own)) == 0
    data = (place / "clip.mp4").read_bytes() + (place / "clip.sheet.png").read_bytes()
    assert str(place).encode() not in data and b"a.png" not in data and b"--first" not in data
    assert command.main(["--from", str(place / "clip.mp4"), "--out", str(place / "x.mp4")]) == 2
    assert "not where the keyframes are" in capsys.readouterr().err


def test_a_moved_report_finds_its_keyframes(pictures, place, tmp_path_factory):
    own = ["--first", place / "a.png", "--last", place / "b.png", "--out", place / "clip.mp4"]
    assert command.main(arguments(pictures, *own)) == 0
    moved = tmp_path_factory.mktemp("moved") / "here"
    shutil.move(place, moved)
    assert command.main(["--from", str(moved / "clip.json"), "--quiet", "--out", str(moved / "again.mp4")]) == 0
    assert (moved / "again.mp4").read_bytes() == (moved / "clip.mp4").read_bytes()
    place.mkdir()


@pytest.mark.slow
def test_loop_and_single_keyframes(pictures, place, capsys):
    loop = ["--first", place / "a.png", "--loop", "--out", place / "loop.mp4"]
    assert command.main(arguments(pictures, *loop)) == 0
    told = json.loads((place / "loop.json").read_text())["keyframes"]
    assert [one["frame"] for one in told] == [0, 4] and told[0]["path"] == told[1]["path"]
    assert command.main(arguments(pictures, *loop, "--last", place / "b.png")) == 2
    assert "--loop" in capsys.readouterr().err
    for at, frames in ((0, 0), (-1, 4), (2, 2)):
        out = place / f"single{frames}.mp4"
        assert command.main(arguments(pictures, "--keyframe", f"{place / 'a.png'}@{at}", "--out", out)) == 0
        assert [one["frame"] for one in json.loads(out.with_suffix(".json").read_text())["keyframes"]] == [frames]
    assert command.main(arguments(pictures, "--keyframe", f"{place / 'a.png'}@5")) == 2
    assert command.main(arguments(pictures, "--first", place / "a.png")) == 2
    assert "give both --first and --last" in capsys.readouterr().err
