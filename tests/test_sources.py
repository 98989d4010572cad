"""What a path holds, from files written by the libraries that users' files come from."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from foreign import CONFIG, SHARD, copy_of, imagined, original, plain_params, write_original
from reference import listing, numpy_state
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from convert import families, sources, split, vae
from convert.keymap import convert, invert
from convert.quantised import unscaled
from convert.tensors import SourceError, open_file, open_index
from wanjax import checkpoint
from wanjax.config import preset


@pytest.fixture(scope="module")
def nano():
    return CONFIG, plain_params()


@pytest.fixture(scope="module")
def folder(nano, tmp_path_factory):
    """The original repository's form: sharded safetensors and three torch files."""
    config, params = nano
    path = tmp_path_factory.mktemp("original")
    write_original(path, config, params)
    return path


def test_original_folder(folder, nano):
    config, params = nano
    source = sources.find(folder)
    assert set(source.parts) == {"dit", "vae", "umt5", "clip"}
    assert source.tokenizer == folder / "google" / "umt5-xxl" / "tokenizer.json"
    shapes = checkpoint.param_shapes(config)
    for name, part in source.parts.items():
        assert part.family.layout == "original" and part.config == getattr(config, name), name
        part.check(shapes[name])
        arrays = {key: tensor.read() for key, tensor in part.tensors.named.items()}
        unused = part.family.unused(part.config, arrays)
        read = convert(part.family.rules(part.config), shapes[name], arrays, unused)
        for ours, wanted in zip(*map(leaves, (read, params[name])), strict=True):
            np.testing.assert_array_equal(ours, wanted)


def leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_diffusers_folder(tmp_path, nano):
    """Files by `save_pretrained`, in shards for the transformer; sizes of config.json and tensors agree."""
    config, _ = nano
    d, v, u, c = config.dit, config.vae, config.umt5, config.clip
    WanTransformer3DModel(
        patch_size=d.patch_size, num_attention_heads=d.num_heads, attention_head_dim=d.head_dim, in_channels=36,
        out_channels=16, text_dim=d.text_dim, freq_dim=d.freq_dim, ffn_dim=d.ffn_dim, num_layers=d.num_layers,
        image_dim=d.image_dim, pos_embed_seq_len=2 * d.image_tokens, added_kv_proj_dim=d.dim,
    ).save_pretrained(tmp_path / "transformer", max_shard_size="200KB")  # fmt: skip
    AutoencoderKLWan(**vae.diffusers_config(v) | {"attn_scales": []}).save_pretrained(tmp_path / "vae")
    UMT5EncoderModel(UMT5Config(
        vocab_size=u.vocab_size, d_model=u.dim, d_kv=u.head_dim, d_ff=u.ffn_dim, num_layers=u.num_layers,
        num_heads=u.num_heads,
    )).save_pretrained(tmp_path / "text_encoder")  # fmt: skip
    CLIPVisionModel(CLIPVisionConfig(
        hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.num_layers + 1,
        num_attention_heads=c.num_heads, image_size=c.image_size, patch_size=c.patch_size, hidden_act="gelu",
    )).save_pretrained(tmp_path / "image_encoder")  # fmt: skip
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    source = sources.find(tmp_path)
    shapes = checkpoint.param_shapes(config)
    for name, part in source.parts.items():
        assert part.family.layout == "diffusers" and part.config == getattr(config, name), name
        part.check(shapes[name])
    assert set(sources.find(tmp_path, only=["vae"]).parts) == {"vae"}


PREFIX = "model.diffusion_model."  # of some single files

PUBLISHED = {
    "official_dit_flf2v_14b.txt": ("flf2v_14b", "dit"), "official_dit_i2v_14b.txt": ("i2v_14b", "dit"),
    "official_dit_t2v_1_3b.txt": ("t2v_1_3b", "dit"), "official_umt5.txt": ("flf2v_14b", "umt5"),
    "official_vae.txt": ("flf2v_14b", "vae"), "official_clip.txt": ("flf2v_14b", "clip"),
    "diffusers_transformer_flf2v_14b.txt": ("flf2v_14b", "dit"), "diffusers_text_encoder.txt": ("flf2v_14b", "umt5"),
    "diffusers_vae.txt": ("flf2v_14b", "vae"), "diffusers_image_encoder.txt": ("flf2v_14b", "clip"),
}  # fmt: skip


