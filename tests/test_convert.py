"""Conversion to a wanjax folder: what comes out, and what is found when it is damaged."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from conversion import CONFIG, VAE_FILE, equal, plain_params, refused
from foreign import copy_of
from reference import relative_error
from safetensors.numpy import load_file, save_file

import convert
from convert import __main__ as command
from convert import plan, read, sources
from wanjax import checkpoint, sharding, store
from wanjax.precision import BFLOAT16


def test_every_number_arrives(made):
    model, params = checkpoint.load(made), plain_params()
    assert model.config.dit == CONFIG.dit and model.config.vae == CONFIG.vae and model.config.name == "custom"
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.params))
    equal(model.params, params)
    assert not [path.name for path in made.parent.iterdir() if path != made]


def test_orbax_restores_it_by_itself(made):
    for part, wanted in plain_params().items():
        equal(ocp.StandardCheckpointer().restore(made.resolve() / part), wanted)


def test_straight_onto_a_mesh(made):
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    model = checkpoint.load(made, mesh=mesh)
    kernel = model.params["dit"]["blocks"]["ffn_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 128 // 4, 96 // 2)
    equal(model.params, plain_params())


def test_load_without_a_folder(source):
    config, params = convert.load(source, "f32")
    assert config.dit == CONFIG.dit
    equal(params, plain_params())


@pytest.mark.parametrize("asked, kept", [("bf16", "bfloat16"), ("keep", "float32")])
def test_dtypes(source, tmp_path, asked, kept):
    assert command.main([str(source), str(tmp_path / "m"), "--dtype", asked]) == 0
    manifest = store.read_manifest(tmp_path / "m")
    assert manifest.arrays["dit/blocks/ffn_in/kernel"]["dtype"] == kept
    assert manifest.arrays["vae/decoder/conv_in/kernel"]["dtype"] == "float32"
    assert manifest.arrays["dit/head_modulation"]["dtype"] == "float32"
    assert manifest.dtype == asked and any(name.endswith(VAE_FILE) for name in manifest.sources)
    if asked == "bf16":
        model = checkpoint.load(tmp_path / "m")
        assert model.config.dit.precision == BFLOAT16
        wanted = plain_params()["dit"]["blocks"]["ffn_in"]["kernel"].astype(jax.numpy.bfloat16)
        equal(model.params["dit"]["blocks"]["ffn_in"]["kernel"], wanted)
        back = checkpoint.load(tmp_path / "m", dtype="float32")  # another dtype than it was written in
        assert back.params["dit"]["blocks"]["ffn_in"]["kernel"].dtype == np.float32


def test_outputs_are_those_of_diffusers(tmp_path):
    """A folder by `save_pretrained` in shards, converted by the command, against the torch model."""
    from test_dit import FLF2V, make_inputs, reference_model, run_reference

    from wanjax.dit import WanDiT

    model = reference_model(FLF2V)
    model.save_pretrained(tmp_path / "source" / "transformer", max_shard_size="300KB")
    assert command.main([str(tmp_path / "source"), str(tmp_path / "m"), "--only", "dit"]) == 0
    config, params = convert.load(tmp_path / "source", only=["dit"])
    assert config.dit == FLF2V
    inputs = make_inputs(FLF2V)
    manifest = store.read_manifest(tmp_path / "m")
    store.check(tmp_path / "m", "dit", params["dit"], manifest)
    restored = store.restore(tmp_path / "m", "dit", params["dit"], None)
    ours = jax.jit(WanDiT(FLF2V).apply)({"params": restored}, *inputs)
    assert relative_error(ours, run_reference(model, *inputs)) < 1e-5
    with pytest.raises(checkpoint.CheckpointError, match="vae, umt5, clip, tokenizer.json missing"):
        checkpoint.load(tmp_path / "m")


@pytest.mark.parametrize("form", ["store", "safetensors"])
def test_a_wanjax_folder_in_another_dtype(made, tmp_path, form):
    """From either form of a wanjax folder; the bundled model is one of safetensors files."""
    origin = made if form == "store" else checkpoint.bundled()
    assert command.main([str(origin), str(tmp_path / "m"), "--dtype", "bf16"]) == 0
    model, plain = checkpoint.load(tmp_path / "m"), checkpoint.load(origin)
    assert model.config.dit.precision == BFLOAT16 and model.config.name == plain.config.name
    wanted = jax.tree.map(lambda leaf, like: np.asarray(leaf).astype(like.dtype), plain.params, model.params)
    equal(model.params, wanted)
    assert command.main(["inspect", str(origin)]) == 0


def test_inspect_says_what_there_is(source, made, tmp_path, capsys):
    assert command.main(["inspect", str(source)]) == 0
    text = capsys.readouterr().out
    assert "dit: first-and-last-frame (FLF2V) transformer of 2 layers, width 128, original layout" in text
    assert "float32 100%" in text and "every tensor of the right shape" in text and "absent: nothing" in text
    assert command.main(["inspect", str(made), "--full"]) == 0
    text = capsys.readouterr().out
    assert "wanjax folder of custom" in text and "every array is the one of the manifest" in text
    assert text.count("complete") == 4
    assert command.main(["inspect", str(source / VAE_FILE)]) == 0
    text = capsys.readouterr().out
    assert "absent: dit, umt5, clip" in text
    assert command.main(["inspect", str(tmp_path)]) == 2


HOSTILE = {
    "pipe": lambda file: os.mkfifo(file), "device": lambda file: file.symlink_to("/dev/zero"),
    "dangling": lambda file: file.symlink_to("nowhere"), "loop": lambda file: file.symlink_to(file.name),
    "empty": lambda file: file.write_bytes(b""), "deep": lambda file: file.write_bytes(b"[" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_file_of_weights_is_one_line_and_never_waited_for(source, tmp_path, capsys, kind):
    """As SRC, as a picked file, as a LoRA, and as the config.json of a folder."""
    file, folder = tmp_path / "x.safetensors", tmp_path / "folder"
    folder.mkdir()
    HOSTILE[kind](file)
    HOSTILE[kind](folder / "config.json")
    for arguments in ([file], [source, "--dit", file], [source, "--lora", file], [folder]):
        error = refused(capsys, *arguments[:1], tmp_path / "m", *arguments[1:])
        assert "\n" not in error and (str(file) in error or str(folder) in error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.safetensors"]


def test_a_part_that_is_not_there_is_said(source, tmp_path, capsys):
    path = copy_of(source, tmp_path / "copy")
    (path / VAE_FILE).unlink()
    assert "no vae in it; add them, or convert --only dit umt5 clip" in refused(capsys, path, tmp_path / "m")
    assert "holds a first-and-last-frame (FLF2V) transformer of 2 layers, width 128, not i2v_14b" in refused(
        capsys, source, tmp_path / "m", "--model", "i2v-14b"
    )
    assert "no file or folder" not in refused(capsys, tmp_path / "nowhere", tmp_path / "m")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy"]


def test_a_value_that_half_precision_cannot_hold_is_named(source, tmp_path):
    """float16 ends at 65504: a silent inf would be worse than no model."""
    path = copy_of(source, tmp_path / "copy")
    planned = plan.plan(sources.find(path), "f32")
    part = planned.source.parts["dit"]
    rule = next(rule for rule in part.family.rules(part.config) if rule.ours == "head/bias")
    named = dict(part.tensors.named)
    tensor = named["head.head.bias"]
    named["head.head.bias"] = dataclasses.replace(tensor, read=lambda: np.full(tensor.shape, 1e6, np.float32))
    part = dataclasses.replace(part, tensors=dataclasses.replace(part.tensors, named=named))
    with pytest.raises(ValueError, match=r"head.head.bias holds NaN or inf \(as float16\)"):
        read.read_layer(part, rule, "head.head.bias", np.dtype(np.float16))


def test_a_malicious_file_is_not_run(source, tmp_path, capsys):
    path, canary = copy_of(source, tmp_path / "copy"), tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(canary),))

    torch.save({"x": Evil()}, path / VAE_FILE)
    assert "mkdir, which is not a tensor or dictionary; it was not run" in refused(capsys, path, tmp_path / "m")
    assert not canary.exists()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)


def test_a_flipped_bit_is_found_on_load(made, tmp_path, capsys):
    path = copy_of(made, tmp_path / "copy")
    flip(path / "dit" / "blocks.ffn_in.kernel" / "c" / "1" / "0" / "0")
    with pytest.raises(checkpoint.CheckpointError, match="dit/blocks/ffn_in/kernel: damaged") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    assert "dit/blocks/ffn_in/kernel: damaged" in refused(capsys, "inspect", path, "--full")


def test_a_manifest_that_disagrees_is_found(made, tmp_path):
    path = copy_of(made, tmp_path / "copy")
    change(path, lambda fields: fields["arrays"]["vae/quant/bias"].update(sha256="0" * 64))
    checkpoint.load(path, fast=True)
    with pytest.raises(checkpoint.CheckpointError, match="vae/quant/bias: not the array of the manifest"):
        checkpoint.load(path)


def change(folder: Path, edit) -> None:
    file = folder / checkpoint.MANIFEST
    fields = json.loads(file.read_text())
    edit(fields)
    file.write_text(json.dumps(fields))


SPOILT = {
    "newer": (lambda f: f.update(format=2), "format 2, this wanjax reads 1"),
    "outside": (lambda f: f["arrays"].update({"dit/../../x": {"shape": [1], "dtype": "float32", "sha256": ""}}),
                "leads outside the folder"),
    "absolute": (lambda f: f["arrays"].update({"/etc/x": {"shape": [1], "dtype": "float32", "sha256": ""}}),
                 "leads outside the folder"),
    "missing entry": (lambda f: f["arrays"].pop("dit/head/bias"), r"dit/head/bias: missing"),
    "other shape": (lambda f: f["arrays"]["dit/head/bias"].update(shape=[3]), r"dit/head/bias: \(3,\)"),
    "nonsense": (lambda f: f.pop("arrays"), "not a readable manifest"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_manifests(made, tmp_path, name):
    path = copy_of(made, tmp_path / "copy")
    edit, message = SPOILT[name]
    change(path, edit)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.load(path)


def test_a_lost_layer_is_not_read_as_zeros(made, tmp_path):
    path = copy_of(made, tmp_path / "copy")
    (path / "dit" / "blocks.ffn_in.kernel" / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="dit/blocks/ffn_in/kernel: damaged .*missing"):
        checkpoint.load(path)


@pytest.mark.parametrize("entry", [{}, {"shape": [1]}, {"shape": [1], "dtype": "nonsense", "sha256": ""}])
def test_entries_that_say_nothing(made, tmp_path, entry):
    path = copy_of(made, tmp_path / "copy")
    change(path, lambda fields: fields["arrays"].update({"dit/head/bias": entry}))
    with pytest.raises(checkpoint.CheckpointError, match="not a readable manifest"):
        checkpoint.load(path)


def test_layers_stay_apart_from_folder_to_folder(made, tmp_path):
    """A converted folder as a source: a file a layer again, and the same numbers in the same precision."""
    assert command.main([str(made), str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    assert command.main([str(tmp_path / "half"), str(tmp_path / "again")]) == 0
    layers = sorted(p.name for p in (tmp_path / "again" / "dit" / "blocks.ffn_in.kernel" / "c").iterdir())
    assert layers == ["0", "1"]
    one, two = (store.read_manifest(tmp_path / name).arrays for name in ("half", "again"))
    assert one == two
    assert checkpoint.load(tmp_path / "again").config.dit.precision == BFLOAT16


def test_half_precision_with_some_float32_is_half(source, tmp_path):
    """diffusers keeps time embedding and modulation in float32 in its bfloat16 files."""
    path = copy_of(source, tmp_path / "copy")
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        half = {n: x if "time_embedding" in n or "modulation" in n else x.astype(jax.numpy.bfloat16)
                for n, x in tensors.items()}  # fmt: skip
        save_file(half, shard)
    config, params = convert.load(path, only=["dit"])
    assert config.dit.precision == BFLOAT16
    assert params["dit"]["blocks"]["ffn_in"]["kernel"].dtype == jax.numpy.bfloat16
    assert params["dit"]["time_in"]["kernel"].dtype == np.float32


def test_a_repeated_option_adds_up():
    options = command.parser().parse_args(["a", "b", "--lora", "x", "--lora", "y:2", "--only", "dit", "--only", "vae"])
    assert options.lora == ["x", "y:2"] and options.only == ["dit", "vae"]


def test_a_missing_array(made, tmp_path):
    path = copy_of(made, tmp_path / "copy")
    (path / "umt5" / "token_embed" / "zarr.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="umt5/token_embed: not on disk"):
        checkpoint.load(path)
