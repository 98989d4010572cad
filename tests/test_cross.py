"""Cross-attention with isolation and KAB: against the float64 oracle."""

import math

import numpy as np
import oracle
import pytest
from cross_case import BOTH, SIZES, Case, attend, bias_from, bias_of, branches_of, check, control, leaves, report_of
from reference import relative_error

from wanjax.types import Branches, CrossBias


@pytest.mark.parametrize("frames", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 9, 17)), 21])
def test_change_against_float64(frames):
    case = Case(frames)
    for isolated in (False, True):
        check(case, isolated, case.strength(1.0, 0.0))
    check(case, True, case.strength(0.4, 1.3))


@BOTH
def test_two_heads_callers_bias_and_weights(isolated):
    case = Case(7, queries=5, heads=2, sizes=(11, 9, 9))
    check(case, isolated, case.strength(1.0, 0.5), case.added, weights=(0.5, 2.0, 1.25))


@BOTH
def test_curve_and_floor_are_inputs(isolated):
    case = Case(7)
    curve = np.array([0, 0.1, 0.1, 0.5, 0.6, 0.95, 1])
    check(case, isolated, case.strength(), curve=curve, floor=0.03)
    made = [bias_of(case.q, branches_of(case.k), control(case.strength(), isolated, **x)) for x in
            ({"curve": curve, "floor": 0.03}, {"curve": curve}, {"floor": 0.03})]  # fmt: skip
    assert relative_error(made[1].text, made[0].text) > 0.1
    assert relative_error(made[2].text, made[0].text) > 0.1


@BOTH
def test_callers_bias_of_some_branches(isolated):
    case = Case(7)
    check(case, isolated, case.strength(1.0, 0.5), [None, case.added[1], None])


@pytest.mark.parametrize("sizes", [(11,), (11, 6)], ids=["no image", "one image"])
def test_models_with_fewer_branches(sizes):
    """They have nothing to isolate, whatever the control says."""
    case = Case(7, sizes=sizes)
    check(case, False, case.strength(1.0, 0.5))
    outs = [attend(*case.branches, None, control(case.strength(), x, (0.5, 2, 3)[: len(sizes)])) for x in (False, True)]
    assert np.array_equal(*outs)
    assert np.array_equal(outs[0], attend(*case.branches, None, control(case.strength(), False, images=len(sizes) - 1)))


@BOTH
def test_two_frames_are_both_anchors(isolated):
    """Whatever the strength, their own attention is their target."""
    case = Case(2)
    strong = control(np.full((2, 2), 0.7, np.float32), isolated)
    for leaf in leaves(bias_of(case.q, branches_of(case.k), strong)):
        assert not leaf.any()
    exact = oracle.cross_attention(case.q, case.k, case.v, np.zeros((2, 2)), isolated)
    assert relative_error(attend(*case.branches, None, strong), exact) <= 1e-6


@BOTH
def test_ends_have_exactly_no_bias(isolated):
    """The schedule's strength is zero there; and any other strength finds attention equal to its target."""
    case = Case(7)
    for strength in (case.strength(), np.full((2, 7), 0.7, np.float32)):
        for leaf in leaves(bias_of(case.q, branches_of(case.k), control(strength, isolated))):
            assert not leaf[:, [0, -1]].any()
            assert (np.abs(leaf[:, 1:-1]).max((0, 2)) > 0.1).all()


@pytest.mark.parametrize("given", [False, True], ids=["no bias", "caller's bias"])
def test_zero_strength_is_the_unbiased_model_bit_for_bit(given):
    case = Case(7)
    bias = bias_from(case.added) if given else None
    none = np.zeros((2, 7), np.float32)
    plain = attend(*case.branches, bias)
    assert np.array_equal(attend(*case.branches, bias, control(none, False)), plain)
    assert not np.array_equal(attend(*case.branches, bias, control(case.strength(), False)), plain)
    isolated = attend(*case.branches, bias, control(none, True))
    only = [Branches(case.k[0]), Branches(case.v[0]), CrossBias(case.added[0]) if given else None]
    first, last = (
        [Branches(case.k[i]), Branches(case.v[i]), CrossBias(case.added[i]) if given else None] for i in (1, 2)
    )
    # One branch at a time, each as the only one of its model.
    sum_of_three = sum(attend(case.q, *branch) for branch in (only, first, last))
    # With a bias the branches are one product, whose sums have another order.
    assert relative_error(isolated, sum_of_three) < 1e-6 if given else np.array_equal(isolated, sum_of_three)
    assert relative_error(isolated, plain) > 0.1


