"""The diffusion transformer beside diffusers' WanTransformer3DModel on the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from reference import listing, numpy_state, randomize, relative_error

from convert import dit as names
from convert.keymap import ConversionError, check, convert
from wanjax import rope
from wanjax.config import BFLOAT16, DiTConfig, preset
from wanjax.cross import cross_attention
from wanjax.dit import WanDiT, sinusoid
from wanjax.types import Branches, Conditions, CrossBias

SMALL = DiTConfig(
    num_layers=3, dim=96, num_heads=4, ffn_dim=160, text_dim=40, text_length=512, freq_dim=64,
    image_dim=32, image_tokens=257,
)  # fmt: skip
FLF2V = SMALL
I2V = dataclasses.replace(SMALL, num_images=1)
T2V = dataclasses.replace(SMALL, num_images=0, image_dim=None, in_channels=16)


def reference_model(config: DiTConfig, seed: int = 0) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim, in_channels=config.in_channels,
        out_channels=config.out_channels, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.num_layers, eps=config.eps,
        image_dim=config.image_dim, added_kv_proj_dim=config.dim if config.num_images else None,
        pos_embed_seq_len=2 * config.image_tokens if config.num_images == 2 else None,
    )  # fmt: skip
    return randomize(model, seed)


def shapes(config: DiTConfig):
    """Parameter shapes by eval_shape: nothing is allocated."""
    inputs = make_inputs(config, (1, 2, 4, 4), batch=1)
    return jax.eval_shape(WanDiT(config).init, jax.random.key(0), *inputs)["params"]


def make_inputs(config: DiTConfig, grid=(3, 1, 6, 4), batch=2, seed=0, timesteps=None):
    """Random latents, timesteps, conditions and the rotary table; grid = (latent frames, unused, h, w)."""
    rng = np.random.default_rng(seed)
    frames, _, height, width = grid

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    latents = normal(batch, frames, height, width, config.out_channels)
    image = [normal(batch, config.image_tokens, config.image_dim) for _ in range(config.num_images)]
    channels = config.condition_channels
    conditions = Conditions(
        normal(batch, config.text_length, config.text_dim), *image, *([None] * (2 - len(image))),
        latent=normal(batch, frames, height, width, channels) if channels else None,
    )  # fmt: skip
    timesteps = np.asarray([987.5, 3.25][:batch] if timesteps is None else timesteps, np.float32)
    table = rope.table((frames, height // 2, width // 2), config.head_dim)
    return latents, timesteps, conditions, table


def run_reference(model, latents, timesteps, conditions, table):
    def channels_first(x):
        return torch.from_numpy(np.moveaxis(x, -1, 1).copy())

    parts = [latents] + ([] if conditions.latent is None else [conditions.latent])
    image = None
    if conditions.first is not None:
        pair = [conditions.first] if conditions.last is None else [conditions.first, conditions.last]
        image = torch.from_numpy(np.stack(pair, 1).reshape(-1, *conditions.first.shape[1:]))
    with torch.no_grad():
        out = model(
            channels_first(np.concatenate(parts, -1)), torch.from_numpy(timesteps),
            torch.from_numpy(conditions.text), image, return_dict=False,
        )[0]  # fmt: skip
    return np.moveaxis(out.numpy(), 1, -1)


def converted(model, config):
    return convert(names.diffusers(config), shapes(config), numpy_state(model))


@pytest.mark.parametrize("config", [FLF2V, I2V, T2V], ids=["flf2v", "i2v", "t2v"])
def test_parity(config):
    model = reference_model(config)
    params, apply = converted(model, config), jax.jit(WanDiT(config).apply)
    cases = [((3, 1, 6, 4), None), ((1, 1, 2, 10), [999.0, 0.0]), ((7, 1, 4, 6), [500.4, 41.7])]
    for seed, (grid, timesteps) in enumerate(cases):
        inputs = make_inputs(config, grid, seed=seed, timesteps=timesteps)
        ours, reference = apply({"params": params}, *inputs), run_reference(model, *inputs)
        assert ours.dtype == jnp.float32
        assert relative_error(ours, reference) < 1e-5, (grid, timesteps)


def test_parity_of_one_block_at_14b_width():
    config = dataclasses.replace(preset("flf2v_14b").dit, num_layers=1)
    model = reference_model(config)
    params = converted(model, config)
    inputs = make_inputs(config, (2, 1, 4, 4), batch=1)
    assert relative_error(WanDiT(config).apply({"params": params}, *inputs), run_reference(model, *inputs)) < 1e-5


def test_bfloat16_policy_stays_near_float32():
    config = FLF2V
    params = converted(reference_model(config), config)
    inputs = make_inputs(config)
    exact = WanDiT(config).apply({"params": params}, *inputs)
    half = dataclasses.replace(config, precision=BFLOAT16)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    out = WanDiT(half).apply({"params": params}, *inputs)
    assert out.dtype == jnp.float32
    assert 1e-5 < relative_error(out, exact) < 2e-2


@pytest.mark.parametrize(
    "name, count", [("flf2v_14b", 16_395_536_704), ("t2v_1_3b", 1_418_996_800), ("i2v_14b", 16_394_878_784)]
)
def test_parameter_count(name, count):
    leaves = jax.tree.leaves(shapes(preset(name).dit))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == count


def test_table_names_the_published_file():
    config = preset("flf2v_14b").dit
    check(names.diffusers(config), shapes(config), listing("diffusers_transformer_flf2v_14b.txt"))


def _swap(state, a, b):
    state[a], state[b] = state[b], state[a]


def _swap_halves(state):
    position = state["condition_embedder.image_embedder.pos_embed"]
    position[:] = np.roll(position, position.shape[1] // 2, axis=1)


MUTATIONS = {
    "a square matrix transposed": lambda s: s["blocks.1.attn1.to_v.weight"][:].T.copy(),
    "q and k of cross-attention swapped": lambda s: _swap(
        s, "blocks.0.attn2.to_q.weight", "blocks.0.attn2.to_k.weight"
    ),
    "text and image keys swapped": lambda s: _swap(s, "blocks.2.attn2.to_k.weight", "blocks.2.attn2.add_k_proj.weight"),
    "halves of the image position swapped": _swap_halves,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_parity_notices(mutation):
    model = reference_model(FLF2V)
    state = numpy_state(model)
    changed = MUTATIONS[mutation](state)
    if changed is not None:
        state["blocks.1.attn1.to_v.weight"] = changed
    params = convert(names.diffusers(FLF2V), shapes(FLF2V), state)
    inputs = make_inputs(FLF2V)
    out = WanDiT(FLF2V).apply({"params": params}, *inputs)
    assert relative_error(out, run_reference(model, *inputs)) > 1e-4


def test_conversion_lists_everything_that_differs():
    state = numpy_state(reference_model(FLF2V))
    del state["proj_out.bias"], state["blocks.1.ffn.net.2.bias"]
    state["blocks.3.norm2.bias"] = np.zeros(96, np.float32)
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :16]
    with pytest.raises(ConversionError) as error:
        convert(names.diffusers(FLF2V), shapes(FLF2V), state)
    text = str(error.value)
    assert "missing (2):\n  blocks.1.ffn.net.2.bias\n  proj_out.bias" in text
    assert "extra (1):\n  blocks.3.norm2.bias" in text
    assert "patch_embedding.weight: file has [96, 16, 1, 2, 2], model wants [96, 36, 1, 2, 2]" in text


@pytest.mark.parametrize("t", [0.0, 0.37, 3.25, 499.9, 937.0, 999.0, 1000.0])
def test_sinusoid_is_float64_exact(t):
    omega = 10000.0 ** (-np.arange(128) / 128)
    angle = np.float64(np.float32(t)) * omega
    expected = np.concatenate([np.cos(angle), np.sin(angle)])
    ours = np.asarray(jax.jit(sinusoid, static_argnums=1)(jnp.float32([t]), 256))[0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-7)


def test_cross_bias_reaches_every_layer_and_frame():
    """A zero bias is none but for rounding (it is another program); a random one of any branch changes the velocity."""
    params = converted(reference_model(FLF2V), FLF2V)
    inputs = make_inputs(FLF2V, (3, 1, 4, 4))
    plain = WanDiT(FLF2V).apply({"params": params}, *inputs)
    shape = (FLF2V.num_layers, 2, 3)
    rng = np.random.default_rng(0)
    for branch, keys in (("text", 512), ("first", 257), ("last", 257)):
        zero = CrossBias(**{branch: jnp.zeros((*shape, keys))})
        assert relative_error(WanDiT(FLF2V).apply({"params": params}, *inputs, zero), plain) < 2e-6
        random = CrossBias(**{branch: jnp.asarray(rng.normal(size=(*shape, keys)), jnp.float32)})
        assert relative_error(WanDiT(FLF2V).apply({"params": params}, *inputs, random), plain) > 1e-4


def test_cross_attention_bias_against_oracle():
    rng = np.random.default_rng(3)
    sizes = {"text": 11, "first": 5, "last": 7}
    frames, tokens, heads, width = 3, 4, 2, 8
    q = rng.normal(size=(2, frames * tokens, heads, width))
    keys, values = ({n: rng.normal(size=(2, k, heads, width)) for n, k in sizes.items()} for _ in range(2))
    bias = {n: rng.normal(size=(2, frames, k)) for n, k in sizes.items()}

    def softmax_attention(names):
        k, v, b = (np.concatenate([d[n] for n in names], axis) for d, axis in ((keys, 1), (values, 1), (bias, 2)))
        out = np.zeros_like(q)
        for batch in range(2):
            for s in range(q.shape[1]):
                for head in range(heads):
                    logits = k[batch, :, head] @ q[batch, s, head] / np.sqrt(width) + b[batch, s // tokens]
                    weights = np.exp(logits - logits.max())
                    out[batch, s, head] = weights / weights.sum() @ v[batch, :, head]
        return out

    expected = softmax_attention(["text"]) + softmax_attention(["first", "last"])
    as32 = lambda d: {n: jnp.asarray(a, jnp.float32) for n, a in d.items()}  # noqa: E731
    ours = cross_attention(
        jnp.asarray(q, jnp.float32), Branches(**as32(keys)), Branches(**as32(values)), CrossBias(**as32(bias))
    )
    assert relative_error(ours, expected) < 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"text": np.zeros((2, 77, 40))},
            r"conditions.text is \[2, 77, 40\]; this model takes \[2, 512, 40\]",
        ),
        ({"last": None}, "conditions.last is absent"),
        ({"latent": np.zeros((2, 3, 6, 4, 16))}, r"takes \[2, 3, 6, 4, 20\]"),
    ],
)
def test_wrong_conditions_are_named(change, message):
    latents, timesteps, conditions, table = make_inputs(FLF2V)
    with pytest.raises(ValueError, match=message):
        WanDiT(FLF2V).init(jax.random.key(0), latents, timesteps, conditions.replace(**change), table)
