"""The results file: what may be gone on with, torn lines, other runs, two writers."""

import json
import shutil
import subprocess
import sys

import pytest

from benchmarks.tgi.scores import (
    CONFIG,
    LINES,
    Key,
    Scores,
    ScoresError,
    by_clip,
    key_of,
    model_identity,
    pairs,
    unfinished,
)
from wanjax import checkpoint, store

CONFIGURATION = {"model": {"name": "m", "sha256": "0"}, "settings": {"steps": 3}, "batch": 2, "metrics": {},
                 "planned": {"25": {"wan": [0]}},
                 "sets": {"25": {"ids": ["a", "b"]}}, "environments": [{"date": "1", "commit": "x"}],
                 "arms": {"wan": {"kind": "method"}}}  # fmt: skip


KEY_ALONE = {"length": 25, "clip": "c", "arm": "wan", "seed": 0}


def line(clip, value=20.0, arm="wan", seed=0, length=25, challenge="occlusion"):
    return {"length": length, "clip": clip, "arm": arm, "seed": seed, "challenge": challenge,
            "metrics": {"psnr_interior": value}, "psnr_frames": [value]}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    with Scores(tmp_path / "out", CONFIGURATION) as scores:
        scores.append([line("a"), line("b", 22.0)])
    return tmp_path / "out"


def test_lines_are_found_again(folder):
    again = Scores(folder, None)
    assert again.lines == [line("a"), line("b", 22.0)]
    assert again.done == {Key(25, "a", "wan", 0): line("a"), Key(25, "b", "wan", 0): line("b", 22.0)}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_cut_off(folder, cut):
    whole = (folder / LINES).read_bytes()
    (folder / LINES).write_bytes(whole[:-cut])
    assert [key_of(one).clip for one in Scores(folder, None).lines] == ["a"]
    assert (folder / LINES).read_bytes() == whole[:-cut], "reading alone changes nothing"
    with Scores(folder, CONFIGURATION) as again:
        again.append([line("b", 22.0)])
    assert (folder / LINES).read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    ["{broken\n", "[" * 100_000 + "\n", json.dumps(KEY_ALONE) + "\n", "[]\n", '{"clip": "a"}\n', "null\n"]
    + [json.dumps({**line("b"), name: value}) + "\n" for name, value in (
        ("clip", ["a"]), ("clip", "z"), ("arm", "kab"), ("length", 33), ("seed", "0"), ("metrics", None),
        ("psnr_frames", None))],
)  # fmt: skip
def test_a_damaged_line_in_the_middle_is_named(folder, damage):
    lines = (folder / LINES).read_text().splitlines(keepends=True)
    (folder / LINES).write_text(lines[0] + damage + lines[1])
    with pytest.raises(ScoresError, match="line 2 is damaged"):
        Scores(folder, CONFIGURATION)


def test_a_line_that_stands_there_twice(folder):
    with open(folder / LINES, "a") as file:
        file.write(json.dumps(line("a")) + "\n")
    with pytest.raises(ScoresError, match="line 3 is damaged .one before is of the same clip"):
        Scores(folder, CONFIGURATION)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"settings": {"steps": 4}}, "settings"),
        ({"model": {"name": "m", "sha256": "1"}}, "model"),
        ({"arms": {"wan": {"kind": "other"}}}, "arm wan"),
        ({"sets": {"25": {"ids": ["a"]}}}, "clips of length 25"),
        ({"sets": {"33": {"ids": ["a"], "name": "y"}}, "planned": {"33": {"wan": [0]}}}, "data set"),
        ({"more": 1}, "more"),
    ],
)
def test_another_run_is_refused_by_name(folder, change, named):
    before = (folder / CONFIG).read_bytes()
    with pytest.raises(ScoresError, match=f"other {named}; give another folder"):
        Scores(folder, CONFIGURATION | change)
    assert (folder / CONFIG).read_bytes() == before


