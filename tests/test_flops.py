"""The operation counts against XLA's own and against a calculation by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks import random_model
from samplers import flops
from wanjax import rope, vae
from wanjax import shapes as parameters
from wanjax.config import DiTConfig, VAEConfig, preset
from wanjax.cross import cross_attention
from wanjax.dit import WanDiT
from wanjax.types import Branches, CrossControl

ONE_LAYER = DiTConfig(
    num_layers=1, dim=512, num_heads=4, ffn_dim=1536, text_dim=256, text_length=96, image_dim=128,
    image_tokens=65,
)  # fmt: skip
SHAPES = {
    "flf2v": ONE_LAYER,
    "i2v": dataclasses.replace(ONE_LAYER, num_images=1),
    "t2v": dataclasses.replace(ONE_LAYER, num_images=0, image_dim=None, in_channels=16),
}

# The programs are only counted, never run.
QUICK = {"xla_backend_optimization_level": 0}


def counted_by_xla(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile(compiler_options=QUICK).cost_analysis()["flops"]


@pytest.mark.parametrize("shape", SHAPES)
def test_transformer_against_xla(shape):
    """XLA counts a scan's body once, whatever its length, hence one layer."""
    config, grid = SHAPES[shape], (3, 16, 20)
    params = parameters.dit(config)
    latents, conditions, _ = jax.eval_shape(lambda: random_model.inputs(config, grid, 2, 0))
    table = rope.table((3, 8, 10), config.head_dim)

    def run(params, latents, timestep, conditions):
        return WanDiT(config).apply({"params": params}, latents, timestep, conditions, table)

    timestep = jax.ShapeDtypeStruct((2,), jnp.float32)
    xla = counted_by_xla(run, params, latents, timestep, conditions)
    ours = flops.total(flops.dit(config, grid, 2))
    assert ours < xla < 1.03 * ours


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_autoencoder_against_xla(kind):
    """A first chunk, and a first and one later one. XLA leaves out what meets the zeros at the borders."""
    # By taps, XLA multiplies the zeros in front of a first chunk; one 3D convolution leaves them out.
    config = VAEConfig(base_dim=16, num_res_blocks=1, conv3d="conv3d")
    params = parameters.vae(config)
    for frames in (1, 5):
        shape = (1, frames, 128, 96, 3)
        if kind == "decode":
            shape = (1, config.latent_frames(frames), 16, 12, 16)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        xla = counted_by_xla(lambda params, x: getattr(vae, kind)(config, params, x), params, x)
        ours = flops.total(getattr(flops, f"vae_{kind}")(config, frames, (128, 96)))
        assert 0.96 * ours < xla < 1.02 * ours, frames


def test_14b_by_hand():
    """480 x 864 pixels, 81 frames: 21 x 60 x 108 latents, 21 x 30 x 54 = 34020 tokens, width 5120."""
    config = preset("flf2v_14b").dit
    assert flops.tokens(config, (21, 60, 108)) == 34_020
    count = flops.dit(config, (21, 60, 108))
    square = 5120 * 5120
    assert count == {
        "self-attention projections": 40 * 4 * 2 * 34_020 * square,
        "self-attention scores": 40 * 2 * 2 * 34_020 * 34_020 * 5120,
        "cross-attention": 40 * 2 * (2 * 34_020 * square + 2 * 1026 * square + 2 * 34_020 * 1026 * 5120),
        "ffn": 40 * 2 * 2 * 34_020 * 5120 * 13_824,
        "embedders": 2 * 34_020 * 144 * 5120
        + 2 * (256 * 5120 + 7 * square)
        + 2 * 512 * (4096 * 5120 + square)
        + 2 * 514 * (1280 * 1280 + 1280 * 5120),
        "head": 2 * 34_020 * 5120 * 64,
    }
    assert flops.total(count) == pytest.approx(1.7945e15, rel=1e-4)


def test_batch_and_layers_scale():
    one, grid = preset("t2v_1_3b").dit, (5, 8, 8)
    double = dataclasses.replace(one, num_layers=60)
    assert flops.total(flops.dit(one, grid, 3)) == 3 * flops.total(flops.dit(one, grid))
    assert flops.dit(double, grid)["ffn"] == 2 * flops.dit(one, grid)["ffn"]
    assert flops.dit(double, grid)["head"] == flops.dit(one, grid)["head"]


@pytest.mark.parametrize("anchors", [1, 2])
def test_kab_against_xla(anchors):
    """XLA counts the body of the loop over anchors and frames once, whatever their number: hence one frame's queries
    and one anchor's work, with two anchors half of what they come to."""
    config, grid = SHAPES["flf2v"], (1, 16, 20)
    heads = (config.num_heads, config.head_dim)
    q, text = (jax.ShapeDtypeStruct((2, n, *heads), jnp.float32) for n in (flops.tokens(config, grid), 96))
    keys = Branches(text, jax.ShapeDtypeStruct((2, 2, config.image_tokens, *heads), jnp.float32))
    number = jax.ShapeDtypeStruct((), jnp.float32)
    control = CrossControl(
        anchors=jax.ShapeDtypeStruct((anchors,), jnp.int32),
        curve=jax.ShapeDtypeStruct((1, anchors), jnp.float32),
        floor=number,
        isolated=jax.ShapeDtypeStruct((), bool),
        weights=jax.ShapeDtypeStruct((3,), jnp.float32),
    )
    run = lambda q, k, v, *own: cross_attention(q, k, v, None, *own, inspect=True)  # noqa: E731
    xla = counted_by_xla(run, q, keys, keys, control, jax.ShapeDtypeStruct((2, 1), jnp.float32))
    ours = flops.total(flops.kab(config, grid, batch=2, anchors=anchors)) / anchors
    assert ours < xla < 1.06 * ours  # softmax and mean are not products


def test_kab_by_hand():
    """21 frames of 1620 tokens, two of them anchors, 512 and 514 keys, 40 heads of 128; 8 layers."""
    config, grid = preset("flf2v_14b").dit, (21, 60, 108)
    assert flops.kab(config, grid, 8) == {
        "anchors to text": 8 * 2 * 2 * 2 * 1620 * 512 * 5120,
        "anchors to images": 8 * 2 * 2 * 2 * 1620 * 514 * 5120,
    }
    numbers = 23 * 1620 * 1026 * 40
    assert flops.kab_bytes(config, grid) == {"frame attention": 16 * numbers, "biased attention": 12 * numbers}