@pytest.mark.parametrize("file", PUBLISHED)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_published_files_give_the_presets(file, prefix):
    """From names and shapes alone, no config.json: family, layout and every size."""
    name, part = PUBLISHED[file]
    (found,), notes = split.models(imagined({prefix + key: shape for key, shape in listing(file).items()}))
    assert not notes
    family, tensors = found
    assert (family.part, family.layout) == (part, file.split("_")[0].replace("official", "original"))
    assert families.read_config(family, tensors, {}) == getattr(preset(name), part)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn], ids=str)
def test_single_file_of_another_dtype(tmp_path, nano, dtype):
    """ComfyUI's form: every name prefixed, any of its dtypes."""
    config, params = nano
    tensors = {PREFIX + name: torch.from_numpy(np.array(tensor)).to(getattr(torch, np.dtype(dtype).name))
               for name, tensor in original("dit", config.dit, params["dit"]).items()}  # fmt: skip
    save_torch(tensors, tmp_path / "wan.safetensors")
    part = sources.find(tmp_path / "wan.safetensors").parts["dit"]
    assert part.config == config.dit
    for name, tensor in part.tensors.named.items():
        wanted = tensors[PREFIX + name].float().numpy()
        np.testing.assert_array_equal(tensor.read().astype(np.float32), wanted)


@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_scaled_8_bit_weights_are_multiplied_out(tmp_path, names):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().max() / 448
    eight = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {
        "a.weight": eight,
        "a.scale_weight": scale,
        "a.scale_input": scale.clone(),
        "a.bias": weight[:, 0].clone(),
    }
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_torch(tensors, tmp_path / "x.safetensors")
    out = unscaled(open_file(tmp_path / "x.safetensors"))
    assert set(out.named) == {"a.weight", "a.bias"}
    np.testing.assert_array_equal(out.named["a.weight"].read(), (eight.float() * scale).numpy())
    bad = imagined({"a.scale_weight": ()})
    with pytest.raises(SourceError, match="is not the factor of a weight"):
        unscaled(bad)


def other_numbers(source, target):
    """A model of the same names and shapes that is not the same."""
    torch.save({name: tensor + 0.01 for name, tensor in torch.load(source).items()}, target)


def spoil(path, how):
    """Damages a copy of the original folder in one way."""
    shard, index = path / SHARD, path / "diffusion_pytorch_model.safetensors.index.json"
    data = shard.read_bytes()
    actions = {
        "missing shard": shard.unlink,
        "truncated": lambda: shard.write_bytes(data[:-7]),
        "trailing": lambda: shard.write_bytes(data + b"garbage"),
        "pointer": lambda: shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "page": lambda: shard.write_text("<!DOCTYPE html><html></html>"),
        "empty": lambda: shard.write_bytes(b""),
        "index": lambda: index.write_text("{"),
        "no index": index.unlink,
        "outside": lambda: index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}})),
        "twice": lambda: other_numbers(path / "Wan2.1_VAE.pth", path / "tuned.pth"),
        "stranger": lambda: save_file({"x": np.zeros(2, np.float32)}, path / "other.safetensors"),
        "config": lambda: (path / "config.json").write_text(json.dumps({"num_layers": 40, "ffn_dim": 13824})),
        "torch": lambda: (path / "Wan2.1_VAE.pth").write_bytes((path / "Wan2.1_VAE.pth").read_bytes()[:2000]),
    }
    actions[how]()


@pytest.mark.parametrize("how, message", [
    ("missing shard", f"shard {SHARD} missing; download it too"),
    ("truncated", f"{SHARD}: damaged or truncated safetensors file"),
    ("trailing", f"{SHARD}: damaged or truncated safetensors file"),
    ("pointer", f"{SHARD}: a Git LFS pointer"),
    ("page", f"{SHARD}: a web page, not weights"),
    ("empty", f"{SHARD}: empty"),
    ("index", "index.json: not a readable index"),
    ("no index", f"{SHARD} are shards without their index.json"),
    ("outside", "names '../secret.safetensors', which is not a file beside it"),
    ("twice", "Wan2.1_VAE.pth, tuned.pth are each a vae; choose one with --vae FILE"),
    ("stranger", "other.safetensors: not a model that Wan2.1 uses"),
    ("config", "config.json says num_layers 40, the tensors 2; ffn_dim 13824, the tensors 96"),
    ("torch", "Wan2.1_VAE.pth: damaged or truncated"),
])  # fmt: skip
def test_damaged_sources_are_named(folder, tmp_path, how, message):
    path = copy_of(folder, tmp_path / "copy")
    spoil(path, how)
    with pytest.raises(SourceError) as error:
        sources.find(path)
    assert message in str(error.value)


