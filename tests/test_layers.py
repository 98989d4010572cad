"""Small layers against torch or float64 numpy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import relative_error

from wanjax import layers
from wanjax.precision import BFLOAT16, FLOAT32


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CONVOLUTIONS = {
    "causal": ((3, 3, 3), (1, 1, 1), ((2, 0), (1, 1), (1, 1))),
    "unpadded": ((3, 3, 3), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
    "temporal": ((3, 1, 1), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
    "temporal stride": ((3, 1, 1), (2, 1, 1), ((0, 0), (0, 0), (0, 0))),
    "spatial stride": ((1, 3, 3), (1, 2, 2), ((0, 0), (0, 1), (0, 1))),
    "all strides": ((2, 3, 4), (2, 3, 2), ((1, 2), (0, 1), (2, 0))),
}


@pytest.mark.parametrize("form", ["conv3d", "taps"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv3d_against_torch(case: str, form: str) -> None:
    size, strides, padding = CONVOLUTIONS[case]
    x, kernel = normal(2, 5, 6, 7, 3), normal(*size, 3, 4, seed=1)
    ours = layers.conv3d(x, kernel, FLOAT32, strides, padding, form)
    padded = F.pad(torch.from_numpy(x).permute(0, 4, 1, 2, 3), [n for pair in padding[::-1] for n in pair])
    theirs = F.conv3d(padded, torch.from_numpy(kernel).permute(4, 3, 0, 1, 2), stride=strides)
    assert relative_error(ours, theirs.permute(0, 2, 3, 4, 1)) <= 1e-6


@pytest.mark.parametrize("form", ["conv3d", "taps"])
def test_conv3d_bfloat16(form: str) -> None:
    x, kernel = normal(1, 4, 5, 5, 8), normal(3, 3, 3, 8, 4, seed=1)
    full = layers.conv3d(x, kernel, FLOAT32)
    half = layers.conv3d(x, kernel, BFLOAT16, form=form)
    assert half.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(half, full) <= 1e-2


@pytest.mark.parametrize(("form", "count"), [("conv3d", 1), ("taps", 3), ("auto", 1)])
def test_conv3d_uses_the_given_form(form: str, count: int) -> None:
    x, kernel = jnp.zeros((1, 3, 4, 4, 2)), jnp.zeros((3, 3, 3, 2, 2))
    jaxpr = jax.make_jaxpr(lambda x: layers.conv3d(x, kernel, FLOAT32, form=form))(x)
    assert str(jaxpr).count("conv_general_dilated[") == count


@pytest.mark.parametrize(("product", "out"), [("float32", "float32"), ("compute", "bfloat16")])
def test_products_of_half_precision_return_what_the_policy_says(product: str, out: str) -> None:
    precision = dataclasses.replace(BFLOAT16, product=product)
    jaxpr = jax.make_jaxpr(lambda x, k: layers.dot(x, k, precision))(normal(2, 8), normal(8, 4))
    (equation,) = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
    assert equation.outvars[0].aval.dtype == out and jaxpr.out_avals[0].dtype == jnp.bfloat16


def test_nothing_asks_for_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("asked for the backend"))
    jax.make_jaxpr(lambda x: layers.dot(x, normal(8, 4), BFLOAT16))(normal(2, 8))
    jax.make_jaxpr(lambda x: layers.conv3d(x, normal(3, 3, 3, 2, 2), BFLOAT16))(normal(1, 3, 4, 4, 2))


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_dot(precision: Any) -> None:
    x, kernel = normal(2, 3, 64), normal(64, 5, seed=1)
    y = layers.dot(x, kernel, precision)
    assert y.dtype == jnp.dtype(precision.compute)
    dtype = jnp.dtype(precision.compute)
    rounded = [np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, kernel)]
    wanted = rounded[0] @ rounded[1]
    # Sums are accumulated in float32: only the rounding of the result is left.
    assert relative_error(y, wanted) <= (1e-6 if precision is FLOAT32 else 3e-3)


def test_dense() -> None:
    x, kernel, bias = normal(2, 3, 6), normal(6, 4, seed=1), normal(4, seed=2)
    ours = layers.Dense(4, FLOAT32).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert relative_error(ours, x.astype(np.float64) @ kernel + bias) <= 1e-6
    ours = layers.Dense(4, FLOAT32, use_bias=False).apply({"params": {"kernel": kernel}}, x)
    assert relative_error(ours, x.astype(np.float64) @ kernel) <= 1e-6


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norms_against_torch(eps: float) -> None:
    x, scale, bias = 0.3 * normal(2, 5, 8) + 2, normal(8, seed=1), normal(8, seed=2)
    t, t_scale, t_bias = (torch.from_numpy(a) for a in (x, scale, bias))
    layer = layers.LayerNorm(eps).apply({"params": {"scale": scale, "bias": bias}}, x)
    assert relative_error(layer, F.layer_norm(t, (8,), t_scale, t_bias, eps)) <= 1e-6
    assert relative_error(layers.layer_norm(x, eps), F.layer_norm(t, (8,), eps=eps)) <= 1e-6
    rms = layers.RMSNorm(eps).apply({"params": {"scale": scale}}, x)
    assert relative_error(rms, F.rms_norm(t, (8,), t_scale, eps)) <= 1e-6
    assert relative_error(layers.rms_norm(x, eps), F.rms_norm(t, (8,), eps=eps)) <= 1e-6


@pytest.mark.parametrize("norm", [layers.layer_norm, layers.rms_norm])
def test_norms_compute_in_float32(norm: Any) -> None:
    x = jnp.asarray(normal(4, 32) + 10, jnp.bfloat16)
    y = norm(x, 1e-6)
    assert y.dtype == jnp.float32
    assert relative_error(y, norm(jnp.asarray(x, jnp.float32), 1e-6)) == 0


@pytest.mark.parametrize("module", [layers.LayerNorm, layers.RMSNorm])
def test_norm_parameters_are_float32(module: Any) -> None:
    variables = module(1e-6).init(jax.random.key(0), jnp.zeros((1, 4)))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
