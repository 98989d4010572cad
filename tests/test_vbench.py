"""VBench's commands and results: the shapes that upstream's sources and issues show, and files that are not such."""

import json
import shlex

import pytest

from benchmarks.tgi import vbench


def listed(**values):
    return [{"video_path": f"/data/videos/{name}.mp4", "video_results": value} for name, value in values.items()]


def written(folder, tree, name="results_2026-01-02-03:04:05_eval_results.json"):
    file = folder / name
    file.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return file


def test_each_dimension_by_itself(tmp_path):
    subject = listed(a=0.9, b=0.95)
    subject[0] |= {"video_sim": 21.6, "cnt_per_video": 24}  # a key more, as background_consistency has
    file = written(tmp_path, {
        "subject_consistency": [0.93, subject],
        "dynamic_degree": [0.5, listed(a=True, b=False)],
        "imaging_quality": [0.65, listed(a=60.0, b=70.0)],
    })  # fmt: skip
    found = vbench.read(file)
    assert list(found) == ["subject_consistency", "dynamic_degree", "imaging_quality"]
    assert found["subject_consistency"] == {"mean": 0.93, "videos": {"a.mp4": 0.9, "b.mp4": 0.95}}
    assert found["dynamic_degree"] == {"mean": 0.5, "videos": {"a.mp4": 1.0, "b.mp4": 0.0}}
    assert found["imaging_quality"]["mean"] == 0.65  # upstream divides the mean by 100, and not the videos
    assert found["imaging_quality"]["videos"] == pytest.approx({"a.mp4": 0.6, "b.mp4": 0.7})
    assert all(type(v) is float for one in found.values() for v in (one["mean"], *one["videos"].values()))


def test_a_folder_of_results_is_read_together(tmp_path):
    written(tmp_path, {"motion_smoothness": [0.99, listed(a=0.99)]}, "results_1_eval_results.json")
    written(tmp_path, {"aesthetic_quality": [0.4, listed(a=0.4)]}, "results_2_eval_results.json")
    written(tmp_path, [{"prompt_en": "a"}], "results_2_full_info.json")  # upstream's own input, beside them
    assert set(vbench.read(tmp_path)) == {"motion_smoothness", "aesthetic_quality"}
    again = written(tmp_path, {"aesthetic_quality": [0.5, listed(a=0.5)]}, "results_3_eval_results.json")
    with pytest.raises(ValueError, match=f"{again.name}.*aesthetic_quality is in another file"):
        vbench.read(tmp_path)


def test_windows_paths_and_cosines_above_one(tmp_path):
    video = {"video_path": "C:\\videos\\a-0.mp4", "video_results": 1.0000001}
    found = vbench.read(written(tmp_path, {"background_consistency": [1.0000001, [video]]}))
    assert found["background_consistency"]["videos"] == {"a-0.mp4": 1.0000001}


BAD = {
    "not JSON": ('{"motion_smoothness": [0.9', "not JSON"),
    "not UTF-8 text": ("\ud800", "not JSON"),
    "a list": ([1, 2], "not VBench's results"),
    "nothing": ({}, "not VBench's results"),
    "a number alone": ({"motion_smoothness": 0.9}, r"motion_smoothness is not \[mean, list of videos\]"),
    "no list of videos": ({"motion_smoothness": [0.9]}, r"is not \[mean, list of videos\]"),
    "no videos": ({"motion_smoothness": [0.9, []]}, "has no videos"),
    "a video without a path": ({"motion_smoothness": [0.9, [{"video_results": 1}]]}, "without video_path"),
    "a video without a result": ({"motion_smoothness": [0.9, [{"video_path": "a"}]]}, "of a is None"),
    "a video twice": ({"motion_smoothness": [0.9, listed(a=1) * 2]}, "a.mp4 twice"),
    "words": ({"motion_smoothness": [0.9, listed(a="1")]}, "of a.mp4 is '1'"),
    "a mean that is null": ({"motion_smoothness": [None, listed(a=1)]}, "mean of motion_smoothness is None"),
    "NaN": ({"motion_smoothness": [float("nan"), listed(a=1)]}, "is nan, not a finite number"),
    "infinity": ({"motion_smoothness": [0.9, listed(a=float("-inf"))]}, "is -inf, not a finite number"),
    "more digits than a float has": ({"motion_smoothness": [10**400, listed(a=1)]}, "not a finite number"),
    "a sum over frames": ({"subject_consistency": [0.98, listed(a=10.98)]}, "10.98, too large"),
    "old imaging quality": ({"imaging_quality": [66.8, listed(a=66.8)]}, "66.8, too large"),
}


@pytest.mark.parametrize("tree, message", BAD.values(), ids=BAD)
def test_what_is_not_a_result(tmp_path, tree, message):
    file = tmp_path / "x_eval_results.json"
    text = tree if isinstance(tree, str) else json.dumps(tree)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=message) as caught:
        vbench.read(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_no_results_at_all(tmp_path):
    with pytest.raises(ValueError, match="gone.json: cannot be read"):
        vbench.read(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="no .*_eval_results.json in this folder"):
        vbench.read(tmp_path)


def test_commands_are_those_of_the_custom_input_mode(tmp_path):
    lines = vbench.commands(tmp_path / "videos", tmp_path / "results")
    assert [line[line.index("--dimension") + 1] for line in lines] == list(vbench.DIMENSIONS)  # it takes one at a time
    assert shlex.join(lines[0]) == (
        f"vbench evaluate --dimension subject_consistency --videos_path {tmp_path}/videos --mode custom_input "
        f"--output_path {tmp_path}/results"
    )
    assert len(vbench.commands(tmp_path, tmp_path, ["imaging_quality"])) == 1


def test_commands_that_upstream_would_not_take(tmp_path):
    with pytest.raises(ValueError, match="object_class: not for videos of one's own"):
        vbench.commands(tmp_path, tmp_path, ["imaging_quality", "object_class"])
    for odd in ("with space", "a;b", "$(x)", 'q"'):
        with pytest.raises(ValueError, match="through a shell"):
            vbench.commands(tmp_path / odd, tmp_path)
        with pytest.raises(ValueError, match="through a shell"):
            vbench.commands(tmp_path, tmp_path / odd)


def test_videos_lie_in_one_flat_folder(tmp_path):
    one, two = tmp_path / "x.mp4", tmp_path / "y.MP4"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    vbench.lay_out({"red-0": one, "red-1": two}, tmp_path / "new" / "folder")
    made = {file.name: file.read_bytes() for file in (tmp_path / "new" / "folder").iterdir()}
    assert made == {"red-0.mp4": b"1", "red-1.mp4": b"2"}
    with pytest.raises(ValueError, match="holds files already"):
        vbench.lay_out({"red-0": one}, tmp_path / "new" / "folder")


@pytest.mark.parametrize(
    "name, file, message",
    [
        ("a", "gone.mp4", "no such video"),
        ("a", "x.gif", r"VBench measures \.mp4 files"),
        ("../a", "x.mp4", "must not lead out"),
        ("", "x.mp4", "must not lead out"),
    ],
)
def test_videos_that_cannot_be_laid_out(tmp_path, name, file, message):
    for there in ("x.mp4", "x.gif"):
        (tmp_path / there).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        vbench.lay_out({name: tmp_path / file}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no videos"):
        vbench.lay_out({}, tmp_path / "out")
