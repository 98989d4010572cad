"""The model folder: round trip, precision, and every way it can be damaged."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from nano import NANO, WORDS, edit_config, random_params, write_model, write_tokenizer
from safetensors.numpy import load_file, save_file

from wanjax import checkpoint, sharding
from wanjax.checkpoint import CheckpointError


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "nano")


def test_round_trip(folder):
    model = checkpoint.load(folder)
    assert model.config == NANO
    written, read = (flatten_dict(tree, sep="/") for tree in (random_params(NANO), model.params))
    assert written.keys() == read.keys()
    assert all(np.array_equal(written[name], read[name]) for name in written)
    ids, mask = model.tokenizer.encode(["a red circle"], 8)
    assert ids[0, :4].tolist() == [WORDS.index(w) for w in ("a", "red", "circle", "</s>")]
    assert mask.sum() == 4
    assert sorted(path.name for path in folder.parent.iterdir()) == ["nano", "nano.tokenizer.json"]


def test_dtype_is_a_policy_of_transformer_and_encoders(folder):
    model = checkpoint.load(folder, "bfloat16")
    kept = ("scale", "modulation", "time_", "head", "norm")  # float32 under every policy
    for part, tree in model.params.items():
        for name, leaf in flatten_dict(tree, sep="/").items():
            full = part == "vae" or any(word in name for word in kept)
            assert leaf.dtype == ("float32" if full else "bfloat16"), (part, name)
    with pytest.raises(ValueError, match="dtype 'float8'"):
        checkpoint.load(folder, "float8")


def test_transposed_views_are_written_as_they_read(tmp_path):
    """safetensors takes the buffer as it lies; a view in another order would come back scrambled."""
    params = random_params(NANO)
    kernel = params["dit"]["head"]["kernel"]
    params["dit"]["head"]["kernel"] = np.asfortranarray(kernel)
    checkpoint.save(tmp_path / "nano", NANO, params, write_tokenizer(tmp_path / "tokenizer.json"))
    assert np.array_equal(checkpoint.load(tmp_path / "nano").params["dit"]["head"]["kernel"], kernel)


def test_params_go_straight_to_the_mesh(folder):
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    params = checkpoint.load(folder, mesh=mesh).params
    plain = checkpoint.load(folder).params
    expected = {part: sharding.shard_params(tree, mesh) for part, tree in plain.items()}
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding and np.array_equal(a, b), params, expected)
    assert all(jax.tree.leaves(same))
    assert not params["dit"]["blocks"]["ffn_in"]["kernel"].sharding.is_fully_replicated


def test_unreachable_folder_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read .*name too long"):
        checkpoint.read_config(tmp_path / ("x" * 300))


def test_config_without_heads(folder):
    config = json.loads((folder / "config.json").read_text())
    config["dit"]["num_heads"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json"):
        checkpoint.read_config(folder)


def test_existing_folder_is_kept(folder):
    with pytest.raises(CheckpointError, match="exists"):
        write_model(folder)


def test_params_of_another_config_are_not_written(tmp_path):
    params = random_params(NANO)
    del params["dit"]["head"]["bias"]
    with pytest.raises(CheckpointError, match="head/bias: missing"):
        checkpoint.save(tmp_path / "bad", NANO, params, tmp_path / "none.json")
    assert not list(tmp_path.iterdir())


def test_files_missing(folder):
    (folder / "clip.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="clip.safetensors, tokenizer.json missing"):
        checkpoint.read_config(folder)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>"])
def test_damaged_weights(folder, content):
    (folder / "vae.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="vae.safetensors: damaged"):
        checkpoint.load(folder)


def test_truncated_weights(folder):
    file = folder / "umt5.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="umt5.safetensors: damaged"):
        checkpoint.load(folder)


def test_every_difference_is_listed(folder):
    file = folder / "dit.safetensors"
    tensors = load_file(file)
    del tensors["head/bias"]
    tensors["extra"] = np.zeros(3, np.float32)
    tensors["head/kernel"] = tensors["head/kernel"][:1]
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    text = str(error.value)
    assert "head/bias: missing, config wants (64,)" in text
    assert "extra: (3,), config wants none" in text
    assert "head/kernel: (1, 64), config wants (48, 64)" in text


def test_broken_config(folder):
    edit_config(folder, vae={"base_dim": 8, "latent_mean": [0.0]})
    with pytest.raises(CheckpointError, match="config.json"):
        checkpoint.read_config(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json"):
        checkpoint.read_config(folder)


def test_import_is_light():
    """Nothing that only some uses need, and no device started."""
    import subprocess
    import sys

    heavy = ("orbax", "tensorstore", "torch", "av", "huggingface_hub", "optax", "matplotlib", "imageio", "ftfy")
    code = (
        "import sys, wanjax, jax._src.xla_bridge as b; "
        f"print([name for name in {heavy} if name in sys.modules]); assert not b._backends; print(len(wanjax.__all__))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, names = out.stdout.splitlines()
    assert found == "[]" and int(names) > 10


def test_parts_that_the_model_has_not_are_not_written(tmp_path):
    params = random_params(NANO) | {"vocoder": {"bias": np.zeros(3, np.float32)}}
    with pytest.raises(CheckpointError, match=r"vocoder/bias: \(3,\), config wants none"):
        checkpoint.save(tmp_path / "bad", NANO, params, write_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="none.json: no such file"):
        checkpoint.save(tmp_path / "bad", NANO, random_params(NANO), tmp_path / "none.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_staged_model_is_written_whole(folder, tmp_path):
    model = checkpoint.load(folder, policy="stage")
    checkpoint.save(tmp_path / "copy", NANO, model.params, folder / "tokenizer.json")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == files
