"""KAB: when and how strongly it acts, frame attention and the bias of it, and settings that it refuses."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from reference import relative_error

from wanjax import kab
from wanjax.cross import cross_attention
from wanjax.kab import CURVES, KAB
from wanjax.types import Branches, CrossBias, CrossControl


@pytest.mark.parametrize(
    "steps, layers, frames, window",
    [
        (50, 40, 21, (5, 12)), (10, 6, 7, (1, 1)), (25, 30, 9, (4, 9)), (7, 40, 17, (5, 12)), (15, 2, 8, (0, 0)),
        (5, 1, 4, (0, 0)), (6, 40, 3, (5, 12)), (1, 40, 7, (5, 12)), (50, 40, 2, (5, 12)),
    ],
)  # fmt: skip
def test_strength_against_float64(steps, layers, frames, window):
    strength = kab.strength(KAB(), steps, layers, frames)
    assert strength.shape == (steps, layers, frames) and strength.dtype == np.float32
    np.testing.assert_allclose(strength, oracle.strength(steps, layers, frames, window), rtol=1e-6)


def test_strength_of_other_settings():
    chosen = KAB(strength_end=0.1, strength_mid=1.5, layers=(3, 29), steps=(0.2, 0.7))
    strength = kab.strength(chosen, 20, 30, 9)
    np.testing.assert_allclose(strength, oracle.strength(20, 30, 9, (3, 29), 0.1, 1.5, 0.2, 0.7), rtol=1e-6)
    assert [int(i) for i in np.flatnonzero(strength.any((1, 2)))] == list(range(5, 15))
    assert not kab.strength(KAB(strength_end=0.0, strength_mid=0.0), 20, 30, 9).any()


def test_published_run():
    """50 steps, 40 layers, 21 latent frames: where it acts, and strengths worked out by hand."""
    strength = kab.strength(KAB(), 50, 40, 21)
    active = np.argwhere(strength != 0)
    steps, layers, frames = (np.unique(column) for column in active.T)
    assert np.array_equal(steps, np.arange(1, 21))
    assert np.array_equal(layers, np.arange(5, 13))
    assert np.array_equal(frames, np.arange(1, 20))
    assert len(active) == 20 * 8 * 19
    assert (strength[1:21, 5:13] == strength[1, 5]).all()
    row = strength[1, 5]
    assert np.array_equal(row, row[::-1])
    # 0.3 + 0.4 * (1 + cos(pi * i / 10)) / 2
    wanted = {0: 0, 1: 0.6902113, 2: 0.6618034, 4: 0.5618034, 5: 0.5, 6: 0.4381966, 9: 0.3097887, 10: 0.3}
    np.testing.assert_allclose([row[i] for i in wanted], list(wanted.values()), rtol=1e-6)
    assert (np.diff(row[1:11]) < 0).all() and row.max() < 0.7


@pytest.mark.parametrize(
    "layers, window", [(40, (5, 12)), (30, (4, 9)), (8, (1, 2)), (6, (1, 1)), (2, (0, 0)), (1, (0, 0))]
)
def test_default_layers_scale_with_the_depth(layers, window):
    assert kab.layer_window(KAB(), layers) == window


def test_given_layers_are_kept():
    assert kab.layer_window(KAB(layers=(0, 39)), 40) == (0, 39)
    assert kab.layer_window(KAB(layers=(5, 5)), 6) == (5, 5)


def test_curves():
    assert set(CURVES) == {"linear", "ease-in", "ease-out", "ease-in-out"}
    shares = {name: kab.anchor_curve(KAB(curve=name), 9) for name in CURVES}
    for share in shares.values():
        np.testing.assert_array_equal(share[:, 0], np.float32(1) - share[:, 1])
    curves = {name: share[:, 1] for name, share in shares.items()}
    for curve in curves.values():
        assert curve.dtype == np.float32 and curve[0] == 0 and curve[-1] == 1
        assert (np.diff(curve) > 0).all()
    t = np.arange(9) / 8
    np.testing.assert_allclose(curves["linear"], t, rtol=1e-7)
    assert (curves["ease-in"][1:-1] < t[1:-1]).all() and (curves["ease-out"][1:-1] > t[1:-1]).all()
    np.testing.assert_allclose(curves["ease-out"], 1 - curves["ease-in"][::-1], atol=1e-7)
    np.testing.assert_allclose(curves["ease-in-out"], 1 - curves["ease-in-out"][::-1], atol=1e-7)
    assert curves["ease-in-out"][2] < t[2] and curves["ease-in-out"][4] == 0.5


def test_callers_curve():
    given = (0.0, 0.1, 0.1, 0.9, 1.0)
    assert np.array_equal(kab.anchor_curve(KAB(curve=given), 5)[:, 1], np.float32(given))


ANCHORS = [
    (7, (3,)),
    (7, (0,)),
    (7, (6,)),
    (9, (0, 8)),
    (9, (2, 5)),
    (9, (0, 3, 8)),
    (21, (1, 2, 14)),
    (21, (0, 9, 10, 20)),
]


@pytest.mark.parametrize("frames, at", ANCHORS, ids=str)
def test_anchors_inside_against_float64(frames, at):
    """Strength and shares of one, two, three and four anchors, for named curves and a caller's."""
    strength = kab.strength(KAB(), 10, 6, frames, at)
    np.testing.assert_allclose(strength, oracle.strength(10, 6, frames, (1, 1), anchors=at), rtol=1e-6)
    assert not strength[..., list(at)].any() and strength[1, 1].astype(bool).sum() == frames - len(at)
    np.testing.assert_allclose(kab.anchor_curve(KAB(), frames, at), oracle.anchor_curve(frames, at), atol=1e-7)
    curve = tuple(np.random.default_rng(0).uniform(size=frames))
    given = kab.anchor_curve(KAB(curve=curve), frames, at)
    np.testing.assert_allclose(given, oracle.anchor_curve(frames, at, curve), atol=1e-7)
    eased = kab.anchor_curve(KAB(curve="ease-in"), frames, at)
    assert given.dtype == eased.dtype == np.float32 and given.shape == (frames, len(at))
    np.testing.assert_allclose([given.sum(1), eased.sum(1)], 1, atol=1e-7)
    np.testing.assert_array_equal(eased[list(at)], np.eye(len(at)))


