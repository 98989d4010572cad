"""UMT5 encoder against `transformers`, and its conversion table against the published names."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import listing, numpy_state, randomize, relative_error
from transformers import UMT5Config as TheirConfig
from transformers import UMT5EncoderModel

from convert import umt5 as table
from convert.keymap import ConversionError, check, convert
from wanjax.config import UMT5Config, preset
from wanjax.precision import BFLOAT16
from wanjax.umt5 import UMT5Encoder, position_buckets

CONFIG = UMT5Config(
    num_layers=3, dim=48, num_heads=4, head_dim=16, ffn_dim=80, vocab_size=120, num_buckets=8, max_distance=20
)
LENGTH = 67  # more than three times max_distance


def reference(config: UMT5Config, seed: int) -> UMT5EncoderModel:
    theirs = TheirConfig(
        vocab_size=config.vocab_size, d_model=config.dim, d_kv=config.head_dim, d_ff=config.ffn_dim,
        num_layers=config.num_layers, num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.eps, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    model = randomize(UMT5EncoderModel(theirs), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("SelfAttention.q.weight"):
                # Logits are unscaled: trained weights make up for the head width, random ones must too.
                parameter /= math.sqrt(config.head_dim)
    return model


def shapes(config: UMT5Config):
    ids = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(UMT5Encoder(config).init, jax.random.key(0), ids, ids)["params"]


def inputs(length: int = LENGTH):
    rng = np.random.default_rng(5)
    ids = rng.integers(1, CONFIG.vocab_size, (2, length), np.int32)
    mask = np.ones((2, length), np.int32)
    mask[0, length // 3 :] = 0
    return ids * mask, mask


@pytest.fixture(scope="module")
def model():
    return reference(CONFIG, 1)


@pytest.fixture(scope="module")
def params(model):
    return convert(table.diffusers(CONFIG), shapes(CONFIG), numpy_state(model), table.IGNORE)


def theirs(model: UMT5EncoderModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.tensor(ids).long(), torch.tensor(mask).long())
    return out.last_hidden_state.numpy()


def ours(config: UMT5Config, params, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(UMT5Encoder(config).apply)({"params": params}, ids, mask))


@pytest.mark.parametrize("length", [1, 9, LENGTH])
def test_parity(model, params, length):
    ids, mask = inputs(length)
    mask[:, 0] = 1
    valid = mask.astype(bool)
    a, b = ours(CONFIG, params, ids, mask), theirs(model, ids, mask)
    assert a.dtype == np.float32 and a.shape == (2, length, CONFIG.dim)
    assert relative_error(a[valid], b[valid]) <= 1e-5


def test_parity_with_the_published_buckets():
    config = dataclasses.replace(CONFIG, num_layers=1, num_buckets=32, max_distance=128)
    model = reference(config, 2)
    params = convert(table.diffusers(config), shapes(config), numpy_state(model), table.IGNORE)
    ids, mask = inputs(200)
    valid = mask.astype(bool)
    assert relative_error(ours(config, params, ids, mask)[valid], theirs(model, ids, mask)[valid]) <= 1e-5


@pytest.mark.parametrize("break_it", ["swap q and k", "tie position biases", "swap gate and value"])
def test_parity_notices(model, params, break_it):
    blocks = {**params["blocks"], "attn": dict(params["blocks"]["attn"])}
    attn = blocks["attn"]
    if break_it == "swap q and k":
        attn["q"], attn["k"] = attn["k"], attn["q"]
    elif break_it == "tie position biases":
        attn["position_bias"] = np.broadcast_to(attn["position_bias"][:1], attn["position_bias"].shape)
    else:
        blocks["ffn_gate"], blocks["ffn_in"] = blocks["ffn_in"], blocks["ffn_gate"]
    ids, mask = inputs()
    valid = mask.astype(bool)
    a = ours(CONFIG, {**params, "blocks": blocks}, ids, mask)
    assert relative_error(a[valid], theirs(model, ids, mask)[valid]) > 1e-3


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (16, 100), (4, 8)])
def test_position_buckets_match_the_reference_at_every_distance(num_buckets, max_distance):
    config = TheirConfig(
        d_model=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=8,
        relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance,
    )  # fmt: skip
    attention = UMT5EncoderModel(config).encoder.block[0].layer[0].SelfAttention
    length = 700
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    wanted = attention._relative_position_bucket(offset).numpy()
    np.testing.assert_array_equal(position_buckets(length, num_buckets, max_distance), wanted)


def test_padding_is_not_attended_to(params):
    ids, mask = inputs()
    other = np.where(mask != 0, ids, 7)
    valid = mask.astype(bool)
    np.testing.assert_array_equal(ours(CONFIG, params, ids, mask)[valid], ours(CONFIG, params, other, mask)[valid])


def test_only_padding_stays_finite(params):
    ids = np.zeros((1, 6), np.int32)
    assert np.isfinite(ours(CONFIG, params, ids, ids)).all()


@pytest.mark.parametrize("softmax", ["float32", "bfloat16"])
def test_bfloat16_policy(params, softmax):
    ids, mask = inputs()
    valid = mask.astype(bool)
    exact = ours(CONFIG, params, ids, mask)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    config = dataclasses.replace(CONFIG, precision=dataclasses.replace(BFLOAT16, softmax=softmax))
    rounded = ours(config, half, ids, mask)
    assert np.isfinite(rounded).all()
    # The stated bound is for the shipped policy, whose softmax is float32.
    assert relative_error(rounded[valid], exact[valid]) <= (2e-2 if softmax == "float32" else 4e-2)


def test_shape_mismatch_is_named(params):
    with pytest.raises(ValueError, match=r"umt5: ids \(2, 5\) and mask \(2, 4\) must both be"):
        UMT5Encoder(CONFIG).apply({"params": params}, jnp.zeros((2, 5), jnp.int32), jnp.zeros((2, 4)))


def test_published_names_and_shapes():
    config = preset("flf2v_14b").umt5
    published = listing("diffusers_text_encoder.txt")
    expected = shapes(config)
    check(table.diffusers(config), expected, published, table.IGNORE)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(expected)) == 5_680_910_336
    without = {name: shape for name, shape in published.items() if name not in table.IGNORE}
    check(table.diffusers(config), expected, without)
    with pytest.raises(ConversionError, match=r"extra \(1\):\n  encoder.embed_tokens.weight"):
        check(table.diffusers(config), expected, published)
    del without["encoder.block.23.layer.1.DenseReluDense.wo.weight"]
    with pytest.raises(ConversionError, match=r"missing \(1\):\n  encoder.block.23.layer.1.Dense"):
        check(table.diffusers(config), expected, without)
