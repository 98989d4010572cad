"""The causal VAE beside `diffusers.AutoencoderKLWan` on the same random weights."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from reference import listing, numpy_state, randomize, relative_error

from convert import vae as names
from convert.keymap import CONV3D, check, convert
from wanjax import checkpoint, vae
from wanjax.config import VAEConfig, preset
from wanjax.precision import BFLOAT16, VAE_BFLOAT16

CONFIGS = {
    "wan": VAEConfig(base_dim=8, conv3d="taps"),
    "tiny": dataclasses.replace(preset("tiny").vae, conv3d="taps"),
    "stride2": VAEConfig(
        base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, False), conv3d="taps"
    ),
}
SMALLEST = VAEConfig(base_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,))
GRIDS = {"wan": (1, 3), "tiny": (3, 5), "stride2": (5, 2)}  # latent height and width

# These programs run once: compiling quickly matters more than running quickly.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def reference(name: str) -> AutoencoderKLWan:
    """Random weights, biases and gammas; the two outputs scaled to the range of the trained model."""
    config = CONFIGS[name]
    model = AutoencoderKLWan(
        base_dim=config.base_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    )
    randomize(model, seed=1)
    with torch.no_grad():
        model.quant_conv.weight.mul_(4)
        model.decoder.conv_out.weight.mul_(0.7)
    return model


def expected_params(config: VAEConfig) -> Any:
    return jax.eval_shape(lambda key: vae.init(config, key), jax.random.key(0))


@functools.cache
def params(name: str) -> Any:
    config = CONFIGS[name]
    return convert(names.diffusers(config), expected_params(config), numpy_state(reference(name)))


@functools.cache
def example(name: str, kind: str, frames: int) -> np.ndarray:
    """Batch of 2: pixels for "encode", normalised latents for "decode"; `frames` are pixel frames."""
    config, (height, width), rng = CONFIGS[name], GRIDS[name], np.random.default_rng(frames)
    if kind == "encode":
        stride = config.spatial_stride
        return rng.uniform(-1, 1, (2, frames, height * stride, width * stride, 3)).astype(np.float32)
    shape = (2, config.latent_frames(frames), height, width, config.latent_channels)
    return rng.normal(size=shape).astype(np.float32)


@functools.cache
def theirs(name: str, kind: str, frames: int) -> np.ndarray:
    config, model = CONFIGS[name], reference(name)
    mean, std = np.array(config.latent_mean), np.array(config.latent_std)
    x = example(name, kind, frames)
    if kind == "decode":
        x = (x * std + mean).astype(np.float32)
    x = torch.from_numpy(x).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        y = model.encode(x).latent_dist.mode() if kind == "encode" else model.decode(x).sample
    y = y.permute(0, 2, 3, 4, 1).numpy()
    return (y - mean) / std if kind == "encode" else y


def build(config: VAEConfig, kind: str, x: np.ndarray | jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    function = functools.partial(getattr(vae, kind), config)
    return jax.jit(function).lower(expected_params(config), x).compile(compiler_options=QUICK)


@functools.cache
def compiled(name: str, kind: str, frames: int) -> jax.stages.Compiled:
    return build(CONFIGS[name], kind, example(name, kind, frames))


@functools.cache
def ours(name: str, kind: str, frames: int) -> np.ndarray:
    return np.asarray(compiled(name, kind, frames)(params(name), example(name, kind, frames)))


@pytest.mark.parametrize("kind", ["encode", "decode"])
@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("wan", 1),
        ("tiny", 5),
        ("stride2", 9),
        pytest.param("wan", 13, marks=pytest.mark.slow),
        pytest.param("tiny", 25, marks=pytest.mark.slow),
    ],
)
def test_parity(name: str, frames: int, kind: str) -> None:
    wanted = theirs(name, kind, frames)
    assert wanted.std() > 0.1
    if kind == "decode":
        assert (np.abs(wanted) == 1).mean() < 0.1, "clipping would hide errors"
    assert ours(name, kind, frames).dtype == np.float32
    assert relative_error(ours(name, kind, frames), wanted) <= 1e-4


def test_decode_clips() -> None:
    """Latents far out: the reference leaves [-1, 1] and cuts, and so do we."""
    run, x = compiled("tiny", "decode", 5), 0 * example("tiny", "decode", 5) + 1
    loud = jax.tree.map(lambda a: a, params("tiny"))
    loud["decoder"]["head"]["conv"] = {k: 50 * v for k, v in loud["decoder"]["head"]["conv"].items()}
    video = np.asarray(run(loud, x))
    assert video.min() == -1 and video.max() == 1


@pytest.mark.parametrize("kind", [pytest.param("encode", marks=pytest.mark.slow), "decode"])
def test_chunks_with_explicit_cache_equal_the_scan(kind: str) -> None:
    """The public chunk methods, called one by one, give what one call over the whole length gives."""
    config, x = CONFIGS["tiny"], example("tiny", kind, 25)
    mean, std = np.float32(config.latent_mean), np.float32(config.latent_std)
    model, size = vae.WanVAE(config), config.temporal_stride if kind == "encode" else 1

    @functools.partial(jax.jit, compiler_options=QUICK)
    def chunk(params: Any, x: jax.Array, cache: Any) -> Any:
        return model.apply({"params": params}, x, cache, method=f"{kind}_chunk")

    x = x if kind == "encode" else x * std + mean
    parts, cache = [], None
    for start in (0, *range(1, x.shape[1], size)):
        y, cache = chunk(params("tiny"), x[:, start : start + (size if start else 1)], cache)
        parts.append(y)
    y = np.concatenate(parts, 1)
    y = (y[..., : config.latent_channels] - mean) / std if kind == "encode" else y.clip(-1, 1)
    assert relative_error(y, ours("tiny", kind, 25)) <= 1e-5


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_bfloat16_policy(kind: str) -> None:
    config = dataclasses.replace(CONFIGS["tiny"], precision=BFLOAT16)
    x = example("tiny", kind, 5)
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params("tiny"))
    y = build(config, kind, x)(half, x)
    assert y.dtype == jnp.float32
    assert 1e-4 < relative_error(y, ours("tiny", kind, 5)) <= 2e-2


@pytest.mark.parametrize("kind", ["encode", pytest.param("decode", marks=pytest.mark.slow)])
def test_the_other_form_of_convolution_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowering that TPUs use, from the first to the last layer; the config alone decides."""
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("asked for the backend"))
    x, config = example("tiny", kind, 5), dataclasses.replace(CONFIGS["tiny"], conv3d="conv3d")
    traced = [str(jax.make_jaxpr(functools.partial(getattr(vae, kind), c))(expected_params(c), x))
              for c in (config, CONFIGS["tiny"])]  # fmt: skip
    assert [("dimension_numbers=ConvDimensionNumbers(lhs_spec=(0, 4, 1, 2, 3)" in text) for text in traced] == [
        True,
        False,
    ]
    y = build(config, kind, x)(params("tiny"), x)
    assert relative_error(y, ours("tiny", kind, 5)) <= 1e-5


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_memory_does_not_grow_with_length(kind: str) -> None:
    """Working memory of a video 5 times longer, beside its input and output, stays what it was."""

    def working_memory(chunks: int) -> int:
        shape = (2, 1 + 2 * chunks, 8, 8, 3) if kind == "encode" else (2, 1 + chunks, 4, 4, 16)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        return build(SMALLEST, kind, x).memory_analysis().temp_size_in_bytes

    assert working_memory(50) <= 1.02 * working_memory(10)


