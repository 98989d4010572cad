"""The networks in a run: what is unavailable, what is written, and distances of whole sets."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.tgi import frechet, neural
from benchmarks.tgi.networks import weights
from benchmarks.tgi.neural import Neural, feature_file
from benchmarks.tgi.scores import Key, Scores


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A weights folder whose networks are stand-ins with known answers; their own tests are elsewhere."""
    for name in weights.NETWORKS:
        save_file({"x": np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(weights, "load", lambda name, path: name)
    monkeypatch.setattr(neural, "_lpips", lambda params, a, b: np.abs(a.astype(float) - b).mean((1, 2, 3)))
    monkeypatch.setattr(
        neural, "_inception", lambda params, frames: frames.reshape(len(frames), -1)[:, :6].astype(float)
    )
    monkeypatch.setattr(neural, "_i3d", lambda params, video: video.reshape(len(video), -1)[:, :4].astype(float))
    return tmp_path


def video(seed, frames=20):
    return np.random.default_rng(seed).integers(0, 256, (frames, 12, 12, 3), dtype=np.uint8)


def scored(tmp_path, networks, clips, frames=20, arms=("truth", "wan")):
    config = {"arms": {arm: {} for arm in arms}, "metrics": networks.policy(), "sets": {}, "model": {}, "settings": {},
              "batch": 1, "planned": {}, "environments": []}  # fmt: skip
    with Scores(tmp_path / "out", config) as scores:
        for n in range(clips):
            for number, arm in enumerate(arms):
                key = Key(frames, f"c{n}", arm, 0)
                found = networks.measure(key, video(10 * n + number, frames), video(10 * n, frames), scores.folder)
                scores.append(
                    [
                        {
                            "length": frames,
                            "clip": key.clip,
                            "arm": arm,
                            "seed": 0,
                            "challenge": "",
                            "metrics": found,
                            "psnr_frames": [],
                        }
                    ]
                )
    return scores


def test_absent_weights_are_unavailable_and_nothing_else(tmp_path):
    networks = Neural(None)
    assert {told["weights"] for told in networks.policy().values()} == {"unavailable"}
    scores = scored(tmp_path, networks, 2)
    assert all(line["metrics"] == {} for line in scores.lines) and not (scores.folder / "features").exists()
    assert neural.distances(scores, 20, ["wan"]) == {"wan": {"fid": "unavailable", "fvd": "unavailable"}}


def test_weights_that_are_there_are_named_by_their_hash(folder):
    told = Neural(folder).policy()
    assert told["fid"]["weights"] == weights.digest(folder / "inception.safetensors")
    for one in told.values():
        assert {"implementation", "resize", "frames", "weights"} == set(one)


def test_distances_are_of_the_interior_frames_and_whole_clips(folder, tmp_path):
    scores = scored(tmp_path, Neural(folder), 3)
    assert scores.lines[0]["metrics"] == {"lpips_interior": 0.0} and scores.lines[1]["metrics"]["lpips_interior"] > 10
    found = neural.distances(scores, 20, ["truth", "wan"], draws=20)
    assert found["truth"]["fid"]["distance"] == pytest.approx(0, abs=1e-6)
    rows = [np.concatenate([video(10 * n + arm)[1:-1].reshape(18, -1)[:, :6] for n in range(3)]) for arm in (0, 1)]
    assert found["wan"]["fid"]["distance"] == pytest.approx(frechet.distance(*rows), rel=1e-6)
    assert found["wan"]["fid"]["samples"] == 54 and found["wan"]["fvd"]["samples"] == 3
    assert found["wan"]["fid"]["low"] <= found["wan"]["fid"]["high"]


def test_frames_too_small_for_lpips_are_told_before_the_run(folder):
    Neural(None).check((16, 24))
    Neural(folder).check((31, 32))
    with pytest.raises(ValueError, match="size 30x32: LPIPS takes none below 31"):
        Neural(folder).check((30, 32))


def test_more_seeds_are_not_more_samples(folder, tmp_path):
    """The truth has one video of a clip and no seed: an arm with two must not have a lower distance for it."""
    networks = Neural(folder)
    scores = scored(tmp_path, networks, 3)
    once = neural.distances(scores, 20, ["wan"], draws=5)
    for n in range(3):
        key = Key(20, f"c{n}", "wan", 1)
        networks.measure(key, video(50 + n), video(10 * n), scores.folder)
        scores.append(
            [
                {
                    "length": 20,
                    "clip": key.clip,
                    "arm": "wan",
                    "seed": 1,
                    "challenge": "",
                    "metrics": {},
                    "psnr_frames": [],
                }
            ]
        )
    assert neural.distances(scores, 20, ["wan"], draws=5) == once


def test_too_little_is_undefined(folder, tmp_path):
    one = neural.distances(scored(tmp_path, Neural(folder), 1), 20, ["wan"], draws=5)["wan"]
    assert one["fvd"] == "undefined" and one["fid"]["low"] is None
    short = neural.distances(scored(tmp_path / "short", Neural(folder), 2, frames=8), 8, ["wan"], draws=5)["wan"]
    assert short["fvd"] == "undefined" and not isinstance(short["fid"], str)


def test_without_the_truth_there_is_no_distance(folder, tmp_path):
    scores = scored(tmp_path, Neural(folder), 2, arms=("wan",))
    assert neural.distances(scores, 20, ["wan"], draws=5)["wan"] == {"fid": "unavailable", "fvd": "unavailable"}


def test_features_come_before_the_line_and_whole(folder, tmp_path):
    scores = scored(tmp_path, Neural(folder), 1)
    file = feature_file(scores.folder, "inception", Key(20, "c0", "wan", 0))
    assert np.load(file).shape == (18, 6) and np.load(file).dtype == np.float32
    assert not list(scores.folder.rglob("*.part"))


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        Neural(tmp_path / "nothing")
