"""Cross-attention as a program: what is run and kept in memory, one program for all values, half precision, a mesh."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cross_case import BOTH, Case, attend, bias_from, bias_of, both, control, leaves
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reference import relative_error

import wanjax.attention.xla
from wanjax import cross, kab
from wanjax.layers import constrain
from wanjax.precision import BFLOAT16, FLOAT32
from wanjax.sharding import make_mesh


@BOTH
def test_logits_are_kept_in_half_precision_where_products_return_it(isolated):
    """As on accelerators: no product gives float32 logits, and the numbers are float32's to bfloat16's rounding."""
    case, found = Case(7), []
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), case.branches)
    active = control(case.strength(1.0, 0.5), isolated)
    for precision in (dataclasses.replace(BFLOAT16, product="compute"), BFLOAT16):
        out = attend(*half, None, active, precision=precision)
        found.append((out.astype(jnp.float32), *leaves(bias_of(*half[:2], active, precision=precision))))
        text = str(jax.make_jaxpr(lambda *x, p=precision: both(*x, None, active, p)[0])(*half))
        wide = re.findall(r":f32\[2,3,4,\d+\] = dot_general", text)
        assert bool(wide) == (precision.product != "compute")
    for one, other in zip(*found, strict=True):
        assert 0 < relative_error(one, other) <= 2e-2


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


def test_anchors_and_curves_are_traced():
    case, outs, programs = Case(7), [], []
    for at in ((2, 5), (0, 6)):
        outs.append(attend(*case.branches, None, control(case.strength(), True, anchors=at)))
        programs.append(attend._cache_size())
    assert programs[0] == programs[1] and relative_error(*outs) > 1e-3


def test_one_conditional():
    """The window of KAB; all else that a control decides is arithmetic."""
    case = Case(7)
    text = str(jax.make_jaxpr(both)(*case.branches, None, control(case.strength(), True)))
    assert text.count(" cond[") == 1


@pytest.mark.slow
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