def test_a_row_of_zero_strength_is_left_alone():
    case = Case(7)
    mixed, both = (attend(*case.branches, None, control(case.strength(1.0, x), True)) for x in (0.0, 0.5))
    plain = attend(*case.branches, None, control(0 * case.strength(), True))
    assert relative_error(mixed[1], plain[1]) <= 1e-6
    assert relative_error(mixed[0], both[0]) <= 1e-6
    assert relative_error(both[1], plain[1]) > 1e-2
    for leaf in leaves(bias_of(case.q, branches_of(case.k), control(case.strength(1.0, 0.0), True))):
        assert not leaf[1].any() and leaf[0].any()


@BOTH
def test_bias_serves_all_heads_and_queries(isolated):
    """Given explicitly, one number a frame and key, it has the whole effect."""
    case = Case(7)
    active = control(case.strength(1.0, 0.5), isolated)
    made = bias_of(case.q, branches_of(case.k), active)
    assert [x.shape for x in leaves(made)] == [(2, 7, n) for n in SIZES]
    explicit = attend(*case.branches, made, control(0 * case.strength(), isolated))
    out, plain = (
        attend(*case.branches, None, control(s, isolated)) for s in (case.strength(1.0, 0.5), 0 * case.strength())
    )
    assert relative_error(explicit, out) <= 1e-6
    assert relative_error(out, plain) > 1e-2


@BOTH
def test_a_constant_of_a_frame_changes_nothing(isolated):
    """Softmax knows no constant; the joint one needs the same for both keyframes."""
    case = Case(7)
    rng = np.random.default_rng(1)
    text, first, last = (rng.normal(size=(2, 7, 1)).astype(np.float32) for _ in range(3))
    shifts = (text, first, last if isolated else first)
    active = control(case.strength(), isolated)
    out = attend(*case.branches, bias_from(case.added), active)
    moved = bias_from([x + shift for x, shift in zip(case.added, shifts, strict=True)])
    assert relative_error(attend(*case.branches, moved, active), out) <= 1e-6
    if not isolated:
        uneven = bias_from([case.added[0], case.added[1] + first, case.added[2] + last])
        assert relative_error(attend(*case.branches, uneven, active), out) > 1e-2


@BOTH
def test_time_reversed_with_keyframes_swapped(isolated):
    case = Case(7)
    q = case.q.reshape(2, 7, 4, 3, 8)[:, ::-1].reshape(case.q.shape)
    active = control(case.strength(1.0, 0.5), isolated)
    plain = bias_of(case.q, branches_of(case.k), active)
    mirrored = bias_of(q, branches_of([case.k[0], case.k[2], case.k[1]]), active)
    pairs = zip(leaves(mirrored), [leaves(plain)[i] for i in (0, 2, 1)], strict=True)
    for a, b in pairs:
        assert relative_error(a[:, ::-1], b) <= 1e-5
        assert relative_error(a, b) > 0.1


@BOTH
def test_saturated_logits(isolated):
    """Each logit is 1e4, 0 or -1e4, exactly: attention is shared among ties, and all the rest is below the floor.

    float32 has steps of 1e-3 at 1e4, and the bias is added there."""
    case = Case(7)
    rng = np.random.default_rng(0)
    size = np.float32(math.sqrt(1e4 * math.sqrt(8)))
    case.q = size * rng.choice([-1, 0, 1], case.q.shape).astype(np.float32)
    case.k = [size * np.eye(8, dtype=np.float32)[rng.integers(0, 8, k.shape[:3])] for k in case.k]
    logits = np.einsum("BSND,BKND->BNSK", case.q, case.k[0]) / math.sqrt(8)
    assert np.allclose(np.unique(np.round(logits)), [-1e4, 0, 1e4])
    check(case, isolated, case.strength(1.0, 0.5), tolerance=5e-3)


@BOTH
@pytest.mark.parametrize("strong", [False, True], ids=["plain", "kab"])
def test_minus_infinity_hides_a_key(isolated, strong):
    """Even from an output that its value would wreck; every other weight is what it is without the key."""
    case = Case(7)
    strength = case.strength(1.0, 0.5) if strong else 0 * case.strength()
    bias = [np.zeros_like(x) for x in case.added]
    bias[0][..., 3] = bias[1][..., 2] = -np.inf
    out = attend(*case.branches, bias_from(bias), control(strength, isolated))
    case.v[0][:, 3] = case.v[1][:, 2] = 1e6
    assert np.isfinite(out).all()
    assert np.array_equal(attend(*case.branches, bias_from(bias), control(strength, isolated)), out)
    exact = oracle.cross_attention(case.q, case.k, case.v, strength, isolated, added=bias)
    assert relative_error(out, exact) <= 1e-5
    seen = report_of(case.q, branches_of(case.k), bias_from(bias), control(strength, isolated)).biased
    assert not seen.text[..., 3].any() and not seen.images[..., 0, 2].any()
    assert np.isfinite(seen.text).all() and seen.text[..., 4].all()


