"""The search for settings: what is tried, what wins, and that it goes on into a comparison."""

import dataclasses

import pytest

from benchmarks.tgi import tune
from benchmarks.tgi.arms import CLAIMS, read_own
from benchmarks.tgi.scores import Scores
from wanjax.method import METHODS, Method


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
    config = {"arms": {arm.name: arm.plain() for arm in arms}, "seeds": [0]}
    lines = [
        {"length": length, "clip": clip, "arm": arm.name, "seed": 0, "challenge": "",
         "metrics": {"psnr_interior": base + gains.get(arm.name, -1.0) * (arm.name != "wan")}}
        for length in (25, 33) for clip, base in (("a", 10.0), ("b", 30.0)) for arm in arms
    ]  # fmt: skip
    with Scores(tmp_path, config) as scores:
        scores.append(lines)
    found = tune.best(scores, [25, 33])
    assert {name: (one["arm"], one["gain"]) for name, one in found.items()} == {
        "kab-tuned": ("kab-001", pytest.approx(0.3)),
        "retro-tuned": ("retro", pytest.approx(0.2)),
        "both-tuned": ("release", pytest.approx(0.05)),
    }
    tune.write(found, tmp_path / "tuned.json")
    own = {arm.name: (arm.kind, arm.method) for arm in read_own(tmp_path / "tuned.json")}
    by_name = {arm.name: arm.method for arm in arms}
    kab, retro = by_name["kab-001"], by_name["retro"]
    uniform = Method(retro=dataclasses.replace(retro.retro, s_edge=1.0, s_mid=1.0))  # the mean of 1.06 and 0.94
    assert own == {
        "kab-tuned": ("method", kab),
        "retro-tuned": ("method", retro),
        "both-tuned": ("method", METHODS["release"]),
        "kab-tuned-shuffled": ("shuffled-anchors", kab),
        "kab-tuned-random": ("random-bias", kab),
        "retro-tuned-uniform": ("method", uniform),
    } | ({} if kab.isolation is None else {"kab-tuned-isolation": ("method", Method(kab.isolation))})
    assert {claim.arm for claim in CLAIMS if claim.source.startswith("tuned")} <= {*own, "kab-tuned-isolation"}
