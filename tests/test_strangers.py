"""Models that are told apart: Fun-InP's, and those that wanjax does not run, named for what they are."""

from pathlib import Path

import numpy as np
import pytest
from foreign import CONFIG, TABLES, imagined, original, plain_params
from reference import listing
from safetensors.numpy import save_file

from convert import __main__ as command
from convert import sources, split, strangers, write
from convert.keymap import invert
from convert.tensors import SourceError
from wanjax.config import PRESETS, DiTConfig


def tensors(part, layout="original"):
    config, params = getattr(CONFIG, part), plain_params()[part]
    return original(part, config, params) if layout == "original" else invert(TABLES[part].diffusers(config), params)


I2V = listing("official_dit_i2v_14b.txt")
T2V = listing("official_dit_t2v_1_3b.txt")
SMALLER = {5120: 1536, 13824: 8960, 30720: 9216}
FUN_1_3B = {name: tuple(SMALLER.get(size, size) for size in shape)
            for name, shape in I2V.items()
            if not name.startswith(tuple(f"blocks.{i}." for i in range(30, 40)))}  # fmt: skip


def part_of(shapes):
    ((family, tensors),), _ = split.models(imagined(shapes))
    return sources._part(family, tensors, {})


@pytest.mark.parametrize("shapes, layers, dim", [(I2V, 40, 5120), (FUN_1_3B, 30, 1536)], ids=["14b", "1.3b"])
@pytest.mark.parametrize("name", ["fun_inp", "i2v"])
def test_fun_inp_is_recognised(shapes, layers, dim, name):
    """The 14B ones have I2V-14B's shapes; --model tells them apart."""
    part = part_of(shapes)
    dit = part.config
    assert (dit.num_layers, dit.dim, dit.in_channels, dit.num_images, dit.image_dim) == (layers, dim, 36, 1, 1280)
    assert dit.num_heads == dim // 128 and dit.image_tokens == 257
    wanted = {"fun_inp": "fun_inp_14b" if dim == 5120 else "fun_inp_1_3b", "i2v": "i2v_14b"}[name]
    if wanted in PRESETS and (dim == 5120 or name == "fun_inp"):
        source = sources.Source(Path("x"), {"dit": part}, None)
        assert write.plan(source, model=wanted).config.name == wanted


def test_fun_inp_on_the_command_line():
    for name in ("fun-inp-1.3b", "fun-inp-14b", "fun_inp_14b"):
        assert command.parser().parse_args(["a", "b", "--model", name]).model == name.replace("-", "_").replace(
            ".", "_"
        )


def with_channels(shapes, channels, out=16):
    (o, _, *patch), (_, d) = shapes["patch_embedding.weight"], shapes["head.head.weight"]
    return shapes | {"patch_embedding.weight": (o, channels, *patch), "head.head.weight": (4 * out, d),
                     "head.head.bias": (4 * out,)}  # fmt: skip


STRANGERS = {
    "Wan2.2 I2V-A14B": with_channels(T2V, 36), "Wan2.2 TI2V-5B": with_channels(T2V, 48, 48),
    "Wan2.2 Fun-5B-InP": with_channels(T2V, 100, 48), "Fun-Control": with_channels(I2V, 48),
    "Fun-Control transformer (ref_conv)": I2V | {"ref_conv.weight": (5120, 16, 2, 2)},
    "Wan2.2 Fun-Control": with_channels(T2V, 52), "Fun-Camera": I2V | {"control_adapter.conv.weight": (1, 1, 1, 1)},
    "VACE": T2V | {"vace_patch_embedding.weight": (1536, 96, 1, 2, 2), "vace_blocks.0.x": (1,)},
    "S2V": T2V | {"casual_audio_encoder.encoder.final_linear.weight": (1, 1)},
    "Animate": I2V | {"face_adapter.fuser_blocks.0.k_norm.weight": (1,), "pose_patch_embedding.weight": (1,)},
    "HuMo": T2V | {"audio_proj.audio_proj_glob_1.layer.bias": (1,)},
    "SCAIL": I2V | {"patch_embedding_pose.weight": (1,)}, "SkyReels": I2V | {"fps_embedding.weight": (1,)},
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_transformers_are_named(name, prefix):
    with pytest.raises(SourceError) as error:
        part_of({prefix + key: shape for key, shape in STRANGERS[name].items()})
    assert name in str(error.value) and strangers.KNOWN in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("shapes, name", [
    ({"encoder.conv1.weight": (160, 12, 3, 3, 3), "conv2.weight": (48, 48, 1, 1, 1),
      "encoder.downsamples.0.downsamples.0.residual.2.weight": (160, 160, 3, 3, 3)}, "VAE of Wan2.2 TI2V-5B"),
    ({"encoder.conv_in.weight": (160, 12, 3, 3, 3), "encoder.down_blocks.0.resnets.0.conv1.weight": (1,)}, "VAE of"),
    ({"blocks.0.self_attn.q.lora_A.weight": (1, 1), "blocks.0.self_attn.q.lora_B.weight": (1, 1)}, "a LoRA; give it"),
    ({"lora_unet_blocks_0_ffn_0.lora_down.weight": (1, 1)}, "a LoRA; give it with --lora"),
    ({"double_blocks.0.img_attn.qkv.weight": (1, 1)}, "another family's transformer"),
    ({"input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (1, 1)}, "another family's transformer or UNet"),
    ({"x": (1,)}, "not a model that Wan2.1 uses"), ({}, "no tensors"),
])  # fmt: skip
def test_other_files_are_named(shapes, name):
    with pytest.raises(SourceError) as error:
        split.models(imagined(shapes))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("names", [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2", "vae")])
def test_folders_of_two_transformers_are_named(tmp_path, names):
    for name in {*names, "vae"}:
        (tmp_path / name).mkdir()
    save_file(tensors("vae", "diffusers"), tmp_path / "vae" / "x.safetensors")
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="a Wan2.2 model of two transformers"):
        sources.find(tmp_path)
    assert set(sources.find(tmp_path, ["vae"]).parts) == {"vae"}


def test_a_stranger_that_is_not_wanted_is_not_in_the_way(tmp_path):
    save_file(tensors("vae"), tmp_path / "vae.safetensors")
    own = tensors("dit") | {"vace_patch_embedding.weight": np.zeros(1, np.float32)}
    save_file(own, tmp_path / "vace.safetensors")
    assert set(sources.find(tmp_path, ["vae"]).parts) == {"vae"}
    with pytest.raises(SourceError, match="a VACE transformer"):
        sources.find(tmp_path)


def test_our_own_models_are_no_strangers():
    for file in ("official_dit_flf2v_14b.txt", "official_dit_i2v_14b.txt", "official_dit_t2v_1_3b.txt",
                 "diffusers_transformer_flf2v_14b.txt", "official_vae.txt", "diffusers_vae.txt", "official_umt5.txt",
                 "diffusers_text_encoder.txt", "official_clip.txt", "diffusers_image_encoder.txt"):  # fmt: skip
        assert strangers.by_name(listing(file)) is None
    for name, make in PRESETS.items():
        assert strangers.by_shape(make().dit) is None, name
    assert strangers.by_shape(DiTConfig(in_channels=16, image_dim=None, num_images=0)) is None