def test_settings_by_their_old_names_are_the_same_run(tmp_path):
    arms = [{"wan": {"kind": "method", "method": {"kab": {end: 0.7, floor: 5e-4}}}}
            for end, floor in (("beta_end", "eps"), ("strength_end", "floor"))]  # fmt: skip
    old, new = (CONFIGURATION | {"settings": {name: "wan"}, "arms": own}
                for name, own in zip(("grid", "schedule"), arms, strict=True))  # fmt: skip
    with Scores(tmp_path / "out", old) as scores:
        scores.append([line("a")])
    with Scores(tmp_path / "out", new) as scores:
        assert scores.config["settings"] == {"schedule": "wan"} and scores.config["arms"] == arms[1]


def test_lengths_arms_and_seeds_may_join(folder):
    planned = {"25": {"wan": [1], "kab": [1]}, "33": {"vae": [None]}}
    more = {"arms": {"kab": {}, "vae": {}}, "planned": planned, "sets": {"33": {"ids": ["a"]}}}
    with Scores(folder, CONFIGURATION | more):
        grown = Scores(folder, None)
    assert list(grown.config["arms"]) == ["wan", "kab", "vae"]
    assert grown.config["planned"] == {"25": {"wan": [0, 1], "kab": [1]}, "33": {"vae": [None]}}
    assert list(grown.config["sets"]) == ["25", "33"] and len(grown.lines) == 2


def test_what_has_no_line_may_change(folder, tmp_path):
    """A mistyped command that was stopped before its first line does not bind the folder to what it said."""
    arms, sets = {"trf": {"image_model": "wrong"}}, {"33": {"ids": ["wrong"]}}
    wrong = CONFIGURATION | {"arms": arms, "sets": sets, "planned": {"33": {"trf": [0]}}}
    right = wrong | {"arms": {"trf": {"image_model": "right"}}, "sets": {"33": {"ids": ["right"]}}}
    for one in (wrong, right):
        Scores(folder, one).close()
    assert Scores(folder, None).config["arms"] == CONFIGURATION["arms"] | right["arms"]
    assert Scores(folder, None).config["sets"] == CONFIGURATION["sets"] | right["sets"]
    for one in (wrong | {"model": {"name": "m", "sha256": "damaged"}}, right):
        Scores(tmp_path / "new", one).close()
    assert Scores(tmp_path / "new", None).config == right


def test_every_environment_is_listed_once(folder):
    same, other = {"date": "2", "commit": "x"}, {"date": "3", "commit": "x", "command": "y"}
    for one in (same, other, same):
        Scores(folder, CONFIGURATION | {"environments": [one]}).close()
    assert Scores(folder, None).config["environments"] == [*CONFIGURATION["environments"], other]


def test_two_writers_at_once_are_refused(folder):
    code = (
        "import json, sys; from pathlib import Path; from benchmarks.tgi.scores import Scores; "
        "Scores(Path(sys.argv[1]), json.loads(sys.argv[2]))"
    )
    run = [sys.executable, "-c", code, str(folder), json.dumps(CONFIGURATION)]
    with Scores(folder, CONFIGURATION):
        second = subprocess.run(run, capture_output=True, text=True)
    assert second.returncode and "another run is writing there" in second.stderr
    assert subprocess.run(run, capture_output=True).returncode == 0


def test_folders_that_are_no_results(folder, tmp_path):
    with pytest.raises(ScoresError, match="no config.json"):
        Scores(tmp_path, None)
    for text in ("[]", json.dumps({name: value for name, value in CONFIGURATION.items() if name != "environments"})):
        (folder / CONFIG).write_text(text)
        for config in (CONFIGURATION, None):
            with pytest.raises(ScoresError, match="environments.* in it, so damaged or not of this version"):
                Scores(folder, config)
    for change, words in (({"sets": {"25": {}}}, "no ids in its sets"), ({"sets": []}, "its sets cannot"),
                          ({"planned": []}, "its planned cannot"), ({"arms": []}, "its arms cannot"),
                          ({"model": None}, "its model cannot"), ({"environments": None}, "its environments cannot"),
                          ({"planned": {"25": {"kab": [0]}}}, "planned names"),
                          ({"planned": {"33": {}}}, "planned names")):  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(CONFIGURATION | change))
        with pytest.raises(ScoresError, match=f"{words}.*give another folder"):
            Scores(folder, None)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ScoresError, match="cannot be read"):
        Scores(folder, None)
    (folder / CONFIG).unlink()
    with pytest.raises(ScoresError, match="but no config.json"):
        Scores(folder, CONFIGURATION)


