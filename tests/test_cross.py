"""Cross-attention with isolation and KAB: against the float64 oracle, what it costs, and on a mesh."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reference import relative_error

import wanjax.attention.xla
from wanjax import cross, kab
from wanjax.config import BFLOAT16, FLOAT32
from wanjax.layers import constrain
from wanjax.sharding import make_mesh
from wanjax.types import Branches, CrossBias, CrossControl

SIZES = (11, 6, 6)
BOTH = pytest.mark.parametrize("isolated", [False, True], ids=["joint", "isolated"])


def both(q, keys, values=None, bias=None, control=None, precision=FLOAT32, inspect=False):
    values = keys if values is None else values
    control, strength = control or (None, None)
    return cross.cross_attention(q, keys, values, bias, control, strength, precision, inspect=inspect)


@partial(jax.jit, static_argnames="precision")
def attend(q, keys, values, bias=None, control=None, precision=FLOAT32):
    return both(q, keys, values, bias, control, precision)[0]


@partial(jax.jit, static_argnames="precision")
def report_of(q, keys, bias, control, precision=FLOAT32):
    return both(q, keys, None, bias, control, precision, inspect=True)[1]


def bias_of(q, keys, control, precision=FLOAT32):
    return report_of(q, keys, None, control, precision).bias


def joined(kind, parts, axis):
    """[text, image 1, ...] as Branches or CrossBias; an image's None is zero where another has something."""
    text, *images = parts
    if all(x is None for x in images):
        return kind(text)
    shape = next(x.shape for x in images if x is not None)
    return kind(text, np.stack([np.zeros(shape, np.float32) if x is None else x for x in images], axis))


branches_of = partial(joined, Branches, axis=1)
bias_from = partial(joined, CrossBias, axis=2)


@dataclasses.dataclass
class Case:
    """Random queries, keys and values; logits have a standard deviation of 3, so that attention is peaked."""

    frames: int
    queries: int = 4
    heads: int = 3
    sizes: tuple[int, ...] = SIZES
    batch: int = 2

    def __post_init__(self):
        rng = np.random.default_rng(self.frames)

        def draw(length, std=1.0):
            return std * rng.standard_normal((self.batch, length, self.heads, 8), np.float32)

        self.q = draw(self.frames * self.queries, 2.0)
        self.k = [draw(n, 1.5) for n in self.sizes]
        self.v = [draw(n) for n in self.sizes]
        self.added = [rng.standard_normal((self.batch, self.frames, n), np.float32) for n in self.sizes]

    @property
    def branches(self):
        return self.q, branches_of(self.k), branches_of(self.v)

    @property
    def total(self):
        """Elements of all probabilities of the text branch."""
        return self.batch * self.heads * self.frames * self.queries * self.sizes[0]

    def strength(self, *rows):
        """The schedule's strength, times a number for each batch row."""
        schedule = oracle.strength(50, 40, self.frames, (5, 12))[10, 8]
        return np.float32(np.multiply.outer(rows or (1.0,) * self.batch, schedule))


def control(strength, isolated, weights=None, curve=None, floor=5e-4, anchors=None, images=2):
    """A control as wanted and its strength; anchors are the ends unless given, the curve is the following's part."""
    frames = strength.shape[-1]
    anchors = (0, frames - 1) if anchors is None else anchors
    curve = np.float32(oracle.anchor_curve(frames, anchors, curve))
    weights = np.float32(np.ones(1 + images) if weights is None else weights)
    return CrossControl(np.int32(anchors), curve, np.float32(floor), np.bool_(isolated), weights), strength


def leaves(branches):
    return [branches.text, *([] if branches.images is None else jnp.unstack(branches.images, axis=2))]


