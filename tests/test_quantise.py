"""8-bit kernels against qwix and a float64 oracle: nearest codes, a factor a channel, nothing that is not finite."""

import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix
from eight import DTYPES, LARGEST, codes
from reference import relative_error

from wanjax.layers import Dense, dot
from wanjax.precision import Precision
from wanjax.quantise import quantise

WEIGHTS = sorted(DTYPES)


def kernel(*shape, seed=0):
    """Channels of very different sizes, with outliers."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_t(4, shape) * rng.lognormal(sigma=3, size=(*shape[:-2], 1, shape[-1]))
    return numbers.astype(np.float32)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", [(96, 40), (1, 7), (200, 1)], ids=str)
def test_as_qwix(weights, shape):
    """Its int8 reaches to 127.5, ours to 127, the same on both sides; its float8 is ours."""
    matrix = kernel(*shape)
    theirs = qwix.quantize(jnp.asarray(matrix), DTYPES[weights], channelwise_axes=(1,))
    own, factor = quantise(matrix, DTYPES[weights])
    assert own.dtype == theirs.qvalue.dtype and factor.shape == theirs.scale.shape and factor.dtype == np.float32
    ratio = 127 / 127.5 if weights == "int8" else 1.0
    np.testing.assert_allclose(np.asarray(theirs.scale) / factor, ratio, rtol=3e-7)
    if weights == "fp8":
        np.testing.assert_array_equal(np.asarray(theirs.qvalue).astype(np.float32), own.astype(np.float32))
    error = np.abs(own.astype(np.float64) * factor - matrix)
    wanted = np.abs(np.asarray(qwix.dequantize(theirs), np.float64) - matrix)
    assert error.sum() <= 1.01 * wanted.sum() + 1e-6 * np.abs(matrix).sum()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", [(64, 24), (3, 64, 24), (2, 2, 8, 5)], ids=str)
def test_the_nearest_codes_of_every_layer(weights, dtype, shape):
    stack = np.clip(kernel(*shape), -6e4, 6e4).astype(dtype)
    own, factors = quantise(stack, DTYPES[weights])
    assert own.shape == shape and factors.shape == (*shape[:-2], 1, shape[-1])
    table = np.arange(256).astype(np.uint8).view(DTYPES[weights]).astype(np.float64)
    table = table[np.isfinite(table) & (np.abs(table) <= LARGEST[weights])]
    for index in np.ndindex(shape[:-2]):
        wanted, factor = codes(stack[index], weights)
        np.testing.assert_array_equal(own[index].astype(np.float64), wanted)
        np.testing.assert_array_equal(factors[index], factor)
        exact = stack[index].astype(np.float64) / factor
        nearest = np.abs(exact[..., None] - table).min(-1)
        assert np.all(np.abs(exact - own[index].astype(np.float64)) <= nearest * (1 + 1e-5) + 1e-6 * np.abs(exact))
        assert np.all(np.abs(own[index].astype(np.float64)).max(0) == LARGEST[weights])
    again, same = quantise(own.astype(np.float32) * factors, DTYPES[weights])
    np.testing.assert_array_equal(again.view(np.uint8) & 0x7F, own.view(np.uint8) & 0x7F)
    np.testing.assert_allclose(same, factors, rtol=3e-7)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_channels_at_the_edges(weights):
    """Zeros, denormals, the largest and the smallest numbers; transposed and read-only memory."""
    matrix = np.zeros((6, 6), np.float32)
    matrix[2] = [0, 1e-44, 3.4e38, -1.2e-38, -0.0, 1]
    view = np.asfortranarray(matrix)
    view.setflags(write=False)
    own, factor = quantise(view, DTYPES[weights])
    assert np.isfinite(factor).all() and (factor > 0).all() and own.flags.c_contiguous
    made = own.astype(np.float64) * factor
    assert not made[:, [0, 4]].any() and not np.delete(made, 2, 0).any()
    np.testing.assert_allclose(made[2, [2, 5]], matrix[2, [2, 5]], rtol=1e-6)
    assert abs(made[2, 1]) <= 1e-44 and abs(made[2, 3]) <= 1.3e-38  # below what float32 factors reach: towards zero


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, -1e300])
@pytest.mark.parametrize("layer", [0, 2])
def test_what_is_not_finite_is_refused(weights, value, layer):
    stack = np.ones((3, 4, 5))
    stack[layer, 1, 2] = value
    with pytest.raises(ValueError, match="NaN or inf in a kernel.*get it again"):
        quantise(stack if abs(value) == 1e300 else stack.astype(np.float32), DTYPES[weights])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_one_matrix_at_a_time(weights):
    """Of a stack in bfloat16 no more than a few matrices exist in float32 beside the codes."""
    stack = np.ones((16, 128, 256), ml_dtypes.bfloat16)
    matrix = 4 * 128 * 256
    tracemalloc.start()
    try:
        own, factors = quantise(stack, DTYPES[weights])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= own.nbytes + factors.nbytes + 3 * matrix < stack.size * 4


POLICIES = {
    "float32": (Precision(), 1e-6),
    "bfloat16": (Precision(param="bfloat16", compute="bfloat16"), 4e-3),
    "bfloat16 products": (Precision(param="bfloat16", compute="bfloat16", product="compute"), 6e-3),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_dense_is_the_product_of_codes_and_factors(weights, policy):
    """Against float64; the factor is not rounded to the compute dtype, and biases stay as they are."""
    precision, limit = POLICIES[policy]
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 48)).astype(precision.compute).astype(np.float32)
    own, factor = quantise(kernel(48, 20), DTYPES[weights])
    bias = rng.normal(size=20).astype(precision.param)
    layer = Dense(20, Precision(precision.param, precision.compute, product=precision.product,
                                kernel=DTYPES[weights].name))  # fmt: skip
    made = layer.apply({"params": {"kernel": own, "factor": factor, "bias": bias}}, x)
    assert made.dtype == precision.compute
    wanted = x.astype(np.float64) @ own.astype(np.float64) * factor + bias.astype(np.float64)
    assert relative_error(np.asarray(made, np.float32), wanted) <= limit
    channels = np.linalg.norm(np.asarray(made, np.float64) - wanted, axis=(0, 1)) / np.linalg.norm(wanted, axis=(0, 1))
    assert channels.max() <= 3 * limit, "small channels are as exact as large ones"
    plain = dot(x, own, precision, factor)
    np.testing.assert_array_equal(np.asarray(plain + bias.astype(plain.dtype)), np.asarray(made))
