"""The conversion engine, and every table against the published names and shapes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from nano import NANO, random_params
from reference import listing

from convert import clip, dit, umt5, vae
from convert.keymap import LINEAR, SAME, ConversionError, Rule, check, convert, invert
from wanjax import checkpoint
from wanjax.config import preset

PUBLISHED = {
    "official_dit_flf2v_14b.txt": ("flf2v_14b", "dit", dit.original),
    "official_dit_i2v_14b.txt": ("i2v_14b", "dit", dit.original),
    "official_dit_t2v_1_3b.txt": ("t2v_1_3b", "dit", dit.original),
    "official_umt5.txt": ("flf2v_14b", "umt5", umt5.original),
    "official_vae.txt": ("flf2v_14b", "vae", vae.original),
    "official_clip.txt": ("flf2v_14b", "clip", clip.original),
}


@pytest.fixture(scope="module")
def full_shapes():
    return {name: checkpoint.param_shapes(preset(name)) for name in ("flf2v_14b", "i2v_14b", "t2v_1_3b")}


@pytest.mark.parametrize("file", PUBLISHED)
def test_original_names_and_shapes(file, full_shapes):
    """Every tensor of the published file is used exactly once, every parameter filled exactly once."""
    name, part, table = PUBLISHED[file]
    config, names = getattr(preset(name), part), listing(file)
    unused = clip.original_unused(config, names) if part == "clip" else ()
    check(table(config), full_shapes[name][part], names, unused)
    assert len(unused) == {"clip": len(names) - 5 - 31 * 12}.get(part, 0)


@pytest.mark.parametrize("part", ["dit", "vae", "umt5", "clip"])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_invert_undoes_convert(part, layout):
    params, config = random_params(NANO)[part], getattr(NANO, part)
    table = getattr({"dit": dit, "vae": vae, "umt5": umt5, "clip": clip}[part], layout)(config)
    tensors = invert(table, params)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    again = convert(table, checkpoint.param_shapes(NANO)[part], tensors)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_joined_tensors_are_split_in_order():
    rules = [Rule(f"blocks/{name}", "layer.{i}.qkv", LINEAR, (k, 3)) for k, name in enumerate("qkv")]
    expected = {"blocks": {name: leaf(2, 5, 4) for name in "qkv"}}
    tensors = {f"layer.{i}.qkv": np.arange(60, dtype=np.float32).reshape(12, 5) + 100 * i for i in range(2)}
    params = convert(rules, expected, tensors)
    np.testing.assert_array_equal(params["blocks"]["k"][1], tensors["layer.1.qkv"][4:8].T)
    back = invert(rules, params)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("parts", [[(0, 3), (1, 3)], [(0, 2), (0, 2)], [(0, 1), (0, 1)]])
def test_a_table_that_loses_or_repeats_a_part_is_refused(parts):
    rules = [Rule(f"p{k}", "joined", SAME, part) for k, part in enumerate(parts)]
    expected = {f"p{k}": leaf(4) for k in range(len(parts))}
    with pytest.raises(ConversionError, match="every part of joined exactly once"):
        check(rules, expected, {"joined": (4 * parts[0][1],)})


def test_all_differences_are_reported_together():
    rules = [Rule("a", "x.{i}"), Rule("b", "y"), Rule("c", "z")]
    expected = {"a": leaf(3, 4), "b": leaf(2), "c": leaf(5)}
    shapes = {"x.0": (4,), "x.2": (7,), "y": (2,), "w": (1,), "v": (1,)}
    with pytest.raises(ConversionError) as error:
        check(rules, expected, shapes)
    text = str(error.value)
    assert "missing (2):\n  x.1\n  z" in text
    assert "extra (2):\n  v\n  w" in text
    assert "wrong shape (1):\n  x.2: file has [7], model wants [4]" in text


def test_published_counts(full_shapes):
    def count(tree):
        return sum(int(np.prod(leaf.shape)) for leaf in flatten_dict(tree).values())

    assert count(full_shapes["flf2v_14b"]["dit"]) == sum(
        int(np.prod(shape)) for shape in listing("official_dit_flf2v_14b.txt").values()
    )
    config = dataclasses.replace(preset("flf2v_14b").vae)
    assert len({rule.theirs for rule in vae.original(config)}) == len(listing("official_vae.txt"))
