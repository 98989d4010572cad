"""Rules and meshes; that sharded runs compute the same is in test_parallel and test_pipeline."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from wanjax import checkpoint, settings, sharding
from wanjax.config import preset
from wanjax.layers import TOKENS


def test_large_weights_of_14b_are_split():
    """Every matrix above 1M parameters of transformer and text encoder is split over all devices."""
    mesh = sharding.make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2})
    shapes = checkpoint.param_shapes(preset("flf2v_14b"))
    for part in ("dit", "umt5"):
        leaves = flatten_dict(shapes[part], sep="/")
        specs = flatten_dict(sharding.specs(shapes[part], mesh=mesh), sep="/")
        assert leaves.keys() == specs.keys()
        large = {path: leaf.shape for path, leaf in leaves.items() if np.prod(leaf.shape) > 1e6}
        held = {path: np.prod(NamedSharding(mesh, specs[path]).shard_shape(shape)) / np.prod(shape)
                for path, shape in large.items()}  # fmt: skip
        assert {path for path, share in held.items() if share > 1 / 4} <= {"blocks/modulation"}
        assert sum(share > 1 / 8 for share in held.values()) <= 12, "embedders are not split over tensor"


def test_products_are_split_column_then_row():
    shapes = checkpoint.param_shapes(preset("tiny"))["dit"]["blocks"]
    specs = sharding.specs({"blocks": shapes})["blocks"]
    for part in ("q", "k", "v"):
        assert specs["self_attn"][part]["kernel"] == P(None, TOKENS, "tensor")
    assert specs["self_attn"]["o"]["kernel"] == P(None, ("tensor", *TOKENS), None)
    assert specs["ffn_in"]["kernel"] == P(None, TOKENS, "tensor")
    assert specs["ffn_out"]["kernel"] == P(None, ("tensor", *TOKENS), None)
    assert specs["self_attn"]["norm_q"]["scale"] == P()


def test_axes_that_do_not_divide_are_left_out():
    mesh = sharding.make_mesh({"fsdp": 8})
    leaf = {"blocks": {"ffn_in": {"kernel": jax.ShapeDtypeStruct((2, 12, 16), "float32")}}}
    assert sharding.specs(leaf, mesh=mesh)["blocks"]["ffn_in"]["kernel"] == P(None, None, None)
    halves = sharding.make_mesh({"data": 2, "sequence": 4})
    there, one = sharding.shard_batch((np.zeros((2, 3)), np.zeros((1, 3))), halves)
    assert there.sharding.spec == P("data") and one.sharding.spec == P(None)


@pytest.mark.parametrize(
    "devices, heads, wanted",
    [
        (1, 40, (1, 1)), (2, 40, (1, 2)), (4, 40, (1, 4)), (8, 40, (1, 8)), (16, 40, (2, 8)), (64, 40, (8, 8)),
        (6, 40, (3, 2)), (3, 40, (3, 1)), (8, 12, (2, 4)), (7, 12, (7, 1)),
    ],
)  # fmt: skip
def test_the_mesh_of_so_many_devices(devices, heads, wanted):
    """All of them share tokens and weights, as many as divide the heads swap tokens for heads."""
    sizes = sharding.choose_mesh(devices, heads)
    assert (sizes["fsdp"], sizes["sequence"]) == wanted
    settings.check_mesh(sizes, heads)


@pytest.mark.parametrize("grid, devices, wanted", [
    ((60, 108), 8, (2, 4)), ((90, 160), 8, (2, 4)), ((60, 108), 16, (4, 4)), ((90, 160), 16, (2, 8)),
    ((60, 108), 3, (1, 3)), ((7, 11), 8, (1, 1)), ((60, 108), 64, (4, 4)), ((2, 3), 1, (1, 1)),
])  # fmt: skip
def test_pictures_are_split_where_rows_and_columns_divide(grid, devices, wanted):
    assert sharding.split_picture(grid, devices) == wanted


@pytest.mark.parametrize("sizes, batch, wanted", [
    ({"data": 2}, 1, 2), ({"data": 2}, 2, 1), ({"data": 4}, 2, 4), ({"sequence": 8}, 1, 1), ({}, 1, 1),
])  # fmt: skip
def test_a_mesh_that_repeats_work(sizes, batch, wanted):
    assert sharding.repeats(sizes, batch) == wanted


@pytest.mark.parametrize("sizes", [{"rows": 8}, {"data": 3}, {"data": 0}])
def test_bad_mesh_is_named(sizes):
    with pytest.raises(ValueError, match="mesh"):
        sharding.make_mesh(sizes)
