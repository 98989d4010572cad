"""Every attention kernel against a float64 oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from reference import relative_error

from wanjax.attention import KERNELS, attention, cudnn, parallel, splash, xla
from wanjax.config import preset
from wanjax.precision import BFLOAT16, FLOAT32, Precision
from wanjax.sharding import make_mesh

B, S, K, N, D = 2, 13, 7, 3, 8
BIASES = [None, (1, 1, 1, K), (B, 1, 1, K), (1, N, S, K), (B, 1, S, K), (B, N, S, K), (B, N, 1, K), (S, K)]


def oracle(q, k, v, bias=None, scale=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("BSND,BKND->BNSK", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("BNSK,BKND->BSND", weights / weights.sum(-1, keepdims=True), v)


def arrays(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, length, N, D), np.float32) for length in (S, K, K))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


@pytest.fixture(params=["xla", "one chunk", "five chunks", "more chunks than queries"])
def kernel(request, monkeypatch):
    """Name to pass on; the chunked one with the limit that makes so many chunks."""
    if request.param == "xla":
        return "xla"
    chunks = {"one chunk": 1, "five chunks": 5, "more chunks than queries": 2 * S}[request.param]
    monkeypatch.setattr(xla, "CHUNK_BYTES", -(-4 * B * S * N * K // chunks))
    return "chunked"


@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_against_float64(kernel, shape):
    q, k, v = arrays()
    bias = None if shape is None else 3 * jax.random.normal(jax.random.key(1), shape)
    out = jax.jit(lambda *x: attention(*x, kernel=kernel))(q, k, v, bias)
    assert out.shape == (B, S, N, D) and out.dtype == jnp.float32
    assert relative_error(out, oracle(q, k, v, bias)) <= 1e-6
    if bias is not None:
        assert relative_error(out, oracle(q, k, v)) > 0.1


def test_scale(kernel):
    q, k, v = arrays()
    out = attention(q, k, v, scale=1.0, kernel=kernel)
    assert relative_error(out, oracle(q, k, v, scale=1.0)) <= 1e-6
    assert relative_error(out, oracle(q, k, v)) > 0.1


def test_saturated_logits_are_finite(kernel):
    q, k, v = arrays()
    out = jax.jit(lambda *x: attention(*x, kernel=kernel))(1e4 * q, 1e4 * k, v)
    # Logits around 1e8: all weight is on the largest, so every output is one of the values.
    best = np.argmax(np.einsum("BSND,BKND->BSNK", q, k), -1)
    wanted = np.take_along_axis(np.asarray(v), best[..., None], 1)
    assert relative_error(out, wanted) <= 1e-6


def test_masked_keys_have_no_weight(kernel):
    q, k, v = arrays()
    lowest = float(jnp.finfo(jnp.float32).min)
    bias = jnp.zeros((B, 1, 1, K)).at[0, ..., 4:].set(lowest).at[1].set(lowest)
    out = attention(q, k, v.at[0, 4:].set(1e6), bias, kernel=kernel)
    assert relative_error(out[0], oracle(q[:1], k[:1, :4], v[:1, :4])[0]) <= 1e-6
    # Where every key is masked, the weights are equal rather than NaN.
    assert relative_error(out[1], np.broadcast_to(v[1].mean(0), (S, N, D))) <= 1e-6


def test_bfloat16_policy(kernel):
    q, k, v = arrays(dtype=jnp.bfloat16)
    bias = 3 * jax.random.normal(jax.random.key(1), (B, N, S, K))
    out = attention(q, k, v, bias, precision=BFLOAT16, kernel=kernel)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out.astype(jnp.float32), oracle(q, k, v, bias)) <= 1e-2
    rough = Precision(compute="bfloat16", softmax="bfloat16")
    worse = attention(q, k, v, bias, precision=rough, kernel=kernel)
    exact = oracle(q, k, v, bias)
    assert relative_error(worse.astype(jnp.float32), exact) > relative_error(out.astype(jnp.float32), exact)


def test_float32_inputs_under_the_bfloat16_policy():
    q, k, v = arrays()
    half = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), precision=BFLOAT16)
    np.testing.assert_array_equal(attention(q, k, v, precision=BFLOAT16), half)


def test_gradients_agree_between_kernels(monkeypatch):
    monkeypatch.setattr(xla, "CHUNK_BYTES", 4 * B * N * K * 3)
    q, k, v = arrays()
    bias = jax.random.normal(jax.random.key(1), (B, 1, 1, K))

    def loss(kernel):
        return lambda *x: jnp.sin(attention(*x, kernel=kernel)).sum()

    plain = jax.grad(loss("xla"), (0, 1, 2, 3))(q, k, v, bias)
    chunked = jax.grad(loss("chunked"), (0, 1, 2, 3))(q, k, v, bias)
    for a, b in zip(chunked, plain, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_auto_bounds_memory(monkeypatch):
    """Large logits go chunk by chunk: the compiled program's temporary memory shrinks."""
    q, k, v = (jnp.zeros((1, 256, 4, 8)) for _ in range(3))

    def temporary_bytes():
        compiled = jax.jit(lambda *x: attention(*x)).lower(q, k, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = temporary_bytes()
    monkeypatch.setattr(xla, "CHUNK_BYTES", 4 * 4 * 256 * 256 // 16)
    assert temporary_bytes() < whole / 4


def test_unknown_kernel():
    with pytest.raises(ValueError, match="unknown attention kernel 'flash': choose one of auto, xla"):
        attention(*arrays(), kernel="flash")


def residual_oracle(q, k, bias=None):
    """log-sum-exp and maximum [B, S, N] of the logits."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    logits = np.einsum("BSND,BKND->BSNK", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + np.moveaxis(np.asarray(bias, np.float64), 1, 2)
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(-1)), top


@pytest.mark.parametrize("shape", [None, (B, N, S, K)], ids=str)
def test_residual(kernel, shape):
    """(max, log sum) of every softmax; two halves of the keys put together by it are the whole."""
    q, k, v = arrays()
    bias = None if shape is None else 3 * jax.random.normal(jax.random.key(1), shape)
    # At LLVM's zeroth level, which tests run at, two programs need not round alike.
    jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    out, (top, log_sum) = jit(lambda *x: attention(*x, kernel=kernel, residual=True))(q, k, v, bias)
    assert top.shape == log_sum.shape == (B, S, N) and top.dtype == log_sum.dtype == jnp.float32
    wanted, largest = residual_oracle(q, k, bias)
    assert relative_error(top, largest) <= 1e-6 and relative_error(top + log_sum, wanted) <= 1e-6
    np.testing.assert_array_equal(out, jit(lambda *x: attention(*x, kernel=kernel))(q, k, v, bias))

    def half(part):
        some = None if bias is None else bias[..., part]
        return attention(q, k[:, part], v[:, part], some, kernel=kernel, residual=True)

    halves = [half(slice(0, 3)), half(slice(3, K))]
    masses = [np.exp(np.float64(m + s) - wanted)[..., None] for _, (m, s) in halves]
    assert relative_error(sum(mass * np.float64(x) for mass, (x, _) in zip(masses, halves, strict=True)), out) <= 1e-5


def test_hidden_whole(kernel):
    """Where -inf hides every key the output is zero and the softmax has no mass."""
    q, k, v = arrays()
    bias = jnp.zeros((B, 1, 1, K)).at[1].set(-jnp.inf)
    out, (top, log_sum) = attention(q, k, v, bias, kernel=kernel, residual=True)
    assert relative_error(out[0], oracle(q[:1], k[:1], v[:1])[0]) <= 1e-6
    assert not out[1].any() and (top[1] == -jnp.inf).all() and not log_sum[1].any()


def test_gradient_of_the_residual(kernel):
    """That of the log-sum-exp is the probability times the key."""
    q, k, v = arrays()
    slope = jax.grad(lambda q: sum(attention(q, k, v, kernel=kernel, residual=True)[1]).sum())(q)
    assert relative_error(slope, oracle(q, k, k) * D**-0.5) <= 1e-5


def test_auto_is_the_portable_kernel():
    np.testing.assert_array_equal(attention(*arrays(), kernel="auto"), attention(*arrays(), kernel="xla"))
    assert {"xla", "chunked", "cudnn", "splash"} <= set(KERNELS)


CASES = {
    "float32": ({"precision": FLOAT32}, 64, {}, False),
    "bfloat16": ({}, 64, {}, True),
    "a bias": ({"bias": jnp.zeros((1, 1, 1, 16))}, 64, {}, False),
    "head width 128": ({}, 128, {}, True),
    "wide heads": ({}, 136, {}, False),
    "odd heads": ({}, 12, {}, False),
    "tensor parallel": ({}, 64, {"tensor": 8}, True),
    "padded": ({"valid": np.arange(16) != 3}, 64, {}, True),
}


@pytest.mark.parametrize("options, width, mesh, fused", CASES.values(), ids=list(CASES))
def test_cudnn_leaves_what_it_cannot_do_to_xla(monkeypatch, options, width, mesh, fused):
    asked = []

    def recorded(q, k, v, **kwargs):
        asked.append(kwargs["implementation"])
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    q = k = jnp.ones((1, 16, 8, width))
    with jax.set_mesh(make_mesh(mesh or {"data": 1}, None if mesh else jax.devices()[:1])):
        out = attention(q, k, k, kernel="cudnn", **({"precision": BFLOAT16} | options))
    assert asked == ["cudnn"] * fused and out.shape == q.shape


@pytest.mark.parametrize("queries, keys, width, holes, kernel", [
    (300, 257, 128, False, "splash"), (130, 200, 64, True, "splash"),
    pytest.param(1100, 1030, 128, True, "splash", marks=pytest.mark.slow),
    (1100, 1300, 64, True, "splash-v6e"),
])  # fmt: skip
def test_splash(queries, keys, width, holes, kernel):
    """In Pallas' interpreter: lengths that its blocks do not divide, several blocks, two clips, both head widths, keys
    that do not count; the log-sum-exp in float32."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, width)), jnp.float32) for n in (queries, keys, keys))
    q, scale = parallel.scaled(q, "bfloat16")
    k, v = (x.astype(jnp.bfloat16) for x in (k, v))
    valid = rng.random(keys) < 0.7 if holes else None
    fixed = {"scale": scale, "valid": valid}
    with pltpu.force_tpu_interpret_mode():
        out, (top, log_sum) = attention(q, k, v, precision=BFLOAT16, kernel=kernel, residual=True, **fixed)
        alone = attention(q, k, v, precision=BFLOAT16, kernel=kernel, **fixed)
    assert out.shape == q.shape and out.dtype == jnp.bfloat16
    # Of the same numbers in float32: rounding what comes out to bfloat16 is 1.7e-3 of the difference.
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    same, (same_top, same_sum) = attention(*exact, kernel="xla", residual=True, **fixed)
    assert relative_error(out, same) <= 2e-3 and relative_error(alone, same) <= 2e-3
    assert relative_error(top + log_sum, same_top + same_sum) <= 1e-4


@pytest.mark.parametrize(
    "length, wanted", [(34816, 1024), (75776, 1024), (4352, 896), (512, 512), (257, 384), (1, 128)]
)
def test_splash_blocks(length, wanted):
    assert splash.block(length) == wanted


def test_splash_blocks_by_generation():
    """The device's kind chooses the kernel, its table the blocks; both sizes of video are whole blocks of each."""
    config = preset("flf2v_14b")
    kinds = {"TPU v5 lite": "splash-v5e", "TPU v5": "splash-v5p", "TPU v6 lite": "splash-v6e", "TPU7x": "splash-tpu7x",
             "TPU v9": "splash", "": "splash"}  # fmt: skip
    assert {kind: config.for_platform("tpu", kind).dit.attention for kind in kinds} == kinds
    assert config.for_platform("gpu", "TPU v6 lite").dit.attention == "cudnn"
    for kernel in kinds.values():
        assert kernel in KERNELS
        unit, blocks = splash.unit(kernel), splash.BLOCKS.get(kernel[7:], splash.Blocks(1024, 1024, 512))
        assert unit == max(blocks.queries, blocks.keys) and blocks.keys % blocks.compute == 0
        for tokens, padded in ((1620, 34816), (3600, 75776)):
            assert parallel.layout(21, tokens, kernel).local == padded
            assert padded % splash.block(padded, blocks.queries) == padded % splash.block(padded, blocks.keys) == 0
    assert splash.unit("xla") == splash.unit("cudnn") == 1


def test_keys_that_do_not_count(kernel):
    q, k, v = arrays()
    valid = np.arange(K) % 3 != 1
    wanted = attention(q, k[:, valid], v[:, valid], kernel=kernel)
    assert relative_error(attention(q, k, v, valid=valid, kernel=kernel), wanted) <= 1e-6


def test_cudnn_residual_is_not_differentiated():
    with pytest.raises(ValueError, match='^attention kernel "cudnn" has no gradient'):
        jax.grad(cudnn._without_gradient)(1.0)


def test_nothing_asks_for_the_backend(monkeypatch):
    """Tracing decides nothing by what it happens to run on."""
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("asked for the backend"))
    for name in KERNELS:
        jax.make_jaxpr(lambda *x, name=name: attention(*x, kernel=name))(*arrays())


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN attention needs an NVIDIA GPU")
def test_cudnn_agrees():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 256, 4, 64)), jnp.bfloat16) for _ in range(3))
    out = attention(q, k, v, precision=BFLOAT16, kernel="cudnn")
    assert relative_error(out.astype(jnp.float32), oracle(q, k, v)) <= 1e-2
    same, (top, log_sum) = attention(q, k, v, precision=BFLOAT16, kernel="cudnn", residual=True)
    assert relative_error(same.astype(jnp.float32), oracle(q, k, v)) <= 1e-2
    assert top.dtype == log_sum.dtype == jnp.float32
    # Half precision would be off by 2e-3.
    assert relative_error(top + log_sum, residual_oracle(q, k)[0]) <= 1e-4
