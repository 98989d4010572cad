"""Both encoders on eight devices: split over all of them, the same numbers, and no weights travel."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from reference import relative_error

from wanjax import checkpoint, sharding
from wanjax.clip import CLIPVision
from wanjax.config import CLIPConfig, UMT5Config, preset
from wanjax.umt5 import UMT5Encoder

UMT5 = UMT5Config(num_layers=3, dim=64, num_heads=8, head_dim=16, ffn_dim=96, vocab_size=80)
CLIP = CLIPConfig(num_layers=3, dim=64, num_heads=4, ffn_dim=128, image_size=16, patch_size=8)
MESH = {"fsdp": 2, "sequence": 4}


@functools.cache
def case(part):
    """(module, params, arguments)."""
    rng = np.random.default_rng(0)
    if part == "umt5":
        mask = np.arange(12) < np.array([[12], [7]])
        module, arguments = UMT5Encoder(UMT5), (rng.integers(0, 80, (2, 12)), mask.astype(np.int32))
    else:
        module, arguments = CLIPVision(CLIP), (rng.normal(size=(2, 16, 16, 3)).astype(np.float32),)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))["params"]
    params = jax.tree.map(lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)
    return module, params, arguments


@functools.cache
def on_eight(part):
    """The compiled module on the mesh, and its parameters there."""
    module, params, arguments = case(part)
    mesh = sharding.make_mesh(MESH)
    with jax.set_mesh(mesh):
        placed = sharding.shard_params(params, mesh)
        lowered = jax.jit(lambda p, *x: module.apply({"params": p}, *x)).lower(placed, *arguments)
    return lowered.compile(), placed


@pytest.mark.parametrize("part", ["umt5", "clip"])
def test_eight_devices_compute_what_one_does(part):
    module, params, arguments = case(part)
    compiled, placed = on_eight(part)
    wanted = np.asarray(module.apply({"params": params}, *arguments))
    found = np.asarray(compiled(placed, *map(jnp.asarray, arguments)))
    if part == "umt5":  # padding has numbers without meaning
        found, wanted = (out * arguments[1][..., None] for out in (found, wanted))
    assert np.std(wanted) > 0.1 and relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("part", ["umt5", "clip"])
def test_weights_stay_where_they_are(part):
    """What travels is activations of a few tokens: nothing as large as one layer's kernel, and no stack of them."""
    compiled, placed = on_eight(part)
    kernels = {leaf.shape[-2:] for leaf in jax.tree.leaves(placed) if leaf.ndim > 1 and not leaf.is_fully_replicated}
    lines = [line for line in compiled.as_text().splitlines()
             if re.search(r"= .* (all-gather|all-to-all|collective-permute|all-reduce)(-start)?\(", line)]  # fmt: skip
    assert lines
    for line in lines:
        shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", line.split("(%")[0])]
        assert not [shape for shape in shapes if shape[-2:] in kernels], f"a weight travels: {line}"


@pytest.mark.parametrize("part", ["umt5", "clip"])
@pytest.mark.parametrize("sizes", [MESH, {"fsdp": 8}, {"sequence": 8}], ids=str)
def test_at_full_size_no_device_holds_more_than_its_share(part, sizes):
    shapes = flatten_dict(checkpoint.param_shapes(preset("flf2v_14b"))[part], sep="/")
    mesh = sharding.make_mesh(sizes)
    specs = flatten_dict(sharding.specs(checkpoint.param_shapes(preset("flf2v_14b"))[part], mesh=mesh), sep="/")
    held = {path: math.prod(NamedSharding(mesh, specs[path]).shard_shape(leaf.shape)) for path, leaf in shapes.items()}
    whole = {path: math.prod(leaf.shape) for path, leaf in shapes.items()}
    assert {path for path in held if whole[path] > 1e6 and held[path] * 8 > whole[path]} == set()
    assert sum(held.values()) <= 1.03 * sum(whole.values()) / 8
