"""Pictures cut into windows: the same result, in less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error

from wanjax import pieces, sharding, vae
from wanjax.config import VAEConfig
from wanjax.pieces import Windows, decode_reach, encode_reach
from wanjax.precision import BFLOAT16

REACH = {"encode": encode_reach, "decode": decode_reach}
CONFIGS = {
    "wan": VAEConfig(base_dim=4, conv3d="taps"),
    "tiny": VAEConfig(base_dim=4, dim_mult=(1, 2, 4), num_res_blocks=1, temporal_downsample=(True, True)),
    "stride2": VAEConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=2, temporal_downsample=(True,)),
    "stride1": VAEConfig(base_dim=4, dim_mult=(2,), num_res_blocks=1, temporal_downsample=()),
}
QUICK = {"xla_backend_optimization_level": 0}  # these programs run once


@functools.cache
def params(name):
    """Random weights that keep the variance, gammas near one, small biases."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda: vae.init(CONFIGS[name], jax.random.key(0)))

    def leaf(path, a):
        noise = rng.normal(size=a.shape)
        kind = jax.tree_util.keystr(path[-1:], simple=True)
        scales = {"kernel": lambda: noise / np.sqrt(np.prod(a.shape[:-1])), "gamma": lambda: 1 + 0.1 * noise}
        return jnp.float32(scales.get(kind, lambda: 0.1 * noise)())

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def example(name, kind, grid, frames):
    """Pixels or normalised latents of `frames` pixel frames."""
    config, rng = CONFIGS[name], np.random.default_rng(1)
    if kind == "encode":
        return jnp.float32(rng.uniform(-1, 1, (1, frames, *(n * config.spatial_stride for n in grid), 3)))
    return jnp.float32(rng.normal(size=(1, config.latent_frames(frames), *grid, config.latent_channels)))


@functools.cache
def done(name, kind, grid, frames, tiles=1, precision=None):
    config = dataclasses.replace(CONFIGS[name], tiles=tiles)
    config = dataclasses.replace(config, precision=precision) if precision else config
    run = jax.jit(functools.partial(getattr(vae, kind), config), compiler_options=QUICK)
    return np.asarray(run(params(name), example(name, kind, grid, frames)))


CASES = [
    # 16 latents make the smallest picture that is cut
    pytest.param(("wan", "decode", (2, 18), 5, 2), marks=pytest.mark.slow),
    pytest.param(("wan", "encode", (2, 18), 5, 2), marks=pytest.mark.slow),
    ("tiny", "decode", (11, 3), 9, 2),  # upright, an odd number of rows
    ("tiny", "encode", (1, 17), 1, 5),  # does not divide; one frame
    ("stride2", "decode", (2, 14), 5, 99),  # more than there is room for
    ("stride2", "encode", (15, 2), 5, 3),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_windows_give_what_the_whole_picture_gives(case):
    *what, tiles = case
    name, kind, grid, _ = what
    assert Windows.of(grid, tiles, REACH[kind](CONFIGS[name])) is not None, "nothing is cut"
    assert np.std(done(*what)) > 0.05
    assert relative_error(done(*what, tiles), done(*what)) <= 1e-6


def test_windows_in_half_precision():
    """Other roundings here and there, but no seam: no further from each other than from float32."""
    *what, tiles = CASES[2]
    whole, cut = done(*what, precision=BFLOAT16), done(*what, tiles, BFLOAT16)
    assert relative_error(cut, whole) <= relative_error(whole, done(*what)) <= 2e-2


@pytest.mark.parametrize("case", CASES[2:4], ids=lambda case: case[1])
def test_without_overlap_a_seam_would_show(case, monkeypatch):
    *what, tiles = case
    name, kind, grid, frames = what
    config = dataclasses.replace(CONFIGS[name], tiles=tiles)
    monkeypatch.setattr(vae, f"{kind}_reach", lambda config: 1)
    run = jax.jit(lambda p, x: getattr(vae, kind)(config, p, x), compiler_options=QUICK)
    assert relative_error(run(params(name), example(*what)), done(*what)) > 1e-4


@pytest.mark.parametrize("kind", ["encode", "decode"])
@pytest.mark.parametrize("name", CONFIGS)
def test_reach_is_as_far_as_one_position_is_seen(name, kind):
    """One column that is not a number: what it reaches is none either, and nothing beyond."""
    config, reach = CONFIGS[name], REACH[kind](CONFIGS[name])
    stride, middle = config.spatial_stride, reach + 2
    width = 2 * middle + 1
    shape = (1, 1, 1, width, config.base_dim * config.dim_mult[-1])
    shape = shape if kind == "decode" else (1, 1, stride, width * stride, 3)
    columns, own = np.arange(shape[3]), 1 if kind == "decode" else stride
    x = jnp.where((columns // own == middle)[:, None], jnp.nan, jnp.ones(shape))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def fine(params, x):
        return vae.WanVAE(config).apply({"params": params}, x, None, vae.FINE, method=f"{kind}_chunk")[0]

    seen = np.flatnonzero(np.isnan(np.asarray(fine(params(name), x))).any((0, 1, 2, 4)))
    seen = seen // stride if kind == "decode" else seen
    # An encoder's way is longer on one side.
    assert max(middle - seen.min(), seen.max() - middle) == reach
    assert kind == "encode" or middle - seen.min() == seen.max() - middle


@pytest.mark.parametrize("reach", [1, 4, 7])
def test_every_position_is_written_last_by_a_window_that_sees_enough(reach):
    for length in range(1, 60):
        for tiles in (1, 2, 3, 4, 7, 200):
            windows = Windows.of((length, length - 1), tiles, reach)
            if windows is None:
                assert tiles == 1 or length <= 2 * reach + 1
                continue
            assert windows.axis == 2 and 1 < len(windows.starts) <= tiles and windows.size < length
            good = np.zeros(length, bool)
            for start in windows.starts:
                end = start + windows.size
                first = start + reach if start else 0
                written = slice(first, first + windows.size - reach)
                assert start >= 0 and end <= length and written.stop <= length
                place = np.arange(length)[written]
                good[written] = (place >= first) & (place < (end if end == length else end - reach))
            assert good.all()


def test_memory_of_windows():
    """Of a wide picture in four windows."""

    def memory(tiles, width):
        config = dataclasses.replace(CONFIGS["tiny"], tiles=tiles)
        x = jax.ShapeDtypeStruct((1, 3, 4, width, 16), jnp.float32)
        run = jax.jit(functools.partial(vae.decode, config))
        return run.lower(params("tiny"), x).compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes

    assert memory(4, 96) < 0.5 * memory(1, 96)


def test_devices_that_share_a_picture_do_not_cut_it():
    config = dataclasses.replace(CONFIGS["tiny"], tiles=3)
    for grid, shared in (((8, 32), True), ((11, 31), False)):
        with jax.set_mesh(sharding.picture_mesh(sharding.make_mesh({"sequence": 8}), grid)):
            assert (pieces.windows_of(config, grid, 4) is None) == shared
    assert pieces.windows_of(config, (8, 32), 4) is not None