def test_swapped_temporal_taps_break_parity() -> None:
    """A converter that reads time backwards does not pass for a right one."""
    config = CONFIGS["tiny"]
    rules = [
        dataclasses.replace(rule, transform=dataclasses.replace(CONV3D, forward=lambda x: CONV3D.forward(x)[::-1]))
        if rule.theirs == "encoder.down_blocks.1.time_conv.weight"
        else rule
        for rule in names.diffusers(config)
    ]
    assert rules != names.diffusers(config)
    wrong = convert(rules, expected_params(config), numpy_state(reference("tiny")))
    y = compiled("tiny", "encode", 5)(wrong, example("tiny", "encode", 5))
    assert relative_error(y, theirs("tiny", "encode", 5)) > 1e-2


def test_published_checkpoint_names_and_count() -> None:
    shapes = listing("diffusers_vae.txt")
    expected = expected_params(VAEConfig())
    assert len(shapes) == 194
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(expected)) == 126_892_531
    check(names.diffusers(VAEConfig()), expected, shapes)


def test_init_is_finite_and_in_the_param_dtype() -> None:
    config = dataclasses.replace(SMALLEST, precision=BFLOAT16)
    tree = vae.init(config, jax.random.key(0, impl="rbg"))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), tree) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected_params(config)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree))


