"""A transformer with 8-bit kernels: its parameters and settings, and reading folders of either kind."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from eight import DTYPES, KERNELS, NAMES, eight, quantised
from flax.traverse_util import flatten_dict
from nano import NANO, random_params, write_model, write_orbax, write_tokenizer
from test_shapes import same, traced_dit
from test_store import equal, flip, refused

from benchmarks import random_model
from convert import __main__ as command
from wanjax import checkpoint, manifest, shapes, sharding, store
from wanjax.config import PRESETS, from_json, preset, to_json
from wanjax.precision import BFLOAT16, Precision

WEIGHTS = sorted(DTYPES)
PICKED = "dit/blocks/cross_attn/k_image/"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights in float32, in both forms."""
    root = tmp_path_factory.mktemp("models")
    return {"orbax": write_orbax(root / "orbax"), "safetensors": write_model(root / "safetensors")}


@pytest.fixture(scope="module")
def stored(folders, tmp_path_factory):
    """Folders in 8 bits, by `python -m convert`."""
    root = tmp_path_factory.mktemp("eight")
    for weights in WEIGHTS:
        assert command.main([str(folders["orbax"]), str(root / weights), "--dtype", weights]) == 0
    return {weights: root / weights for weights in WEIGHTS}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["nano", *PRESETS])
def test_the_kernels_of_the_blocks_and_nothing_else(name, weights):
    plain = NANO if name == "nano" else preset(name)
    config = eight(plain, weights)
    before, after = (flatten_dict(shapes.dit(one.dit), sep="/") for one in (plain, config))
    same(shapes.dit(config.dit), traced_dit(config.dit))
    changed = {path for path in before if before[path] != after[path]}
    wanted = {f"blocks/{kernel}/kernel" for kernel in KERNELS}
    wanted -= set() if plain.dit.num_images else {f"blocks/cross_attn/{part}_image/kernel" for part in "kv"}
    assert changed == wanted and after.keys() - before.keys() == {path.replace("kernel", "factor") for path in wanted}
    for path in wanted:
        own, factor = after[path], after[path.replace("kernel", "factor")]
        assert own.dtype == DTYPES[weights] and own.shape == before[path].shape
        assert factor.dtype == np.float32 and factor.shape == (*own.shape[:1], 1, own.shape[2])
    for part in shapes.param_shapes(config).keys() - {"dit"}:
        same(shapes.param_shapes(config)[part], shapes.param_shapes(plain)[part])


def test_sizes_of_the_14b():
    """30.9 GiB in bfloat16 (31.6 with float32 time embedding and head) are 15.9 in 8 bits."""
    config = checkpoint.with_dtype(preset("flf2v_14b"), "bfloat16")
    sizes = {weights: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(
        shapes.dit(checkpoint.with_weights(config, weights).dit))) / 2**30
        for weights in checkpoint.WEIGHTS}  # fmt: skip
    assert sizes["bf16"] == pytest.approx(30.9, abs=0.1)
    assert sizes["int8"] == sizes["fp8"] == pytest.approx(15.9, abs=0.1)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_settings_say_so(weights):
    config = eight(NANO, weights)
    text = to_json(config)
    assert json.loads(text)["dit"]["precision"]["kernel"] == NAMES[weights] and from_json(text) == config
    assert from_json(to_json(NANO)).dit.precision.kernel is None
    assert checkpoint.with_weights(NANO, weights) == config == checkpoint.with_weights(config, weights)
    half = checkpoint.with_dtype(config, "bfloat16")
    assert half.dit.precision == Precision("bfloat16", "bfloat16", kernel=NAMES[weights])
    assert half.umt5.precision == half.clip.precision == BFLOAT16
    assert checkpoint.with_weights(NANO, "bf16").dit.precision == Precision(param="bfloat16")