def test_missing_extra_and_wrong_tensors_are_all_listed(nano):
    config, params = nano
    shapes = {name: tensor.shape for name, tensor in original("dit", config.dit, params["dit"]).items()}
    del shapes["blocks.1.ffn.0.bias"], shapes["head.modulation"]
    shapes |= {"blocks.0.cross_attn.q.bias": (7,), "blocks.0.lora": (1,)}
    tensors = imagined(shapes)
    ((family, tensors),), _ = split.models(tensors)
    part = sources.Part(family, families.read_config(family, tensors, {}), tensors)
    with pytest.raises(SourceError) as error:
        part.check(checkpoint.param_shapes(config)["dit"])
    text = str(error.value)
    assert "missing (2):\n  blocks.1.ffn.0.bias\n  head.modulation" in text and "extra (1):\n  blocks.0.lora" in text
    assert "blocks.0.cross_attn.q.bias: file has [7], model wants [128]" in text


def test_a_model_in_anothers_place_is_named(tmp_path, nano):
    config, params = nano
    (tmp_path / "transformer").mkdir()
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(original("vae", config.vae, params["vae"]), file)
    with pytest.raises(SourceError, match=r"transformer: holds a video autoencoder \(VAE\), not the dit"):
        sources.find(tmp_path)


@pytest.mark.parametrize("name, text", [
    ("flf2v_14b", "first-and-last-frame (FLF2V) transformer of 40 layers, width 5120"),
    ("i2v_14b", "image-to-video (I2V, no emb_pos) transformer of 40 layers, width 5120"),
    ("t2v_1_3b", "text-to-video (T2V) transformer of 30 layers, width 1536"),
])  # fmt: skip
def test_transformers_are_told_apart(name, text):
    assert families.describe(preset(name).dit) == text


@pytest.mark.parametrize("what", ["nowhere", "empty folder", "text file"])
def test_no_source(tmp_path, what):
    path = tmp_path / "x"
    if what == "empty folder":
        path.mkdir()
    if what == "text file":
        path.write_text("hello, this is no model")
    messages = {"nowhere": "no such file or folder", "empty folder": "no model files", "text file": "damaged"}
    with pytest.raises(SourceError, match=messages[what]):
        sources.find(path)


def test_a_file_alone_is_read_with_its_config(tmp_path, nano):
    config, params = nano
    (tmp_path / "vae").mkdir()
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(invert(vae.diffusers(config.vae), params["vae"]), file)
    own = dataclasses.replace(config.vae, latent_mean=tuple(0.5 * i for i in range(16)))
    file.with_name("config.json").write_text(json.dumps(vae.diffusers_config(own)))
    assert sources.find(file).parts["vae"].config == own
    (tmp_path / "vae" / "other.pth").touch()
    assert sources.find(file).parts["vae"].config == config.vae


def test_index_that_lies(folder, tmp_path):
    path = copy_of(folder, tmp_path / "copy")
    index = path / "diffusion_pytorch_model.safetensors.index.json"
    where = json.loads(index.read_text())
    del where["weight_map"]["head.modulation"]
    index.write_text(json.dumps(where))
    with pytest.raises(SourceError, match=r"does not hold what the index says \(head.modulation\)"):
        open_index(index)


def test_numpy_state_and_torch_file_agree(tmp_path):
    module = torch.nn.Linear(3, 4)
    torch.save(module.state_dict(), tmp_path / "x.pth")
    tensors = open_file(tmp_path / "x.pth")
    assert tensors.size == 4 * 16
    for name, wanted in numpy_state(module).items():
        np.testing.assert_array_equal(tensors.named[name].read(), wanted)