def test_two_anchors_at_the_ends_are_the_default():
    for frames in (2, 5, 8, 21):
        ends = (0, frames - 1)
        assert np.array_equal(kab.strength(KAB(), 50, 40, frames, ends), kab.strength(KAB(), 50, 40, frames))
        for curve in CURVES:
            shares = (kab.anchor_curve(KAB(curve=curve), frames, at) for at in (ends, None))
            assert np.array_equal(*shares)


def test_a_segment_is_a_clip_of_its_own():
    whole, part = (kab.strength(KAB(), 50, 40, 21, (0, 8, 20)), kab.strength(KAB(), 50, 40, 9))
    assert np.array_equal(whole[..., :9], part)
    shares = kab.anchor_curve(KAB(curve="ease-out"), 21, (0, 8, 20))
    assert np.array_equal(shares[:9, :2], kab.anchor_curve(KAB(curve="ease-out"), 9)) and not shares[:9, 2].any()


def test_no_anchor():
    with pytest.raises(ValueError, match="^KAB needs a keyframe to anchor to: give one, or switch it off$"):
        kab.strength(KAB(), 50, 40, 21, ())
    assert kab.anchor_curve(KAB(), 21, ()).shape == (21, 0)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"strength_end": -0.1}, "strength_end -0.1"),
        ({"strength_end": NAN}, "strength_end nan"),
        ({"strength_end": INF}, "strength_end inf"),
        ({"strength_mid": -0.1}, "strength_mid -0.1"),
        ({"strength_mid": NAN}, "strength_mid nan"),
        ({"strength_mid": INF}, "strength_mid inf"),
        ({"floor": 0.0}, "kab floor 0.0"),
        ({"floor": -5e-4}, "kab floor -0.0005"),
        ({"floor": NAN}, "kab floor nan"),
        ({"floor": INF}, "kab floor inf"),
        ({"layers": (5, 40)}, "kab layers 5-40: the model has layers 0 to 39"),
        ({"layers": (-1, 3)}, "kab layers -1-3"),
        ({"layers": (12, 5)}, "kab layers 12-5"),
        ({"layers": (1, 2, 3)}, "kab layers 1-2-3"),
        ({"layers": (1.5, 3)}, "kab layers (1.5, 3)"),
        ({"steps": 0.4}, "kab steps 0.4: give two shares"),
        ({"strength_end": "strong"}, "strength_end 'strong': give a number"),
        ({"curve": np.zeros((7, 1, 2))}, "anchor curve array"),
        ({"steps": (0.0, 0.2, 0.4)}, "kab steps 0-0.2-0.4"),
        ({"steps": (0.4, 0.2)}, "kab steps 0.4-0.2"),
        ({"steps": (-0.1, 0.4)}, "kab steps -0.1-0.4"),
        ({"steps": (0.0, 1.1)}, "kab steps 0-1.1"),
        ({"steps": (0.0, NAN)}, "kab steps 0-nan"),
        ({"curve": "cubic"}, "anchor curve 'cubic': choose linear, ease-in"),
        ({"curve": (0.0, 0.5, 1.0)}, "anchor curve of 3 numbers: give one for each of the 21"),
        ({"curve": ()}, "anchor curve of 0 numbers"),
        ({"curve": (0.5,) * 20 + (1.01,)}, "anchor curve: every number"),
        ({"curve": (-0.01,) + (0.5,) * 20}, "anchor curve: every number"),
        ({"curve": (NAN,) + (0.5,) * 20}, "anchor curve: every number"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        chosen = KAB(**changes)
        kab.strength(chosen, 50, 40, 21)
        kab.anchor_curve(chosen, 21)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("frames", [0, 1])
def test_fewer_than_two_frames(frames):
    with pytest.raises(ValueError, match=f"^latent frames {frames}: KAB needs a first and a last one$"):
        kab.strength(KAB(), 50, 40, frames)


def arrays(frames, queries=5, heads=3, keys=7):
    rng = np.random.default_rng(frames)
    q, k = (2 * rng.standard_normal((2, n, heads, 8), np.float32) for n in (frames * queries, keys))
    return q, k, rng.standard_normal((2, frames, keys), np.float32)


def frame_attention(q, k, frames, bias=None):
    """As a report shows it: (without, with the bias), under a control of no strength."""
    none = np.zeros((2, frames), np.float32)
    control = CrossControl(np.int32([0]), np.ones((frames, 1), np.float32), 5e-4, False, np.ones(1))
    branch = Branches(k)
    _, seen = cross_attention(q, branch, branch, CrossBias(bias), control, none, inspect=True)
    return seen.plain.text, seen.biased.text


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_frame_attention_against_float64(frames):
    q, k, bias = arrays(frames)
    plain, biased = frame_attention(q, k, frames, bias)
    assert plain.shape == (2, frames, 7) and plain.dtype == jnp.float32
    assert relative_error(plain, oracle.frame_attention(q, k, frames)) <= 1e-6
    assert relative_error(biased, oracle.frame_attention(q, k, frames, bias)) <= 1e-6
    assert relative_error(biased, plain) > 0.1
    assert relative_error(*frame_attention(q, k, frames)) <= 1e-6


def test_frames_must_divide_the_queries():
    q, k, _ = arrays(7)
    with pytest.raises(ValueError, match="^35 queries are not 8 frames of equal size$"):
        frame_attention(q, k, 8)


def attention(frames=7, keys=9):
    """Rows that sum to 1, some of them far below the floor."""
    weights = np.exp(4 * np.random.default_rng(0).normal(size=(2, frames, keys)))
    return weights / weights.sum(-1, keepdims=True)


def target(rows, share, at=(0, 6)):
    return np.einsum("fa,bak->bfk", share, rows[:, list(at)])


LINEAR = np.stack([np.linspace(1, 0, 7), np.linspace(0, 1, 7)], 1)


@pytest.mark.parametrize("curve", [*CURVES, (0.0, 0.2, 0.3, 0.3, 0.3, 0.9, 1.0)], ids=str)
def test_anchor_bias_against_float64(curve):
    rows = attention()
    strength = np.random.default_rng(1).uniform(0, 1, (2, 7))
    strength[1, 2] = 0
    share = kab.anchor_curve(KAB(curve=curve), 7)
    bias = kab.anchor_bias(*(jnp.asarray(x, jnp.float32) for x in (rows, target(rows, share), strength, 5e-4)))
    assert relative_error(bias, oracle.anchor_bias(rows, strength, share[:, 1])) <= 1e-6
    assert not bias[1, 2].any() and bias[0, 2].any()
    if curve != "linear":
        assert relative_error(bias, oracle.anchor_bias(rows, strength)) > 1e-2


def test_full_strength_turns_attention_into_its_target():
    """exp(bias) * attention is the interpolation of the ends, wherever both are above the floor."""
    rows = attention()
    wanted = target(rows, LINEAR)
    bias = kab.anchor_bias(*(jnp.asarray(x, jnp.float32) for x in (rows, wanted, np.ones((2, 7)), 1e-9)))
    share = np.linspace(0, 1, 7)[None, :, None]
    np.testing.assert_allclose(wanted, (1 - share) * rows[:, :1] + share * rows[:, -1:], rtol=1e-12)
    assert min(rows.min(), wanted.min()) > 1e-9
    assert relative_error(np.exp(np.float64(bias)) * rows, wanted) <= 1e-6


def test_below_the_floor_there_is_nothing_to_anchor():
    def bias(rows, floor):
        return kab.anchor_bias(
            *(jnp.asarray(x, jnp.float32) for x in (rows, target(rows, LINEAR), np.ones((2, 7)), floor))
        )

    assert not bias(attention(), 1).any()
    vanished = bias(attention() * ([1, 0] + [1] * 7), 5e-4)
    assert np.isfinite(vanished).all() and not vanished[..., 1].any()
