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
from wanjax import kab, rope
from wanjax.config import DiTConfig, preset
from wanjax.cross import cross_attention
from wanjax.dit import WanDiT, sinusoid
from wanjax.kab import KAB
from wanjax.precision import BFLOAT16
from wanjax.types import Branches, Conditions, CrossBias, CrossControl

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


def make_inputs(config: DiTConfig, grid=(3, 1, 6, 4), batch=2, seed=0, timesteps=None, images=None):
    """Random latents, timesteps, conditions and the rotary table; grid = (latent frames, unused, h, w)."""
    rng = np.random.default_rng(seed)
    frames, _, height, width = grid

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    latents = normal(batch, frames, height, width, config.out_channels)
    image = [normal(batch, config.image_tokens, config.image_dim) for _ in range(images or config.num_images)]
    channels = config.condition_channels
    conditions = Conditions(
        normal(batch, config.text_length, config.text_dim), np.stack(image, 1) if image else None,
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
    if conditions.images is not None:
        image = torch.from_numpy(conditions.images.reshape(-1, *conditions.images.shape[2:]))
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


@pytest.mark.slow
def test_parity_of_one_block_at_14b_width():
    config = dataclasses.replace(preset("flf2v_14b").dit, num_layers=1)
    model = reference_model(config)
    params = converted(model, config)
    inputs = make_inputs(config, (2, 1, 4, 4), batch=1)
    assert relative_error(WanDiT(config).apply({"params": params}, *inputs), run_reference(model, *inputs)) < 1e-5


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_cross_bias_reaches_every_layer_and_frame():
    """A zero bias is none but for rounding (it is another program); a random one of any branch changes the velocity."""
    params = converted(reference_model(FLF2V), FLF2V)
    inputs = make_inputs(FLF2V, (3, 1, 4, 4))
    plain = WanDiT(FLF2V).apply({"params": params}, *inputs)
    shape = (FLF2V.num_layers, 2, 3)
    rng = np.random.default_rng(0)
    for branch, keys in (("text", (512,)), ("images", (2, 257))):
        zero = CrossBias(**{branch: jnp.zeros((*shape, *keys))})
        assert relative_error(WanDiT(FLF2V).apply({"params": params}, *inputs, zero), plain) < 2e-6
    for branch, keys, image in (("text", (512,), slice(None)), ("images", (2, 257), 0), ("images", (2, 257), 1)):
        some = np.zeros((*shape, *keys), np.float32)
        some[..., image, :] = rng.normal(size=some[..., image, :].shape)
        random = CrossBias(**{branch: jnp.asarray(some)})
        assert relative_error(WanDiT(FLF2V).apply({"params": params}, *inputs, random), plain) > 1e-4


def test_cross_attention_bias_against_oracle():
    rng = np.random.default_rng(3)
    sizes = {"text": 11, "first": 7, "last": 7}
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

    def as32(kind, d, axis):
        images = jnp.stack([jnp.asarray(d[n], jnp.float32) for n in ("first", "last")], axis)
        return kind(jnp.asarray(d["text"], jnp.float32), images)

    ours, _ = cross_attention(
        jnp.asarray(q, jnp.float32), as32(Branches, keys, 1), as32(Branches, values, 1), as32(CrossBias, bias, 2)
    )
    assert relative_error(ours, expected) < 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"text": np.zeros((2, 77, 40))},
            r"conditions.text is \[2, 77, 40\]; this model takes \[2, 512, 40\]",
        ),
        ({"images": None}, r"conditions.images is absent; this model takes \[2, 2, 257, 32\]"),
        (
            {"images": np.zeros((2, 3, 257, 32))},
            r"conditions.images is \[2, 3, 257, 32\]; this model takes \[2, 2, 257",
        ),
        ({"latent": np.zeros((2, 3, 6, 4, 16))}, r"takes \[2, 3, 6, 4, 20\]"),
    ],
)
def test_wrong_conditions_are_named(change, message):
    latents, timesteps, conditions, table = make_inputs(FLF2V)
    with pytest.raises(ValueError, match=message):
        WanDiT(FLF2V).init(jax.random.key(0), latents, timesteps, conditions.replace(**change), table)


@pytest.mark.parametrize(
    "config, images, wanted",
    [
        (T2V, np.zeros((2, 1, 257, 32)), "absent"),
        (I2V, np.zeros((2, 0, 257, 32)), r"\[2, M, 257, 32\]"),
        (I2V, np.zeros((2, 257, 32)), r"\[2, M, 257, 32\]"),
        (I2V, None, r"\[2, M, 257, 32\]"),
    ],
    ids=["t2v with one", "i2v with none", "i2v without axis", "i2v without"],
)
def test_wrong_numbers_of_images_are_named(config, images, wanted):
    latents, timesteps, conditions, table = make_inputs(config)
    with pytest.raises(ValueError, match=f"^conditions.images is .*; this model takes {wanted}(\n|$)"):
        WanDiT(config).init(jax.random.key(0), latents, timesteps, conditions.replace(images=images), table)


