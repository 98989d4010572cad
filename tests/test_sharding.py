"""Rules and meshes; that sharded runs compute the same is in test_pipeline."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from wanjax import checkpoint, sharding
from wanjax.config import preset


def test_large_weights_of_14b_are_split():
    """Every matrix above 1M parameters of transformer and text encoder is split by fsdp or tensor."""
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    shapes = checkpoint.param_shapes(preset("flf2v_14b"))
    for part in ("dit", "umt5"):
        leaves = flatten_dict(shapes[part], sep="/")
        specs = flatten_dict(sharding.specs(shapes[part], mesh=mesh), sep="/")
        assert leaves.keys() == specs.keys()
        whole = {path for path, leaf in leaves.items() if np.prod(leaf.shape) > 1e6 and not any(specs[path])}
        assert whole <= {"blocks/modulation"}


def test_products_are_split_column_then_row():
    shapes = checkpoint.param_shapes(preset("tiny"))["dit"]["blocks"]
    specs = sharding.specs({"blocks": shapes})["blocks"]
    for part in ("q", "k", "v"):
        assert specs["self_attn"][part]["kernel"] == P(None, "fsdp", "tensor")
    assert specs["self_attn"]["o"]["kernel"] == P(None, "tensor", "fsdp")
    assert specs["ffn_in"]["kernel"] == P(None, "fsdp", "tensor")
    assert specs["ffn_out"]["kernel"] == P(None, "tensor", "fsdp")
    assert specs["self_attn"]["norm_q"]["scale"] == P()


def test_axes_that_do_not_divide_are_left_out():
    mesh = sharding.make_mesh({"fsdp": 8})
    leaf = {"blocks": {"ffn_in": {"kernel": jax.ShapeDtypeStruct((2, 12, 16), "float32")}}}
    assert sharding.specs(leaf, mesh=mesh)["blocks"]["ffn_in"]["kernel"] == P(None, None, "tensor")
    assert sharding.video_spec((2, 3, 20, 6, 16), sharding.make_mesh({"data": 2, "sequence": 4})) == P(
        "data", None, "sequence", None, None
    )
    assert sharding.video_spec((1, 3, 6, 6, 16), sharding.make_mesh({"data": 2, "sequence": 4})) == P(
        None, None, None, None, None
    )


@pytest.mark.parametrize("sizes", [{"rows": 8}, {"data": 3}, {"data": 0}])
def test_bad_mesh_is_named(sizes):
    with pytest.raises(ValueError, match="mesh"):
        sharding.make_mesh(sizes)
