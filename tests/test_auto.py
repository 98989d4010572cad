"""A method chosen by short tries: what is tried, how it is judged, and that the choice is the criterion's."""

import dataclasses

import jax
import numpy as np
import pytest
from nano import NANO, write_model

from benchmarks import method_auto
from benchmarks.tgi.metrics import psnr
from samplers import auto, pipeline
from samplers.pipeline import Inputs
from samplers.plan import Plan, Settings
from wanjax import checkpoint, config
from wanjax.kab import KAB
from wanjax.method import METHODS, Isolation, Method
from wanjax.retro import ReTRo

RNG = np.random.default_rng(0)
FIRST, LAST = RNG.integers(0, 256, (2, 16, 24, 3), np.uint8)
FEW = {"wan": Method(), "kab": Method(Isolation(), KAB(1.0, 1.0, layers=(0, 1), steps=(0.0, 1.0))),
       "retro": Method(retro=ReTRo("magnitude", 1.5, 0.5))}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.load(write_model(tmp_path_factory.mktemp("auto") / "nano"))


def tries_of(frames):
    """[N, R, T, H, W, 3] of given grey levels [N, R, T]."""
    return np.broadcast_to(np.asarray(frames, np.float32)[..., None, None, None], (*np.shape(frames), 4, 6, 3)).copy()


@pytest.mark.parametrize("name", METHODS)
def test_between_a_method_and_none(name):
    method = METHODS[name]
    assert auto.between(method, 1.0) == method
    none = auto.between(method, 0.0)
    assert none.isolation == method.isolation
    if method.kab:
        assert (none.kab.strength_end, none.kab.strength_mid, none.retro.s_edge, none.retro.s_mid) == (0, 0, 1, 1)
        half = auto.between(method, 0.5)
        assert half.kab.strength_end == method.kab.strength_end / 2 and half.kab.layers == method.kab.layers
        assert half.retro.s_mid == pytest.approx((1 + method.retro.s_mid) / 2) and half.retro.mode == method.retro.mode


def test_candidates_are_different_methods_wan_first():
    assert list(auto.CANDIDATES)[:3] == ["wan", "paper", "release"]
    assert len(set(auto.CANDIDATES.values())) == len(auto.CANDIDATES)


@pytest.mark.parametrize("size, multiple, low", [
    ((32, 32), 8, (32, 32)), ((480, 864), 16, (240, 432)), ((720, 1280), 16, (352, 640)), ((464, 848), 16, (464, 848)),
    ((1280, 720), 16, (640, 352)), ((480, 480), 16, (240, 240)),
])  # fmt: skip
def test_size_of_a_try(size, multiple, low):
    assert auto.low_size(size, multiple) == low


def test_a_try_is_short_and_without_method():
    big = config.preset("flf2v_14b")
    plan = auto.short(big, Settings.of(big, method="paper", frames=33), at=(0, 16, -1))
    assert (plan.settings.size, plan.settings.steps, plan.settings.method) == ((240, 432), 4, Method())
    assert plan.at == (0, 16, 32) and plan.settings.guidance == big.sampling.guidance
    assert auto.short(NANO, Settings.of(NANO, steps=2)).settings.steps == 2


def test_keyframes_are_judged_by_their_psnr():
    tries = RNG.integers(0, 256, (3, 2, 5, 16, 24, 3)).astype(np.float32)
    keyframes, at = np.stack([FIRST, LAST]), (1, 4)
    made = auto.by_keyframes(tries, keyframes, at)
    for candidate, score in zip(tries.astype(np.uint8), made, strict=True):
        assert score == pytest.approx(np.mean([psnr(one[list(at)], keyframes) for one in candidate]))
    tries[1][:, list(at)] = keyframes
    assert auto.by_keyframes(tries, keyframes, at).argmax() == 1
    assert auto.by_keyframes(tries, keyframes, at)[1] == 60


def test_smoothness_prefers_an_even_way_between_the_keyframes():
    keyframes = np.array([0, 40])[:, None, None, None] * np.ones((4, 6, 3))
    even, jump, made_ends = [0, 10, 20, 30, 40], [0, 0, 0, 40, 40], [99, 10, 20, 30, 99]
    scores = auto.by_smoothness(tries_of([[even], [jump], [made_ends]]), keyframes, (0, 4))
    assert scores[0] == scores[2] == 0 > scores[1]


def test_consensus_prefers_what_is_nearest_to_all():
    scores = auto.by_consensus(tries_of([[[0, 0]], [[10, 10]], [[50, 50]]]), np.zeros(()), ())
    np.testing.assert_allclose(scores, [-400, -100, -900])


def test_certainty_prefers_what_noise_decides_least():
    scores = auto.by_certainty(tries_of([[[0, 0], [10, 10]], [[100, 100], [102, 102]]]), np.zeros(()), ())
    np.testing.assert_allclose(scores, [-25, -1])


def test_tries_are_the_runs_of_their_methods(model):
    settings = Settings.of(NANO, prompt="a red circle", seed=3)
    plan = Plan.of(NANO, settings)
    (encoded,) = pipeline.encode(model, plan, [Inputs.prepare([(FIRST, LAST)], plan)], [["a red circle"]])
    noises = [pipeline.noise(plan, [seed]) for seed in (3, 4)]
    made = auto.tries(model, plan, encoded, noises, FEW)
    assert made.shape == (3, 2, 1, 5, 16, 24, 3)
    for number, method in enumerate(FEW.values()):
        for r, seed in enumerate((3, 4)):
            run = pipeline.inbetween(
                model, FIRST, LAST, settings=dataclasses.replace(settings, method=method, seed=seed)
            )
            assert np.array_equal(made[number, r], run.video)
    assert len({made[n].tobytes() for n in range(3)}) == 3