@BOTH
def test_report(isolated):
    case = Case(7, sizes=(11, 9, 9))
    strength = case.strength(1.0, 0.5)
    ours = report_of(case.q, branches_of(case.k), bias_from(case.added), control(strength, isolated))
    made = oracle.bias(case.q, case.k, strength, isolated)
    total = [a + b for a, b in zip(made, case.added, strict=True)]
    wanted = {
        "plain": oracle.looks(case.q, case.k, 7, isolated),
        "biased": oracle.looks(case.q, case.k, 7, isolated, total),
        "bias": total,
    }
    for name, branches in wanted.items():
        for a, b in zip(leaves(getattr(ours, name)), branches, strict=True):
            assert relative_error(a, b) <= 1e-5, name
    for seen in (ours.plain, ours.biased):
        text, first, last = (np.asarray(x, np.float64).sum(-1) for x in leaves(seen))
        np.testing.assert_allclose(text, 1, atol=1e-6)
        np.testing.assert_allclose(first + last, 2 if isolated else 1, atol=2e-6)
        if isolated:
            np.testing.assert_allclose(first, 1, atol=1e-6)


@pytest.mark.parametrize("sizes", [(11,), (11, 6)], ids=["no image", "one image"])
def test_report_of_models_with_fewer_branches(sizes):
    case = Case(3, sizes=sizes)
    ours = report_of(case.q, branches_of(case.k), None, control(case.strength(), True, images=len(sizes) - 1))
    made = oracle.bias(case.q, case.k, case.strength(), True)
    for a, b in zip(leaves(ours.biased), oracle.looks(case.q, case.k, 3, True, made), strict=True):
        assert relative_error(a, b) <= 1e-5


PLACES = {0: [(2, 5)], 1: [(3,)], 2: [(0, 3, 6)], 3: [(3,), (2, 5), (0, 6), (1, 2, 6)]}


@BOTH
@pytest.mark.parametrize("images", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_images_and_anchors(images, isolated):
    """The two are different numbers, and anchors also lie inside the clip."""
    case = Case(7, sizes=(11, *[6] * images))
    for at in PLACES[images]:
        strength = np.float32(np.multiply.outer((1.0, 0.5), oracle.strength(50, 40, 7, (5, 12), anchors=at)[10, 8]))
        check(case, isolated and images > 1, strength, case.added, anchors=at)


def test_weights_of_three_images():
    check(Case(7, sizes=(11, 6, 6, 6)), True, Case(7).strength(), weights=(0.5, 2.0, 1.25, 0.0))


@BOTH
def test_no_anchor(isolated):
    """Without anchors the strength is zero and nothing changes."""
    case = Case(7)
    free = control(0 * case.strength(), isolated, anchors=())
    same = control(0 * case.strength(), isolated)
    assert np.array_equal(attend(*case.branches, None, free), attend(*case.branches, None, same))
    for own in (None, bias_from(case.added)):
        assert np.isfinite(attend(*case.branches, own, free)).all()


@BOTH
@pytest.mark.parametrize("strong", [False, True], ids=["plain", "kab"])
def test_minus_infinity_hides_a_whole_image(isolated, strong):
    """It gets no share and puts nothing out; the others are what they are without it."""
    case, rest = Case(7, sizes=(11, 6, 6, 6)), Case(7, sizes=(11, 6, 6, 6))
    strength = case.strength(1.0, 0.5) if strong else 0 * case.strength()
    hidden = [None, np.zeros((2, 7, 6), np.float32), np.full((2, 7, 6), -np.inf, np.float32), np.zeros((2, 7, 6))]
    out = attend(*case.branches, bias_from(hidden), control(strength, isolated, images=3))
    assert np.isfinite(out).all()
    case.v[2][:] = 1e6
    assert np.array_equal(out, attend(*case.branches, bias_from(hidden), control(strength, isolated, images=3)))
    if not strong:
        for parts in (rest.k, rest.v):
            del parts[2]
        assert relative_error(out, oracle.cross_attention(rest.q, rest.k, rest.v, strength, isolated)) <= 1e-6
    everything = [None, *[np.full((2, 7, 6), -np.inf, np.float32)] * 3]
    text = oracle.cross_attention(rest.q, rest.k[:1], rest.v[:1], 0 * strength, True)
    plain = attend(*case.branches, bias_from(everything), control(0 * strength, isolated, images=3))
    assert relative_error(plain, text) <= 1e-6
