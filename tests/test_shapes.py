"""The written-down parameter shapes are those that `init` makes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from nano import NANO

from benchmarks.random_model import inputs
from wanjax import rope, shapes, vae
from wanjax.clip import CLIPVision
from wanjax.config import PRESETS, DiTConfig, VAEConfig, preset
from wanjax.dit import WanDiT
from wanjax.precision import BFLOAT16, Precision
from wanjax.umt5 import UMT5Encoder

KEY = jax.random.key(0)


def traced_dit(config: DiTConfig):
    grid = tuple(2 * size for size in config.patch_size)
    table = rope.table((2, 2, 2), config.head_dim)
    latents, conditions, _ = inputs(config, grid, 1, 0)
    init = lambda key: WanDiT(config).init(key, latents, np.zeros(1, np.float32), conditions, table)["params"]  # noqa: E731
    return jax.eval_shape(init, KEY)


def traced_vae(config: VAEConfig):
    return jax.eval_shape(lambda key: vae.init(config, key), KEY)


def traced_umt5(config):
    ids = np.zeros((1, 4), np.int32)
    return jax.eval_shape(lambda key: UMT5Encoder(config).init(key, ids, ids)["params"], KEY)


def traced_clip(config):
    pixels = np.zeros((1, config.image_size, config.image_size, 3), np.float32)
    return jax.eval_shape(lambda key: CLIPVision(config).init(key, pixels)["params"], KEY)


TRACED = {"dit": traced_dit, "vae": traced_vae, "umt5": traced_umt5, "clip": traced_clip}


def same(found, wanted):
    """Names, shapes and dtypes."""
    found, wanted = ({name: (leaf.shape, leaf.dtype) for name, leaf in flatten_dict(tree, sep="/").items()}
                     for tree in (found, wanted))  # fmt: skip
    assert found == wanted


@pytest.mark.parametrize("name", ["nano", *PRESETS])
def test_every_preset(name):
    config = NANO if name == "nano" else preset(name)
    found = shapes.param_shapes(config)
    assert found.keys() == {part for part in TRACED if getattr(config, part) is not None}
    for part, tree in found.items():
        same(tree, TRACED[part](getattr(config, part)))


@pytest.mark.parametrize("precision", [BFLOAT16, Precision(param="float16", compute="float32")])
def test_every_role_in_other_precisions(precision):
    for part, trace in TRACED.items():
        config = dataclasses.replace(getattr(NANO, part), precision=precision)
        same(getattr(shapes, part)(config), trace(config))


@pytest.mark.parametrize("changes", [
    {"base_dim": 6, "dim_mult": (1, 1, 3, 2), "temporal_downsample": (True, False, True)},
    {"num_res_blocks": 2, "dim_mult": (2, 1), "temporal_downsample": (False,)},
    {"dim_mult": (3,), "temporal_downsample": ()},
])  # fmt: skip
def test_other_autoencoders(changes):
    config = dataclasses.replace(NANO.vae, **changes)
    same(shapes.vae(config), traced_vae(config))


@pytest.mark.parametrize("changes", [
    {"num_images": 1},
    {"num_images": 0, "image_dim": None, "in_channels": 16},
    {"patch_size": (2, 1, 2), "in_channels": 20, "freq_dim": 10},
])  # fmt: skip
def test_other_transformers(changes):
    config = dataclasses.replace(NANO.dit, **changes)
    same(shapes.dit(config), traced_dit(config))
