"""Films as lines of a list: grouped, told, left alone when finished and resumed like clips."""

import json

import pytest
import stopping
from nano import write_place

from samplers import command, film, storyboard
from wanjax import checkpoint

FILM = {"storyboard": ["a.png", "b.png", "c.png"], "prompts": ["a red circle", "moves left"], "frames": [9, 5]}
OTHER = FILM | {"storyboard": ["c.png", "a.png", "b.png"], "seed": 7}
CLIP = {"first": "a.png", "last": "b.png", "prompt": "a red circle"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, keyframes, and the films of single runs: "film", "other", and "over" with overlap."""
    folder = write_place(tmp_path_factory.mktemp("place"))
    for name, told in (("film", FILM), ("other", OTHER), ("over", FILM | {"frames": [9, 9], "overlap": 4})):
        images = ["--storyboard", *(str(folder / image) for image in told["storyboard"])]
        own = ["--prompts", *told["prompts"], "--frames", *map(str, told["frames"]), "--seed", str(told.get("seed", 0)),
               "--overlap", str(told.get("overlap", 0)), "--out", str(folder / f"{name}.mp4")]  # fmt: skip
        assert command.main([*arguments(folder), *images, *own]) == 0
    return folder


def arguments(place, *more):
    return ["--model", str(place / "nano"), "--steps", "3", "--scale", "1", "--quiet", *map(str, more)]


def listed(place, tmp_path, *lines):
    """A list beside copies of the keyframes."""
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes((place / f"{name}.png").read_bytes())
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def report(path):
    return [json.loads(line) for line in path.with_name("clips.report.jsonl").read_text().splitlines()]


def outcomes(path):
    return [one["outcome"] for one in report(path)]


def same(place, out, name):
    for suffix in (".mp4", ".sheet.png"):
        assert out.with_suffix(suffix).read_bytes() == (place / name).with_suffix(suffix).read_bytes()


def test_films_of_a_list_are_those_of_single_runs(place, tmp_path, monkeypatch):
    """Two of one shape are a group: the model is read once for both, and they are encoded together."""
    path = listed(place, tmp_path, FILM | {"out": "one.mp4"}, CLIP | {"out": "clip.mp4"}, OTHER | {"out": "two.mp4"},
                  FILM | {"frames": [9, 9], "overlap": 4, "out": "over.mp4"})  # fmt: skip
    encoded, loads = [], []
    encode, load = film.encode, checkpoint.load
    monkeypatch.setattr(film, "encode", lambda model, of, *a: (encoded.append(len(of)), encode(model, of, *a))[1])
    monkeypatch.setattr(storyboard.checkpoint, "load", lambda *a, **o: (loads.append(1), load(*a, **o))[1])
    assert command.main(arguments(place, "--jobs", path)) == 0
    assert encoded == [4, 2] and len(loads) == 3
    told = report(path)
    assert [(one["line"], one["seed"], one["outcome"]) for one in told] == [
        (1, 0, "made"), (2, 0, "made"), (3, 7, "made"), (4, 0, "made")]  # fmt: skip
    assert all(one["seconds"].keys() >= {"encode", "denoise", "decode", "total"} for one in told)
    for out, name in (("one", "film"), ("two", "other"), ("over", "over")):
        same(place, tmp_path / f"{out}.mp4", name)
    assert not list(tmp_path.glob("*.run"))

    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.mp4")}
    loads.clear()
    assert command.main(arguments(place, "--jobs", path)) == 0
    assert outcomes(path) == ["skipped"] * 4 and not loads
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.mp4")} == written


@pytest.mark.parametrize("overlap", [0, 4])
@pytest.mark.parametrize("kept", [2, 5])
def test_a_list_that_was_stopped_in_a_film_goes_on(place, tmp_path, monkeypatch, kept, overlap):
    """In the first film's second step, or the second film's first: nothing is done twice, and all bits are the same."""
    name, told = ("over", FILM | {"frames": [9, 9], "overlap": 4}) if overlap else ("film", FILM)
    path = listed(place, tmp_path, told | {"out": "one.mp4"}, told | {"out": "two.mp4"})
    own = arguments(place, "--jobs", path, "--save-every", "1")

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        # What is kept: the conditions of both, three steps of the first, of the second.
        stopping.before(patched, storyboard.RunFolder, "keep", interrupt, kept + 2)
        assert command.main(own) == 130
    begun, lockstep, encoded, encode = [], film.lockstep, [], film.encode
    monkeypatch.setattr(film, "lockstep", lambda *a, **o: (begun.append(o["first"]), lockstep(*a, **o))[1])
    monkeypatch.setattr(film, "encode", lambda *a, **o: (encoded.append(1), encode(*a, **o))[1])
    assert command.main(own) == 0
    assert begun == ([1, 0] if kept == 2 else [1]) and not encoded
    for out in ("one", "two"):
        same(place, tmp_path / f"{out}.mp4", name)
    assert outcomes(path) == ["made"] * 2 and not list(tmp_path.glob("*.run"))


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_film_that_fails_is_told_and_the_other_is_made(place, tmp_path, monkeypatch, stage):
    path = listed(place, tmp_path, FILM | {"out": "one.mp4"}, OTHER | {"out": "two.mp4"})
    whole = getattr(storyboard, stage)

    def failing(model, own, *rest):
        reels = own if isinstance(own, list) else [own]
        if any(reel.job.settings.seed == 0 for reel in reels):
            raise FloatingPointError(f"{stage}: NaN or inf")
        return whole(model, own, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(storyboard, stage, failing)
        assert command.main(arguments(place, "--jobs", path)) == 1
    assert outcomes(path) == ["failed", "made"] and report(path)[0]["error"] == f"{stage}: NaN or inf"
    assert not (tmp_path / "one.mp4").exists()
    assert command.main(arguments(place, "--jobs", path)) == 0
    assert outcomes(path) == ["made", "skipped"]
    same(place, tmp_path / "one.mp4", "film")
    same(place, tmp_path / "two.mp4", "other")


@pytest.mark.parametrize("change, message", [
    ({"storyboard": ["a.png"]}, "storyboard: 1 image"),
    ({"storyboard": "a.png"}, "storyboard: 1 image"),
    ({"storyboard": ["a.png", "none.png", "c.png"]}, "none.png"),
    ({"frames": [9, 5, 9]}, "frames: 3 given for 2 clips"),
    ({"frames": [9, 6]}, "frames 6"),
    ({"overlap": 3}, "overlap 3"),
    ({"seeds": "0-2"}, "--storyboard: --seeds is of a single clip"),
    ({"last": "a.png"}, "--storyboard: --last is of a single clip"),
    ({"keep-latents": True}, "--storyboard: --keep-latents is of a single clip"),
    ({"method": "auto"}, "--method auto"),
    ({"out": "1.mp4"}, "of line 1 too"),
])  # fmt: skip
def test_lines_that_are_no_films(place, tmp_path, capsys, change, message):
    path = listed(place, tmp_path, CLIP | {"out": "1.mp4"}, FILM | {"out": "2.mp4"} | change)
    assert command.main(arguments(place, "--jobs", path)) == 2
    first, last = capsys.readouterr().err.strip().splitlines()
    assert "clips.jsonl line 2:" in first and message in first and "1 of its lines" in last


def test_a_film_that_changed_is_not_taken_for_finished(place, tmp_path, capsys):
    path = listed(place, tmp_path, FILM | {"out": "one.mp4"})
    assert command.main(arguments(place, "--jobs", path)) == 0
    path = listed(place, tmp_path, FILM | {"out": "one.mp4", "prompts": "a blue square"})
    assert command.main(arguments(place, "--jobs", path)) == 2
    assert "line 1: output" in (error := capsys.readouterr().err) and "pass --overwrite" in error
    assert command.main(arguments(place, "--jobs", path, "--overwrite")) == 0
    assert outcomes(path) == ["made"]


def test_a_film_made_again_from_its_report(place, tmp_path):
    path = listed(place, tmp_path, {"from": str(place / "over.json"), "out": "again.mp4"})
    assert command.main(arguments(place, "--jobs", path)) == 0
    same(place, tmp_path / "again.mp4", "over")