@pytest.mark.parametrize("criterion", auto.CRITERIA)
def test_the_choice_is_the_criterions_best(model, criterion, monkeypatch):
    settings = Settings.of(NANO, prompt="a red circle", method="paper")
    seen, told = [], []
    judge = auto.CRITERIA[criterion]

    def watched(tries, keyframes, at):
        seen.append((tries, keyframes, at, judge(tries, keyframes, at)))
        return seen[0][3]

    monkeypatch.setattr(auto, "CRITERIA", {criterion: watched})
    method, line = auto.choose(model, settings, [FIRST, LAST], criterion=criterion, candidates=FEW, on_try=told.append)
    ((tries, keyframes, at, scores),) = seen
    assert tries.shape == (3, 2, 5, 16, 24, 3) and np.array_equal(keyframes, [FIRST, LAST]) and at == (0, 4)
    assert told == list(FEW)
    best = list(FEW)[int(scores.argmax())]
    assert method == FEW[best]
    assert line.startswith(f"method auto: {best}, {criterion} {scores.max():.4g} in 3 steps at 16x24; ")
    assert all(name in line for name in FEW) and "\n" not in line


def test_of_equal_ones_the_first_is_taken(model):
    same = {"one": Method(), "other": Method(kab=KAB(0.0, 0.0))}
    method, line = auto.choose(model, Settings.of(NANO), [FIRST], (0,), candidates=same, noises=1)
    assert method == Method() and line.startswith("method auto: one, keyframes ")


@pytest.mark.slow
def test_on_several_devices_the_choice_is_the_same(model, tmp_path):
    from wanjax import sharding

    mesh = sharding.make_mesh({"data": 1, "sequence": 2}, jax.devices()[:2])
    folder = write_model(tmp_path / "nano")
    shared = checkpoint.load(folder, None, mesh)
    settings = Settings.of(NANO, prompt="a red circle")
    alone, both = (auto.choose(one, settings, [FIRST, LAST], candidates=FEW, noises=1, mesh=where)
                   for one, where in ((model, None), (shared, mesh)))  # fmt: skip
    assert alone[0] == both[0]


@pytest.mark.parametrize("change, told", [
    ({"criterion": "beauty"}, "criterion 'beauty': choose keyframes, smoothness, consensus, certainty"),
    ({"candidates": {}}, "method auto: 0 candidates"),
    ({"criterion": "certainty", "noises": 1}, "1 noises; give one or more, and 2 noises for certainty"),
    ({"noises": 0}, "0 noises"),
    ({"images": [FIRST]}, "keyframes: .* given, 2 planned"),
])  # fmt: skip
def test_what_cannot_be_tried(model, change, told):
    given = {"images": [FIRST, LAST], "candidates": FEW} | change
    with pytest.raises(ValueError, match=told):
        auto.choose(model, Settings.of(NANO), given.pop("images"), **given)


def test_the_trials_summary():
    """Of three clips and two candidates, by hand."""
    clips = [
        {"clip": str(n), "psnr": {"wan": w, "paper": p, "kab-tuned": w + 1},
         "scores": {"keyframes": {"wan": 1.0, "paper": s}, "certainty": {"wan": 1.0, "paper": 0.0}}}
        for n, (w, p, s) in enumerate([(20.0, 22.0, 2.0), (20.0, 19.0, 2.0), (20.0, 25.0, 0.0)])
    ]  # fmt: skip
    rows = method_auto.summary(clips)
    assert rows["wan"]["over_wan"] == 0 and rows["kab-tuned"]["over_wan"] == 1
    assert rows["paper"] == {"psnr_interior": 22.0, "over_wan": 2.0, "standard_error": round(3 / 3**0.5, 4)}
    assert rows["best of the candidates by the truth"]["psnr_interior"] == round((22 + 20 + 25) / 3, 4)
    auto_row = rows["auto by keyframes"]
    assert auto_row["psnr_interior"] == round((22 + 19 + 20) / 3, 4)
    assert auto_row["chosen"] == {"wan": 1, "paper": 2} and auto_row["rank_correlation"] == round((1 - 1 - 1) / 3, 4)
    assert rows["auto by certainty"]["over_wan"] == 0


def test_a_criterion_wins_only_if_it_does_in_every_model():
    def rows(over, error):
        names = auto.CRITERIA
        return {
            "arms": {f"auto by {n}": {"over_wan": o, "standard_error": error} for n, o in zip(names, over, strict=True)}
        }

    assert method_auto.winners({"a": rows([1, 1, 0, 0.1], 0.5), "b": rows([1, 0.2, 1, 1], 0.5)}) == ["keyframes"]


def test_development_clips_are_none_that_the_tuned_arms_were_chosen_on():
    assert [item.id for item in method_auto.items_of("dev", 9, 2)] == ["dev-00048", "dev-00049"]
    assert [item.id for item in method_auto.items_of("test", 25, 1)] == ["test-00000"]


BAD = "--model /nowhere; --frames 26; --split test --clips 145; --split test --frames 29; --clips 0"


@pytest.mark.parametrize("arguments", [one.split() for one in BAD.split(";")], ids=" ".join)
def test_bad_arguments_of_the_trial(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        method_auto.main(arguments)
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err