@pytest.mark.parametrize("make, message", [
    (lambda: Precision(kernel="int4"), "kernel='int4' is not one of None, int8, float8_e4m3fn"),
    (lambda: Precision(kernel="float8_e5m2"), "kernel='float8_e5m2'"),
    (lambda: Precision(compute="float16", kernel="int8"), "kernel='int8' overflow compute='float16'; take bfloat16"),
    (lambda: NANO.with_precision(BFLOAT16, encoders=Precision(kernel="int8")), "kernel is the transformer's alone"),
    (lambda: NANO.with_precision(BFLOAT16, vae=Precision(kernel="int8")), "kernel is the transformer's alone"),
    (lambda: checkpoint.with_weights(NANO, "int4"), "weights 'int4': choose one of bf16, int8, fp8"),
    (lambda: checkpoint.load("tiny", weights="f32"), "weights 'f32'"),
])  # fmt: skip
def test_refused_settings(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_quantised_while_it_is_read(folders, form, weights):
    model = checkpoint.load(folders[form], weights=weights)
    plain = random_params(NANO)
    assert model.config == eight(NANO, weights)
    same(model.params["dit"], shapes.dit(model.config.dit))
    equal(model.params, plain | {"dit": quantised(plain["dit"], weights)})
    staged = checkpoint.load(folders[form], "bfloat16", weights=weights, policy="stage").part("dit")
    equal(staged["blocks"]["ffn_in"]["kernel"], model.params["dit"]["blocks"]["ffn_in"]["kernel"])
    assert staged["patch_embed"]["kernel"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_straight_onto_a_mesh(folders, form, weights):
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    found = checkpoint.load(folders[form], mesh=mesh, weights=weights).params["dit"]
    wanted = quantised(random_params(NANO)["dit"], weights)
    equal(found, wanted)
    placed = sharding.shard_params(wanted, mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, found, placed)))
    shard = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in flatten_dict(found, sep="/").items()}
    assert shard["blocks/ffn_in/kernel"] == (2, 24, 48) and shard["blocks/ffn_in/factor"] == (2, 1, 48)
    assert shard["blocks/ffn_out/kernel"] == (2, 24, 48) and shard["blocks/ffn_out/factor"] == (2, 1, 48)
    assert shard["blocks/cross_attn/k/kernel"] == (2, 48, 12) and shard["blocks/cross_attn/k/factor"] == (2, 1, 12)


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
@pytest.mark.parametrize("name", ["blocks/ffn_out/kernel", "blocks/self_attn/q/kernel", "head/kernel"])
def test_what_is_stored_is_compared(folders, tmp_path, form, name):
    folder = shutil.copytree(folders[form], tmp_path / "copy")
    damage(folder, name, 0.5)
    assert f"dit/{name}" in refused(checkpoint.load, folder, weights="int8")


def damage(folder, name, at):
    """Flips a bit of one array of the transformer."""
    file = folder / "dit.safetensors"
    if not file.is_file():
        chunks = sorted(file for file in (store.place(folder, f"dit/{name}") / "c").rglob("*") if file.is_file())
        return flip(chunks[int(at * (len(chunks) - 1))], 0.4)
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + begin + int(at * (end - begin - 1))] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_nan_in_what_is_quantised_is_named(tmp_path, weights, form):
    params = random_params(NANO)
    params["dit"]["blocks"]["ffn_out"]["kernel"][1, 3, 5] = np.nan
    checkpoint.save(tmp_path / "safetensors", NANO, params, write_tokenizer(tmp_path / "tokenizer.json"))
    if form == "orbax":
        folder = write_orbax(tmp_path / "orbax")
        name = "dit/blocks/ffn_out/kernel"
        array = store.create(store.place(folder, name), (2, 96, 48), np.dtype(np.float32), True)
        array.write(params["dit"]["blocks"]["ffn_out"]["kernel"]).result()
        found = manifest.read_manifest(folder)
        entry = manifest.entry_of(params["dit"]["blocks"]["ffn_out"]["kernel"])
        (folder / "manifest.json").write_text(
            store.Manifest(dict(found.arrays) | {name: entry}, {}, "test", "keep", (), found.files).dumps()
        )
    text = refused(checkpoint.load, tmp_path / form, weights=weights)
    assert "dit/blocks/ffn_out/kernel: NaN or inf in a kernel" in text


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_folder_in_8_bits_is_read_as_it_is(stored, folders, weights):
    model = checkpoint.load(stored[weights])
    assert model.config.dit.precision == Precision("bfloat16", "bfloat16", kernel=NAMES[weights])
    own, plain = model.params["dit"], random_params(NANO)["dit"]
    wanted = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), quantised(plain, weights), own)
    equal(own, wanted)
    equal(checkpoint.load(stored[weights], weights=weights).params["dit"], own)
    there = checkpoint.load(stored[weights], "float32", mesh=sharding.make_mesh({"sequence": 8})).params["dit"]
    equal(there["blocks"], jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), own["blocks"], there["blocks"]))
    found = manifest.read_manifest(stored[weights])
    names = {f"dit/blocks/{kernel}/{leaf}" for kernel in KERNELS for leaf in ("kernel", "factor")}
    assert names <= found.arrays.keys() and found.dtype == weights
    assert {found.arrays[name]["dtype"] for name in names} == {NAMES[weights], "float32"}
    store.verify(stored[weights], found.arrays)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("leaf", ["kernel", "factor"])
