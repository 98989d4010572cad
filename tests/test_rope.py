"""Rotary table and its application against diffusers and against a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from reference import relative_error

from wanjax import rope

GRIDS = [(1, 2, 1), (7, 4, 4), (3, 5, 2), (21, 3, 7)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("head_dim", [48, 128])
def test_table_is_the_references(grid, head_dim):
    reference = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
    frames, height, width = grid
    cos, sin = reference(torch.zeros(1, 16, frames, 2 * height, 2 * width))
    table = rope.table(grid, head_dim)
    assert relative_error(table.cos, cos[0, :, 0, ::2]) < 1e-6
    assert relative_error(table.sin, sin[0, :, 0, 1::2]) < 1e-6


def test_apply_is_a_complex_product():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7 * 4 * 4, 3, 48))
    table = rope.table((7, 4, 4), 48)
    factor = (np.float64(table.cos) + 1j * np.float64(table.sin))[None, :, None]
    product = (x[..., ::2] + 1j * x[..., 1::2]) * factor
    expected = np.stack([product.real, product.imag], -1).reshape(x.shape)
    assert relative_error(rope.apply(jnp.asarray(x, jnp.float32), table), expected) < 1e-6


def test_logits_depend_on_relative_position_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 48)), jnp.float32) for _ in range(2))
    table = rope.table((9, 1, 1), 48)
    turned = [rope.apply(jnp.tile(a, (1, 9, 1, 1)), table)[0, :, 0] for a in (q, k)]
    logits = np.asarray(turned[0] @ turned[1].T, np.float64)
    for offset in (1, 3):
        diagonal = np.diagonal(logits, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-4)
    assert np.ptp(logits[0]) > 0.1


def test_scale_of_ones_changes_nothing():
    plain, scaled = rope.table((7, 3, 2), 48), rope.table((7, 3, 2), 48, temporal_scale=np.ones(7))
    assert np.array_equal(plain.cos, scaled.cos)
    assert np.array_equal(plain.sin, scaled.sin)


def test_scale_turns_temporal_pairs_only():
    grid, scale = (5, 3, 2), np.array([1.06, 1.0, 0.94, 1.0, 1.06])
    plain, scaled = rope.table(grid, 48), rope.table(grid, 48, temporal_scale=scale)
    pairs = rope.axis_pairs(48)[0]
    omega = 10000.0 ** (-np.arange(pairs) / pairs)
    angle = np.repeat(np.outer(scale * np.arange(5), omega), 6, axis=0)
    assert relative_error(scaled.cos[:, :pairs], np.cos(angle)) < 1e-6
    assert relative_error(scaled.sin[:, :pairs], np.sin(angle)) < 1e-6
    assert np.array_equal(plain.cos[:, pairs:], scaled.cos[:, pairs:])
    assert np.array_equal(plain.sin[:, pairs:], scaled.sin[:, pairs:])


@pytest.mark.parametrize("scale", [np.ones(4), np.full(5, np.nan), np.array([1, 1, 0, 1, 1.0])])
def test_bad_scale_is_refused(scale):
    with pytest.raises(ValueError, match="temporal_scale"):
        rope.table((5, 1, 1), 48, temporal_scale=scale)


@pytest.mark.parametrize("mode", rope.MODES)
def test_a_product_rotates_as_pairs_do(mode):
    """Exactly in float32, and in half precision of what has been rounded to it."""
    x = np.random.default_rng(0).standard_normal((2, 12, 3, 16)).astype(np.float32)
    table = rope.table((3, 2, 2), 16, np.array([1.1, 0.9, 1.0]), mode)
    pairs = rope.apply(jnp.asarray(x), table)
    assert relative_error(rope.apply(jnp.asarray(x), table, "product"), pairs) <= 1e-7
    half = jnp.asarray(x, jnp.bfloat16)
    wanted = rope.apply(half, table)
    assert relative_error(rope.apply(half, table, "product", "bfloat16"), wanted) <= 1e-7
    rounded = jax.jit(lambda x: rope.apply(x, table, "pairs", "bfloat16"))(jnp.asarray(x, jnp.float32))
    assert np.array_equal(rounded, wanted)  # compiled as well, the rounding is done


def test_unknown_rotation():
    with pytest.raises(ValueError, match="rotation 'halves': choose auto, pairs, product"):
        rope.apply(jnp.ones((1, 1, 1, 4)), rope.table((1, 1, 1), 4), "halves")