def test_by_clip_averages_seeds_and_leaves_out_what_is_missing():
    lines = [line("a", 20.0), line("a", 30.0, seed=1), line("b", 10.0, challenge="static"), line("c", 9.0, "kab"),
             line("a", 1.0, length=33), {**line("d"), "metrics": {}}]  # fmt: skip
    assert by_clip(lines, 25, "wan", "psnr_interior") == {"a": 25.0, "b": 10.0}
    assert by_clip(lines, 25, "wan", "psnr_interior", "static") == {"b": 10.0}


def test_only_what_two_arms_share_is_compared():
    """Clip a has seeds 0 and 1 of wan and seed 1 alone of kab: a mean over all of wan's would compare other noise."""
    lines = [
        line("a", 20.0),
        line("a", 30.0, seed=1),
        line("a", 31.0, "kab", 1),
        line("b", 9.0),
        line("c", 8.0, "kab"),
        line("d", 7.0),
        line("d", 7.5, "kab", 1),
        line("a", 12.0, "nearest", None),
        line("a", 13.0, "vae", None),
    ]
    assert pairs(lines, 25, "kab", "wan", "psnr_interior") == ({"a": 31.0}, {"a": 30.0})
    assert pairs(lines, 25, "nearest", "wan", "psnr_interior") == ({"a": 12.0}, {"a": 25.0})
    assert pairs(lines, 25, "kab", "nearest", "psnr_interior") == ({"a": 31.0}, {"a": 12.0})
    assert pairs(lines, 25, "vae", "nearest", "psnr_interior") == ({"a": 13.0}, {"a": 12.0})


def test_unfinished_arms_are_counted():
    """Against what was asked for: an arm, a seed or a length that was not even begun lacks all of its clips."""
    planned = {"25": {"wan": [0], "kab": [0, 1], "vae": [None], "retro": [0]}, "33": {"wan": [0]}}
    config = {"sets": {"25": {"ids": ["a", "b"]}, "33": {"ids": ["a"]}}, "planned": planned}
    lines = [line("a"), line("b"), line("a", arm="kab"), line("a", arm="kab", seed=1), line("b", arm="kab"),
             line("a", arm="vae", seed=None), line("b", arm="vae", seed=None)]  # fmt: skip
    done = {key_of(one) for one in lines}
    assert unfinished(config, done) == [(25, "kab", 1, 2), (25, "retro", 0, 2), (33, "wan", 0, 1)]
    more = {Key(25, "b", "kab", 1), Key(25, "a", "retro", 0), Key(25, "b", "retro", 0), Key(33, "a", "wan", 0)}
    assert not unfinished(config, done | more)


def test_a_models_identity_is_what_is_loaded(tmp_path):
    shutil.copytree(checkpoint.bundled(), tmp_path / "tiny")
    first = model_identity(tmp_path / "tiny")
    (tmp_path / "tiny" / "notes.txt").write_text("mine")
    assert model_identity(tmp_path / "tiny") == first
    with open(tmp_path / "tiny" / "dit.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert model_identity(tmp_path / "tiny") != first


def test_a_converted_models_identity_is_its_manifests(tmp_path):
    for name in (checkpoint.CONFIG, checkpoint.TOKENIZER):
        (tmp_path / name).write_text("{}")
    found = []
    for digest, tool in (("1", "a"), ("1", "b"), ("2", "a")):
        arrays = {"dit/x": {"shape": [1], "dtype": "float32", "sha256": digest * 64}}
        (tmp_path / checkpoint.MANIFEST).write_text(store.Manifest(arrays, {}, tool, "float32").dumps())
        found.append(model_identity(tmp_path))
    assert found[0] == found[1] != found[2]