def check(case, isolated, strength, added=None, weights=None, tolerance=1e-4, **target):
    """What KAB changes of the output, and its bias, are the oracle's."""
    bias = None if added is None else bias_from(added)
    strengths, images = (strength, 0 * strength), len(case.k) - 1
    ours = [
        np.float64(attend(*case.branches, bias, control(s, isolated, weights, images=images, **target)))
        for s in strengths
    ]
    exact = [oracle.cross_attention(case.q, case.k, case.v, s, isolated, weights, added, **target) for s in strengths]
    assert relative_error(ours[1], exact[1]) <= 1e-6
    change = exact[0] - exact[1]
    assert np.linalg.norm(change) > 0.03 * np.linalg.norm(exact[1])
    assert relative_error(ours[0] - ours[1], change) <= tolerance
    made = leaves(bias_of(case.q, branches_of(case.k), control(strength, isolated, images=images, **target)))
    for a, b in zip(made, oracle.bias(case.q, case.k, strength, isolated, **target), strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("frames", [3, 7, 9, 17, 21])
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
    assert np.array_equal(isolated, sum_of_three)
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
def test_bfloat16_policy(isolated):
    case = Case(7)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), case.branches)
    full = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    outs = []
    for branches, precision in ((half, BFLOAT16), (full, FLOAT32)):
        active = control(case.strength(1.0, 0.5), isolated)
        out = attend(*branches, None, active, precision=precision)
        outs.append((out, leaves(bias_of(*branches[:2], active, precision=precision))))
    assert outs[0][0].dtype == jnp.bfloat16
    assert relative_error(outs[0][0].astype(jnp.float32), outs[1][0]) <= 2e-2
    # Only inputs of products are rounded, and these already were: the bias keeps float32's accuracy.
    for a, b in zip(outs[0][1], outs[1][1], strict=True):
        assert a.dtype == jnp.float32
        assert relative_error(a, b) <= 1e-5


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


def test_what_is_off_is_not_run(monkeypatch):
    """Calls that the compiled program really makes, counted on the host: one program for every setting."""
    counts = {"bias": 0, "attention": 0, "logits": 0}

    def counting(name, function):
        def add():
            counts[name] += 1

        def call(*args, **kwargs):
            jax.debug.callback(add)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(kab, "anchor_bias", counting("bias", kab.anchor_bias))
    monkeypatch.setattr(cross, "attention", counting("attention", cross.attention))
    monkeypatch.setattr(cross.xla, "logits", counting("logits", cross.xla.logits))
    run = jax.jit(lambda *args: both(*args)[0])
    case = Case(3)
    single = np.zeros((2, 3), np.float32)
    single[1, 1] = 0.3
    wanted = [
        (0 * single, False, 0, 3, 3),
        (0 * single, True, 0, 3, 3),
        # Three branches, a frame at a time: the two anchors, then all three frames; logits once for plain and biased.
        (single, False, 3 * 5, 0, 3 * 5),
        (single, True, 3 * 5, 0, 3 * 5),
    ]
    for strength, isolated, biases, attentions, logits in wanted:
        counts.update(bias=0, attention=0, logits=0)
        run(*case.branches, None, control(strength, isolated)).block_until_ready()
        jax.effects_barrier()
        assert counts == {"bias": biases, "attention": attentions, "logits": logits}
    assert run._cache_size() == 1


def largest(function, *args):
    """Elements of the largest array that a program makes, sub-programs included."""

    def of(jaxpr):
        sizes = [0]
        for equation in jaxpr.eqns:
            sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
            for parameter in equation.params.values():
                for sub in parameter if isinstance(parameter, (tuple, list)) else [parameter]:
                    inner = getattr(sub, "jaxpr", sub)
                    if hasattr(inner, "eqns"):
                        sizes.append(of(inner))
        return max(sizes)

    return of(jax.make_jaxpr(function)(*args).jaxpr)


