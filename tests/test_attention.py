"""Every attention implementation against a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error

import wanjax.attention
from wanjax.attention import attention
from wanjax.config import BFLOAT16, Precision

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
def implementation(request, monkeypatch):
    """Name to pass on; the chunked one with the limit that makes so many chunks."""
    if request.param == "xla":
        return "xla"
    chunks = {"one chunk": 1, "five chunks": 5, "more chunks than queries": 2 * S}[request.param]
    monkeypatch.setattr(wanjax.attention, "CHUNK_BYTES", -(-4 * B * S * N * K // chunks))
    return "chunked"


@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_against_float64(implementation, shape):
    q, k, v = arrays()
    bias = None if shape is None else 3 * jax.random.normal(jax.random.key(1), shape)
    out = jax.jit(lambda *x: attention(*x, implementation=implementation))(q, k, v, bias)
    assert out.shape == (B, S, N, D) and out.dtype == jnp.float32
    assert relative_error(out, oracle(q, k, v, bias)) <= 1e-6
    if bias is not None:
        assert relative_error(out, oracle(q, k, v)) > 0.1


def test_scale(implementation):
    q, k, v = arrays()
    out = attention(q, k, v, scale=1.0, implementation=implementation)
    assert relative_error(out, oracle(q, k, v, scale=1.0)) <= 1e-6
    assert relative_error(out, oracle(q, k, v)) > 0.1


def test_saturated_logits_are_finite(implementation):
    q, k, v = arrays()
    out = jax.jit(lambda *x: attention(*x, implementation=implementation))(1e4 * q, 1e4 * k, v)
    # Logits around 1e8: all weight is on the largest, so every output is one of the values.
    best = np.argmax(np.einsum("BSND,BKND->BSNK", q, k), -1)
    wanted = np.take_along_axis(np.asarray(v), best[..., None], 1)
    assert relative_error(out, wanted) <= 1e-6


def test_masked_keys_have_no_weight(implementation):
    q, k, v = arrays()
    lowest = float(jnp.finfo(jnp.float32).min)
    bias = jnp.zeros((B, 1, 1, K)).at[0, ..., 4:].set(lowest).at[1].set(lowest)
    out = attention(q, k, v.at[0, 4:].set(1e6), bias, implementation=implementation)
    assert relative_error(out[0], oracle(q[:1], k[:1, :4], v[:1, :4])[0]) <= 1e-6
    # Where every key is masked, the weights are equal rather than NaN.
    assert relative_error(out[1], np.broadcast_to(v[1].mean(0), (S, N, D))) <= 1e-6


def test_bfloat16_policy(implementation):
    q, k, v = arrays(dtype=jnp.bfloat16)
    bias = 3 * jax.random.normal(jax.random.key(1), (B, N, S, K))
    out = attention(q, k, v, bias, precision=BFLOAT16, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out.astype(jnp.float32), oracle(q, k, v, bias)) <= 1e-2
    rough = Precision(compute="bfloat16", softmax="bfloat16")
    worse = attention(q, k, v, bias, precision=rough, implementation=implementation)
    exact = oracle(q, k, v, bias)
    assert relative_error(worse.astype(jnp.float32), exact) > relative_error(out.astype(jnp.float32), exact)


def test_float32_inputs_under_the_bfloat16_policy():
    q, k, v = arrays()
    half = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), precision=BFLOAT16)
    np.testing.assert_array_equal(attention(q, k, v, precision=BFLOAT16), half)


def test_gradients_agree_between_implementations(monkeypatch):
    monkeypatch.setattr(wanjax.attention, "CHUNK_BYTES", 4 * B * N * K * 3)
    q, k, v = arrays()
    bias = jax.random.normal(jax.random.key(1), (B, 1, 1, K))

    def loss(implementation):
        return lambda *x: jnp.sin(attention(*x, implementation=implementation)).sum()

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
    monkeypatch.setattr(wanjax.attention, "CHUNK_BYTES", 4 * 4 * 256 * 256 // 16)
    assert temporary_bytes() < whole / 4


def test_unknown_implementation():
    with pytest.raises(ValueError, match="unknown attention implementation 'flash': choose auto, xla"):
        attention(*arrays(), implementation="flash")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN attention needs an NVIDIA GPU")
def test_cudnn_agrees():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 256, 4, 64)), jnp.bfloat16) for _ in range(3))
    out = attention(q, k, v, precision=BFLOAT16, implementation="cudnn")
    assert relative_error(out.astype(jnp.float32), oracle(q, k, v)) <= 1e-2
