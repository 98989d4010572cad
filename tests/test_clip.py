"""CLIP vision tower against `transformers`, and its conversion table against the published names."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import listing, numpy_state, randomize, relative_error
from transformers import CLIPVisionConfig, CLIPVisionModel

from convert import clip as table
from convert.keymap import ConversionError, check, convert
from wanjax.clip import CLIPVision
from wanjax.config import CLIPConfig, preset
from wanjax.precision import BFLOAT16

PREFIX = "vision_model."
SIZES = [(32, 8), (28, 14), (15, 3), (6, 6)]


def small(image_size: int, patch_size: int) -> CLIPConfig:
    return CLIPConfig(num_layers=3, dim=48, num_heads=4, ffn_dim=96, image_size=image_size, patch_size=patch_size)


def reference(config: CLIPConfig, seed: int) -> CLIPVisionModel:
    theirs = CLIPVisionConfig(
        hidden_size=config.dim, intermediate_size=config.ffn_dim, num_hidden_layers=config.num_layers + 1,
        num_attention_heads=config.num_heads, image_size=config.image_size, patch_size=config.patch_size,
        hidden_act="gelu", layer_norm_eps=config.eps,
    )  # fmt: skip
    return randomize(CLIPVisionModel(theirs), seed)


def shapes(config: CLIPConfig):
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    return jax.eval_shape(CLIPVision(config).init, jax.random.key(0), pixels)["params"]


def converted(config: CLIPConfig, model: CLIPVisionModel):
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in numpy_state(model).items()}
    return convert(table.diffusers(config), shapes(config), tensors, table.unused(config))


def images(config: CLIPConfig) -> np.ndarray:
    size = config.image_size
    return np.random.default_rng(3).standard_normal((2, size, size, 3), np.float32)


def theirs(model: CLIPVisionModel, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    return out.hidden_states[-2].numpy()


def ours(config: CLIPConfig, params, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(CLIPVision(config).apply)({"params": params}, pixels))


@pytest.mark.parametrize("image_size, patch_size", SIZES)
def test_parity(image_size, patch_size):
    config = small(image_size, patch_size)
    model = reference(config, image_size)
    pixels = images(config)
    a, b = ours(config, converted(config, model), pixels), theirs(model, pixels)
    assert a.dtype == np.float32 and a.shape == (2, config.num_tokens, config.dim)
    assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("break_it", ["swap q and k", "forget the class token's position", "transpose image"])
def test_parity_notices(break_it):
    config = small(32, 8)
    model = reference(config, 32)
    params, pixels = converted(config, model), images(config)
    wanted = theirs(model, pixels)
    attn = params["blocks"]["attn"]
    if break_it == "swap q and k":
        attn["q"], attn["k"] = attn["k"], attn["q"]
    elif break_it == "transpose image":
        pixels = pixels.transpose(0, 2, 1, 3)
    else:
        params["position_embed"][0] = 0
    assert relative_error(ours(config, params, pixels), wanted) > 1e-3


def test_bfloat16_policy():
    config = small(32, 8)
    params, pixels = converted(config, reference(config, 4)), images(config)
    exact = ours(config, params, pixels)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    rounded = ours(dataclasses.replace(config, precision=BFLOAT16), half, pixels)
    assert 1e-4 < relative_error(rounded, exact) <= 2e-2


def test_wrong_image_size_is_named():
    config = small(32, 8)
    with pytest.raises(ValueError, match=r"clip: pixels \(1, 28, 32, 3\) must be \[batch, 32, 32, 3\]"):
        CLIPVision(config).init(jax.random.key(0), jnp.zeros((1, 28, 32, 3)))


def test_published_names_and_shapes():
    config = preset("flf2v_14b").clip
    plain = {name.removeprefix(PREFIX): shape for name, shape in listing("diffusers_image_encoder.txt").items()}
    rules, expected, unused = table.diffusers(config), shapes(config), table.unused(config)
    check(rules, expected, plain, unused)
    # The table and the unused names together are the whole file, and nothing else (but for an index buffer).
    assert set(unused) - set(plain) == {"embeddings.position_ids"}
    used = {name: shape for name, shape in plain.items() if name not in unused}
    check(rules, expected, used)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(expected))
    assert count == sum(math.prod(shape) for shape in used.values()) == 611_086_080
    with pytest.raises(ConversionError, match=r"extra \(18\):\n  encoder.layers.31."):
        check(rules, expected, plain)
    del used["embeddings.class_embedding"]
    with pytest.raises(ConversionError, match=r"missing \(1\):\n  embeddings.class_embedding"):
        check(rules, expected, used)