def test_channel_norm() -> None:
    """Against `F.normalize`, at ordinary, tiny and zero vectors; its gradient at zero is finite."""
    x = np.random.default_rng(0).normal(size=(1, 1, 2, 3, 6)).astype(np.float32)
    x[..., 0, 1, :] = 0
    x[..., 1, 1, :] = 1e-13
    gamma = np.linspace(-1, 2, 6, dtype=np.float32)
    module = vae.ChannelNorm(BFLOAT16)
    apply = functools.partial(module.apply, {"params": {"gamma": gamma}})
    wanted = torch.nn.functional.normalize(torch.from_numpy(x), dim=-1).numpy() * math.sqrt(6) * gamma
    np.testing.assert_allclose(apply(x), wanted, rtol=1e-6, atol=1e-7)
    assert np.isfinite(jax.grad(lambda x: apply(x).sum())(x)).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 6, 8, 8, 3), "6 frames.*use 5 or 9"),
        ((1, 4, 8, 8, 3), "4 frames.*use 1 or 5"),
        ((1, 0, 8, 8, 3), "0 frames.*use 1 or 5"),
        ((1, 5, 10, 8, 3), "10x8 pixels are not multiples of 4"),
        ((1, 5, 8, 8, 4), r"give \[B, T, H, W, 3\]"),
        ((5, 8, 8, 3), r"give \[B, T, H, W, 3\]"),
    ],
)
def test_bad_video_shapes(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae.encode(CONFIGS["tiny"], {}, jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 2, 4, 4, 8), (1, 0, 4, 4, 16), (2, 4, 4, 16)])
def test_bad_latent_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents: got shape .* give \[B, F, h, w, 16\]"):
        vae.decode(CONFIGS["tiny"], {}, jnp.zeros(shape))


def decibels(a, b):
    """PSNR of clips in [-1, 1]."""
    return 10 * np.log10(4 / np.mean((np.float64(a) - np.float64(b)) ** 2))


WIDE = dataclasses.replace(preset("flf2v_14b").vae, conv3d="taps")


def full_width(rng):
    """Random weights of the published sizes, variance kept."""
    shapes = flatten_dict(expected_params(WIDE), sep="/")
    weights = {path: rng.standard_normal(leaf.shape, np.float32) / np.sqrt(np.prod(leaf.shape[:-1]) or 1)
               if path.endswith("kernel") else np.float32("gamma" in path) + 0.02 * rng.standard_normal(leaf.shape)
               for path, leaf in shapes.items()}  # fmt: skip
    return unflatten_dict(jax.tree.map(jnp.float32, weights), sep="/")


@functools.cache
def production(name):
    """(config, weights, latents, the clip that float32 makes of them)."""
    rng = np.random.default_rng(0)
    bundled = name == "bundled"
    config = dataclasses.replace(preset("tiny").vae, conv3d="taps") if bundled else WIDE
    weights = checkpoint.load("tiny").params["vae"] if bundled else full_width(rng)
    # A clip of soft shapes in motion, as the encoder sees it.
    grid = np.stack(np.meshgrid(*(np.linspace(0, 3, n) for n in (5, 24, 24)), indexing="ij"), -1)
    waves = np.sin(grid @ rng.standard_normal((3, 12))) @ rng.standard_normal((12, 3)) / 5
    video = jnp.asarray(np.clip(waves, -1, 1)[None], jnp.float32)
    latents = jax.jit(lambda p, x: vae.encode(config, p, x), compiler_options=QUICK)(weights, video)
    return config, weights, latents, decoded(config, weights, latents)