def test_probabilities_of_all_frames_never_exist(monkeypatch):
    case = Case(21, queries=8, heads=4, sizes=(40, 20, 20), batch=1)
    q, keys, values = case.branches
    active = control(case.strength(), False)
    per_frame = case.total // 21
    rows = case.q.size
    assert per_frame < rows < case.total // 3
    assert largest(both, q, keys, values) >= case.total, "the walk sees all logits"
    # A caller's bias, and KAB's: the largest array is the output itself.
    assert largest(both, q, keys, values, bias_from(case.added)) == rows
    assert largest(partial(both, inspect=True), q, keys, values, None, active) == rows
    # With attention in blocks of about a frame the whole program, cond's branches and all, stays small.
    monkeypatch.setattr(wanjax.attention.xla, "CHUNK_BYTES", 4 * per_frame)
    assert largest(both, q, keys, values, None, active) < case.total // 3


PLACES = {0: [(2, 5)], 1: [(3,)], 2: [(0, 3, 6)], 3: [(3,), (2, 5), (0, 6), (1, 2, 6)]}


@BOTH
@pytest.mark.parametrize("images", PLACES)
def test_any_number_of_images_and_anchors(images, isolated):
    """The two are different numbers, and anchors also lie inside the clip."""
    case = Case(7, sizes=(11, *[6] * images))
    for at in PLACES[images]:
        strength = np.float32(np.multiply.outer((1.0, 0.5), oracle.strength(50, 40, 7, (5, 12), anchors=at)[10, 8]))
        check(case, isolated and images > 1, strength, case.added, anchors=at)


def test_anchors_and_curves_are_traced():
    case, outs, programs = Case(7), [], []
    for at in ((2, 5), (0, 6)):
        outs.append(attend(*case.branches, None, control(case.strength(), True, anchors=at)))
        programs.append(attend._cache_size())
    assert programs[0] == programs[1] and relative_error(*outs) > 1e-3


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


def test_one_conditional():
    """The window of KAB; all else that a control decides is arithmetic."""
    case = Case(7)
    text = str(jax.make_jaxpr(both)(*case.branches, None, control(case.strength(), True)))
    assert text.count(" cond[") == 1


def test_gradients():
    """Of the log-sum-exp form, against finite differences of itself in one direction."""
    case, rng = Case(3), np.random.default_rng(0)
    way = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), case.branches)

    @jax.jit
    def loss(step, active):
        return jnp.sin(attend(*jax.tree.map(lambda x, d: x + step * d, case.branches, way), None, active)).sum()

    slope = jax.jit(jax.grad(loss))
    for isolated in (False, True):
        active = control(case.strength(1.0, 0.5), isolated)
        ahead, behind = (loss(step, active) for step in (3e-3, -3e-3))
        assert abs((ahead - behind) / 6e-3 / slope(0.0, active) - 1) < 1e-2


MESHES = [({"sequence": 8}, 4, False), ({"sequence": 8}, 8, True), ({"sequence": 8}, 12, False),
          ({"sequence": 4, "tensor": 2}, 4, True), ({"tensor": 8}, 4, True)]  # fmt: skip


@pytest.mark.parametrize("sizes, queries, placed", MESHES, ids=str)
def test_sharded(sizes, queries, placed):
    """Devices' shares of the queries end within frames; 21 * 4 and 21 * 12 do not even divide by 8."""
    case = Case(21, queries=queries, heads=8)
    q, keys, values = case.branches
    mesh = make_mesh(sizes)
    strength = case.strength(1.0, 0.5)
    plain = {
        isolated: [np.float64(attend(q, keys, values, None, control(s, isolated))) for s in (strength, 0 * strength)]
        for isolated in (False, True)
    }

    @jax.jit
    def run(q, keys, values, control):
        return both(constrain(q, None, "sequence", "tensor", None), keys, values, None, control)[0]

    with jax.set_mesh(mesh):
        if placed:
            q = jax.device_put(q, NamedSharding(mesh, P(None, "sequence", "tensor")))
        for isolated, (wanted, unbiased) in plain.items():
            outs = [run(q, keys, values, control(s, isolated)) for s in (strength, 0 * strength)]
            assert relative_error(np.float64(outs[0]) - np.float64(outs[1]), wanted - unbiased) <= 1e-5
    assert len(outs[0].sharding.device_set) == 8
    assert outs[0].sharding.is_fully_replicated != placed, "uneven outputs are gathered by jit"