@pytest.mark.parametrize("at", [0.0, 1.0])
def test_flipped_bits_in_codes_and_factors(stored, tmp_path, weights, leaf, at):
    folder = shutil.copytree(stored[weights], tmp_path / "copy")
    damage(folder, f"blocks/cross_attn/k_image/{leaf}", at)
    assert f"{PICKED}{leaf}" in refused(checkpoint.load, folder)
    found = manifest.read_manifest(folder)
    assert f"{PICKED}{leaf}" in refused(store.verify, folder, found.arrays)


def test_int8_in_the_safetensors_form(tmp_path):
    config, params = eight(NANO, "int8"), random_params(NANO)
    params["dit"] = quantised(params["dit"], "int8")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    checkpoint.save(tmp_path / "m", config, params, tokenizer)
    equal(checkpoint.load(tmp_path / "m").params, params)
    equal(checkpoint.load(tmp_path / "m", mesh=sharding.make_mesh({"fsdp": 8})).params, params)
    for leaf in ("kernel", "factor"):
        folder = shutil.copytree(tmp_path / "m", tmp_path / leaf)
        damage(folder, f"blocks/cross_attn/k_image/{leaf}", 0.5)
        assert f"{PICKED}{leaf}" in refused(checkpoint.load, folder)
    text = refused(checkpoint.save, tmp_path / "n", eight(NANO, "fp8"), params, tokenizer)
    assert "python -m convert --dtype fp8" in text


@pytest.mark.parametrize("own, asked", [("int8", "bf16"), ("int8", "fp8"), ("fp8", "bf16"), ("fp8", "int8")])
def test_8_bits_do_not_give_others(stored, own, asked):
    text = refused(checkpoint.load, stored[own], weights=asked)
    assert f"stored in {NAMES[own]}" in text and f"convert the original weights again with --dtype {asked}" in text


def test_a_configuration_of_other_8_bits(stored, tmp_path):
    """Signed anew, so that the file's digest is right: codes are never read as another dtype's."""
    folder = shutil.copytree(stored["int8"], tmp_path / "copy")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"kernel": "int8"', '"kernel": "float8_e4m3fn"'))
    checkpoint.sign(folder)
    assert "is int8, not float8_e4m3fn" in refused(checkpoint.load, folder)
    file.write_text(file.read_text().replace('"kernel": "float8_e4m3fn"', '"kernel": null'))
    checkpoint.sign(folder)
    with pytest.raises(checkpoint.CheckpointError, match="factor"):
        checkpoint.load(folder)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_random_codes_to_measure_with(weights):
    """They fill their range, and products come out of the size that kernels in floats give."""
    shapes_of = shapes.dit(eight(preset("tiny"), weights).dit)["blocks"]
    blocks = random_model.params({"blocks": {"ffn_in": shapes_of["ffn_in"]}})["blocks"]
    codes, factor = np.asarray(blocks["ffn_in"]["kernel"]).astype(np.float32), np.asarray(blocks["ffn_in"]["factor"])
    assert codes.std() == pytest.approx(32, rel=0.05) and np.abs(codes).max() <= 128 and factor.min() > 0
    x = np.random.default_rng(0).normal(size=(9, codes.shape[1]))
    assert 0.1 < (x @ (codes[0] * factor[0])).std() < 1