def decoded(config, weights, latents):
    return np.asarray(jax.jit(lambda p, x: vae.decode(config, p, x), compiler_options=QUICK)(weights, latents))


def rounded(monkeypatch, operand):
    """Products of `operand` of what they multiply, in float32, as accelerators make them."""
    conv3d, dot = vae.conv3d, vae.dot
    monkeypatch.setattr(vae, "conv3d", lambda x, k, *a, **b: operand(lambda x, k: conv3d(x, k, *a, **b), x, k))
    monkeypatch.setattr(vae, "dot", lambda x, k, *a: operand(lambda x, k: dot(x, k, *a), x, k))


def tf32(product, x, k):
    """Ten bits behind the point, float32's range."""
    return product(*(lax.reduce_precision(a, 8, 10) for a in (x, k)))


def three_passes(product, x, k):
    """Each operand is two bfloat16; the product of both rests is left out."""
    high = [lax.reduce_precision(a, 8, 7) for a in (x, k)]
    rest = [lax.reduce_precision(a - b, 8, 7) for a, b in zip((x, k), high, strict=True)]
    return product(*high) + (product(rest[0], high[1]) + product(high[0], rest[1]))


WIDELY = pytest.param("full width", marks=pytest.mark.slow)


@pytest.mark.parametrize("operand", [None, tf32, three_passes], ids=["float16", "tf32", "three passes"])
@pytest.mark.parametrize("name", ["bundled", WIDELY])
def test_production_policies_decode_the_same_pictures(name, operand, monkeypatch):
    """Under --dtype bfloat16 a decoded clip is at least 55 dB from float32's: on GPUs (float16), on TPUs (three passes
    of bfloat16), and where float32 is TF32. The latter two are rounded as the machines do."""
    config, weights, latents, clip = production(name)
    if operand is None:
        config = dataclasses.replace(config, precision=VAE_BFLOAT16)
    else:
        rounded(monkeypatch, operand)
    found = decibels(clip, decoded(config, weights, latents))
    assert np.std(clip) > 0.1
    assert 55 <= found <= 140, "too far away, or the policy changed nothing"


def test_float16_stays_in_range(monkeypatch):
    """A stream beyond what float16 holds: its scale keeps it, and what reads it does not care."""
    config, weights, latents, _ = production("bundled")
    weights = jax.tree.map(lambda x: x, weights)
    decoder, loud = weights["decoder"], lambda tree: jax.tree.map(lambda x: 1e4 * x, tree)
    decoder["conv_in"] = loud(decoder["conv_in"])
    for block in (part for name in ("middle", "level_0", "level_1", "level_2") for part in decoder[name].values()):
        for name in {"conv2", "proj"} & set(block):
            block[name] = loud(block[name])
    clip, half = decoded(config, weights, latents), dataclasses.replace(config, precision=VAE_BFLOAT16)
    assert np.std(clip) > 0.1
    assert decibels(clip, decoded(half, weights, latents)) >= 55
    monkeypatch.setattr(vae, "STREAM", 1.0)
    assert not np.isfinite(decoded(half, weights, latents)).all()


def test_production_policy_by_platform():
    """TPUs have no products of float16, CPUs no fast ones; other policies stay."""
    model = preset("flf2v_14b").with_precision(BFLOAT16, vae=VAE_BFLOAT16)
    found = {name: model.for_platform(name).vae.precision for name in ("cpu", "gpu", "cuda", "rocm", "tpu")}
    assert {name: (one.compute, one.residual, one.passes, one.param) for name, one in found.items()} == {
        **dict.fromkeys(("gpu", "cuda", "rocm"), ("float16", "float16", "exact", "float32")),
        "cpu": ("float32", "float32", "exact", "float32"), "tpu": ("float32", "float32", "fast", "float32"),
    }  # fmt: skip
    assert [found[name].matmul for name in ("cpu", "gpu", "tpu")] == [lax.Precision.HIGHEST, None, lax.Precision.HIGH]
    half = model.with_precision(BFLOAT16, vae=BFLOAT16).for_platform("tpu").vae.precision
    assert (half.compute, half.residual) == ("bfloat16", "float32")
