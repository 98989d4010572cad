"""The results file: what may be gone on with, torn lines, other runs, two writers."""

import json
import subprocess
import sys

import pytest

from benchmarks.tgi.scores import CONFIG, LINES, Key, Scores, ScoresError, by_clip, key_of, model_identity

CONFIGURATION = {"model": {"name": "m", "sha256": "0"}, "settings": {"steps": 3}, "seeds": [0],
                 "arms": {"wan": {"kind": "method"}}}  # fmt: skip


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
    assert again.done == {Key(25, "a", "wan", 0), Key(25, "b", "wan", 0)}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_cut_off(folder, cut):
    whole = (folder / LINES).read_bytes()
    (folder / LINES).write_bytes(whole[:-cut])
    assert [key_of(one).clip for one in Scores(folder, None).lines] == ["a"]
    assert (folder / LINES).read_bytes() == whole[:-cut], "reading alone changes nothing"
    with Scores(folder, CONFIGURATION) as again:
        again.append([line("b", 22.0)])
    assert (folder / LINES).read_bytes() == whole


@pytest.mark.parametrize("damage", ["{broken\n", "[]\n", '{"clip": "a"}\n', "null\n"])
def test_a_damaged_line_in_the_middle_is_named(folder, damage):
    lines = (folder / LINES).read_text().splitlines(keepends=True)
    (folder / LINES).write_text(lines[0] + damage + lines[1])
    with pytest.raises(ScoresError, match="line 2 is damaged"):
        Scores(folder, CONFIGURATION)


def test_a_line_that_stands_there_twice(folder):
    with open(folder / LINES, "a") as file:
        file.write(json.dumps(line("a")) + "\n")
    with pytest.raises(ScoresError, match="twice"):
        Scores(folder, CONFIGURATION)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"settings": {"steps": 4}}, "settings"),
        ({"model": {"name": "m", "sha256": "1"}}, "model"),
        ({"arms": {"wan": {"kind": "other"}}}, "arm wan"),
        ({"more": 1}, "more"),
    ],
)
def test_another_run_is_refused_by_name(folder, change, named):
    before = (folder / CONFIG).read_bytes()
    with pytest.raises(ScoresError, match=f"other {named}; give another folder"):
        Scores(folder, CONFIGURATION | change)
    assert (folder / CONFIG).read_bytes() == before


def test_arms_and_seeds_may_join(folder):
    with Scores(folder, CONFIGURATION | {"arms": {"kab": {"kind": "method"}}, "seeds": [1]}):
        grown = Scores(folder, None)
    assert list(grown.config["arms"]) == ["wan", "kab"] and grown.config["seeds"] == [0, 1]
    assert len(grown.lines) == 2


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


def test_a_models_identity_is_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights").write_bytes(b"12")
    first = model_identity(tmp_path)
    assert model_identity(tmp_path) == first
    (tmp_path / "part" / "weights").write_bytes(b"13")
    assert model_identity(tmp_path) != first
