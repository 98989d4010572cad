"""The search for settings: what is tried, what wins, and that it goes on into a comparison."""

import pytest

from benchmarks.tgi import tune
from benchmarks.tgi.arms import CLAIMS, read_own
from benchmarks.tgi.scores import Scores
from wanjax.method import METHODS, Method

CONFIGURATION = {"model": {}, "settings": {}, "batch": 1, "metrics": {}, "planned": {}, "environments": []}


def test_candidates_are_fixed_and_hold_the_papers_settings():
    one, two = tune.candidates(5, 6), tune.candidates(5, 6)
    assert one == two and len({arm.name for arm in one}) == len(one) == 5 + 15
    methods = {arm.name: arm.method for arm in one}
    assert methods["paper"] == METHODS["paper"] and methods["wan"] == METHODS["wan"]
    for n in range(5):
        kab, retro, both = (methods[f"{group}-{n:03d}"] for group in ("kab", "retro", "both"))
        assert kab.retro is None and retro.kab is None and both.kab == kab.kab and both.retro == retro.retro
        assert 0 <= kab.kab.layers[0] <= kab.kab.layers[1] < 6
    assert tune.candidates(7, 6)[: len(one)] == one, "more trials keep the earlier ones"


def test_the_best_of_each_group_wins_and_can_be_run(tmp_path):
    arms = tune.candidates(3, 6)
    gains = {"kab": 0.1, "kab-001": 0.3, "retro": 0.2, "paper": -0.1, "release": 0.05, "both-002": 0.04}
    sets = {str(length): {"ids": ["a", "b"]} for length in (25, 33)}
    config = CONFIGURATION | {"arms": {arm.name: arm.plain() for arm in arms}, "sets": sets}
    lines = [
        {"length": length, "clip": clip, "arm": arm.name, "seed": 0, "challenge": "",
         "metrics": {"psnr_interior": base + gains.get(arm.name, -1.0) * (arm.name != "wan")}, "psnr_frames": []}
        for length in (25, 33) for clip, base in (("a", 10.0), ("b", 30.0)) for arm in arms
    ]  # fmt: skip
    with Scores(tmp_path, config) as scores:
        scores.append(lines)
    found = tune.best(scores, arms, [25, 33], [0])
    assert {name: (one["arm"], one["gain"]) for name, one in found.items()} == {
        "kab-tuned": ("kab-001", pytest.approx(0.3)),
        "retro-tuned": ("retro", pytest.approx(0.2)),
        "both-tuned": ("release", pytest.approx(0.05)),
    }
    tune.write(found, "procedural-dev", tmp_path / "tuned.json")
    own = {arm.name: (arm.kind, arm.method) for arm in read_own(tmp_path / "tuned.json")}
    by_name = {arm.name: arm.method for arm in arms}
    kab, retro = by_name["kab-001"], by_name["retro"]
    assert own == {
        "kab-tuned": ("method", kab),
        "retro-tuned": ("method", retro),
        "both-tuned": ("method", METHODS["release"]),
        "kab-tuned-shuffled": ("shuffled-anchors", kab),
        "kab-tuned-random": ("random-bias", kab),
        "retro-tuned-uniform": ("uniform-scale", retro),
    } | ({} if kab.isolation is None else {"kab-tuned-isolation": ("method", Method(kab.isolation))})
    assert {claim.arm for claim in CLAIMS if claim.source.startswith("tuned")} <= {*own, "kab-tuned-isolation"}


def test_an_arm_that_lacks_clips_does_not_win(tmp_path):
    """Scored on the easier clip alone it would; nor does one that is not tried any more."""
    arms = tune.candidates(1, 6)
    config = CONFIGURATION | {"arms": {arm.name: arm.plain() for arm in arms}, "sets": {"25": {"ids": ["a", "b"]}}}
    lines = [
        {"length": 25, "clip": clip, "arm": arm.name, "seed": 0, "challenge": "", "metrics": {"psnr_interior": value},
         "psnr_frames": []}
        for arm in arms for clip, value in (("a", 30.0), ("b", 10.0)) if (arm.name, clip) != ("kab-000", "b")
    ]  # fmt: skip
    with Scores(tmp_path, config) as scores:
        scores.append(lines)
    with pytest.raises(ValueError, match="kab-000 has 1 of 2 clips of 25 frames"):
        tune.best(scores, arms, [25], [0])
    left = [arm for arm in arms if arm.name != "kab-000"]
    found = tune.best(scores, left, [25], [0])
    assert found["kab-tuned"]["arm"] == "kab"
    more = [dict(scores.lines[0], seed=1, arm=arm, metrics={"psnr_interior": value})
            for arm, value in (("wan", 30.0), ("retro", 90.0))]  # fmt: skip
    scores.append(more)  # of a run with more seeds that was stopped
    assert tune.best(scores, left, [25], [0]) == found


@pytest.mark.parametrize("mode, has", [("frequency", True), ("position", False)])
def test_a_uniform_scale_is_a_control_where_it_changes_something(tmp_path, mode, has):
    retro = {"mode": mode, "s_edge": 1.1, "s_mid": 0.9, "w_edge": None, "smooth": 0}
    found = {
        "kab-tuned": {"gain": 0.0, "settings": {"kab": {}}},
        "retro-tuned": {"gain": 0.0, "settings": {"retro": retro}},
    }
    tune.write(found, "mine", tmp_path / "tuned.json")
    own = {arm.name: arm for arm in read_own(tmp_path / "tuned.json")}
    assert ("retro-tuned-uniform" in own) == has and "on mine" in own["kab-tuned"].about