SLIM = {name: dataclasses.replace(c, num_layers=2, text_length=8, image_tokens=5, dim=48, num_heads=2, ffn_dim=64)
        for name, c in (("t2v", T2V), ("i2v", I2V), ("flf2v", FLF2V))}  # fmt: skip


def slim_params(config):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: np.float32(0.3 * rng.normal(size=s.shape)), shapes(config))


def control_of(config, frames, anchors, images, batch=2, strong=True):
    """An isolated one, as `wanjax.method` makes it, and the strength of KAB in every layer."""
    strength = kab.strength(KAB(layers=(0, config.num_layers - 1)), 4, config.num_layers, frames, anchors)[1]
    strength = np.repeat(strength[:, None], batch, 1) * strong
    curve, weights = kab.anchor_curve(KAB(), frames, anchors), np.linspace(1, 0.5, 1 + images, dtype=np.float32)
    control = CrossControl(np.int32(anchors), curve, np.float32(5e-4), np.bool_(True), weights)
    return {"control": control, "strength": strength}


@pytest.mark.parametrize(
    "name, images",
    [("t2v", 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("i2v", 1), ("flf2v", 2))), ("i2v", 3)],
)
def test_images_and_anchors_are_different_numbers(name, images):
    """Any of both: one program for other places, shares, strengths and weights; the report has an axis of images."""
    config = SLIM[name]
    inputs = make_inputs(config, (5, 1, 4, 4), images=images)
    params = slim_params(config)
    apply = jax.jit(WanDiT(config, inspect=True).apply)
    outs, programs = [], []
    for at in ((1, 3), (0, 4)):
        velocity, seen = apply({"params": params}, *inputs, **control_of(config, 5, at, images))
        outs.append(np.asarray(velocity))
        programs.append(apply._cache_size())
    assert programs[0] == programs[1] and relative_error(*outs) > 1e-5
    assert outs[0].shape == (2, 5, 4, 4, 16)
    for part in (seen.plain, seen.biased, seen.bias):
        assert part.text.shape == (2, 2, 5, 8)
        assert part.images is None if images == 0 else part.images.shape == (2, 2, 5, images, 5)
    assert np.isfinite(outs).all()


def test_one_image_twice_is_the_image():
    """A joint softmax over copies of an image is the one over the image."""
    config = SLIM["i2v"]
    latents, timesteps, conditions, table = make_inputs(config)
    params, apply = slim_params(config), jax.jit(WanDiT(config).apply)
    once = apply({"params": params}, latents, timesteps, conditions, table)
    thrice = conditions.replace(images=np.repeat(conditions.images, 3, 1))
    assert relative_error(apply({"params": params}, latents, timesteps, thrice, table), once) <= 1e-6


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("strength", np.zeros((2, 2, 4)), r"strength is \[2, 2, 4\]; this model takes \[2, 2, 5\]"),
        ("anchors", np.zeros((1, 2)), r"control.anchors is \[1, 2\]; this model takes \[A\]"),
        ("curve", np.zeros((5, 3)), r"control.curve is \[5, 3\]; this model takes \[5, 2\]"),
        ("floor", np.zeros(2), r"control.floor is \[2\]; this model takes \[\]"),
        ("weights", np.ones(4), r"control.weights is \[4\]; this model takes \[3\]"),
    ],
)
def test_wrong_controls_are_named(field, value, message):
    config = SLIM["flf2v"]
    told = control_of(config, 5, (0, 4), 2)
    told |= {field: value} if field in told else {"control": told["control"].replace(**{field: value})}
    with pytest.raises(ValueError, match=f"^{message}(\n|$)"):
        WanDiT(config).init(jax.random.key(0), *make_inputs(config, (5, 1, 4, 4)), **told)


@pytest.mark.slow
def test_the_config_names_the_kernel():
    """All give the same; float32 is left to XLA by cuDNN, "auto" is XLA where nothing resolved it."""
    config = dataclasses.replace(SLIM["flf2v"], num_layers=1)
    inputs, params = make_inputs(config), slim_params(config)

    def run(name):
        named = dataclasses.replace(config, attention=name)
        return jax.jit(WanDiT(named).apply).lower({"params": params}, *inputs)

    texts = {name: run(name).as_text() for name in ("auto", "xla", "chunked", "cudnn")}
    assert texts["auto"] == texts["xla"] == texts["cudnn"] != texts["chunked"]
    outs = [run(name).compile()({"params": params}, *inputs) for name in ("xla", "chunked")]
    assert relative_error(*outs) <= 1e-6


def test_an_unknown_kernel_is_named():
    config = dataclasses.replace(SLIM["t2v"], attention="flash")
    with pytest.raises(ValueError, match="^unknown attention kernel 'flash'"):
        shapes(config)


def test_nothing_asks_for_the_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("asked for the backend"))
    config = dataclasses.replace(SLIM["flf2v"], precision=BFLOAT16)
    assert shapes(config)
