"""Configurations: presets, JSON round trip, and the message of every refusal."""

import dataclasses
import json
import re

import pytest
from jax import lax

from wanjax.config import PRESETS, CLIPConfig, DiTConfig, UMT5Config, VAEConfig, from_json, preset, to_json
from wanjax.precision import BFLOAT16, FLOAT32, Precision


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = preset(name)
    again = from_json(to_json(config))
    assert again == config and hash(again) == hash(config)
    half = config.with_precision(BFLOAT16)
    assert from_json(to_json(half)) == half != config


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = preset(name)
    assert config.name == name
    assert all(side % config.size_multiple == 0 for side in config.sampling.size)
    assert (config.sampling.frames - 1) % config.vae.temporal_stride == 0


def test_published_sizes():
    config = preset("flf2v_14b")
    assert (config.dit.head_dim, config.clip.num_tokens, config.size_multiple) == (128, 257, 16)
    assert (config.vae.spatial_stride, config.vae.temporal_stride) == (8, 4)
    assert [config.vae.latent_frames(frames) for frames in (1, 5, 81)] == [1, 2, 21]
    assert config.dit.condition_channels == preset("i2v_14b").dit.condition_channels == 20
    assert preset("t2v_1_3b").dit.condition_channels == 0


def test_fun_inp():
    """Image-to-video shapes: one image, mask and latent of both keyframes; only the small one's sizes differ."""
    small, large = preset("fun_inp_1_3b"), preset("fun_inp_14b")
    assert large.dit == preset("i2v_14b").dit
    assert (small.dit.dim, small.dit.num_layers, small.dit.num_heads, small.dit.ffn_dim) == (1536, 30, 12, 8960)
    for config in (small, large):
        assert (config.dit.num_images, config.dit.image_dim, config.dit.in_channels) == (1, 1280, 36)
        assert (config.clip, config.umt5, config.vae) == (large.clip, large.umt5, large.vae)
        assert config.sampling.negative_prompt.startswith("色调艳丽")


PLATFORMS = {"cpu": ("xla", "pairs", "taps", "float32"), "gpu": ("cudnn", "pairs", "taps", "compute"),
             "cuda": ("cudnn", "pairs", "taps", "compute"), "rocm": ("xla", "pairs", "taps", "compute"),
             "tpu": ("splash", "product", "conv3d", "compute")}  # fmt: skip


@pytest.mark.parametrize("platform, names", PLATFORMS.items(), ids=list(PLATFORMS))
@pytest.mark.parametrize("name", PRESETS)
def test_for_platform(name, platform, names):
    config = preset(name)
    assert config.dit.attention == config.vae.conv3d == "auto"
    found = config.for_platform(platform)
    assert (found.dit.attention, found.dit.rotation, found.vae.conv3d) == names[:3]
    parts = [part for part in (found.dit, found.vae, found.umt5, found.clip) if part is not None]
    assert {part.precision.product for part in parts} == {names[3]}
    assert "auto" not in [value for part in parts for value in vars(part).values()]
    assert found.for_platform("tpu") == found, "what is chosen stays"
    back = json.loads(to_json(found))
    back["dit"]["attention"] = back["dit"]["rotation"] = back["vae"]["conv3d"] = "auto"
    for part in back.values():
        if isinstance(part, dict) and "precision" in part:
            part["precision"]["product"] = "auto"
    assert back == json.loads(to_json(config)), "nothing else changes"


def test_choices_stay():
    config = changed("dit", attention="chunked").for_platform("gpu")
    assert (config.dit.attention, config.vae.conv3d) == ("chunked", "taps")
    with pytest.raises(ValueError, match="^platform 'npu': choose one of cpu, gpu, cuda, rocm, tpu$"):
        config.for_platform("npu")


def test_files_of_older_versions_still_read():
    """They lack the fields that came later, which then have their defaults."""
    fields = json.loads(to_json(preset("tiny")))
    del fields["dit"]["attention"], fields["vae"]["conv3d"]
    for part in ("dit", "vae", "umt5", "clip"):
        del fields[part]["precision"]["product"]
    assert from_json(json.dumps(fields)) == preset("tiny")
    fields["sampling"]["shift"] = 3  # a whole number is a number
    assert from_json(json.dumps(fields)) == preset("tiny")


def test_with_precision():
    config = preset("flf2v_14b").with_precision(BFLOAT16)
    assert config.dit.precision == config.umt5.precision == config.clip.precision == BFLOAT16
    assert config.vae.precision == FLOAT32
    mixed = preset("flf2v_14b").with_precision(BFLOAT16, encoders=FLOAT32)
    assert (mixed.dit.precision, mixed.umt5.precision) == (BFLOAT16, FLOAT32)
    assert preset("t2v_1_3b").with_precision(BFLOAT16).clip is None


def test_float32_means_float32():
    assert FLOAT32.matmul == lax.Precision.HIGHEST and BFLOAT16.matmul is None
    assert BFLOAT16.residual == BFLOAT16.softmax == "float32"


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").dit.dim = 7


REFUSED = [
    (lambda: Precision(product="bfloat16"), "precision: product='bfloat16' is not one of auto, float32, compute"),
    (lambda: VAEConfig(tiles=0), "vae: tiles 0: give a whole number from 1"),
    (lambda: VAEConfig(conv3d="fft"), "vae: conv3d 'fft' is not auto, conv3d or taps"),
    (lambda: Precision(param="int8"), "precision: param='int8' is not one of float32, bfloat16, float16"),
    (lambda: DiTConfig(dim=100, num_heads=3), "dit: dim 100 is not a multiple of num_heads 3"),
    (lambda: DiTConfig(dim=30, num_heads=6), "dit: head width 5 is odd; rotary pairs need it even"),
    (lambda: DiTConfig(num_images=3), "dit: num_images 3 is not 0, 1 or 2"),
    (lambda: DiTConfig(num_images=0), "dit: image_dim and num_images disagree: give both or neither"),
    (lambda: DiTConfig(image_dim=None), "dit: image_dim and num_images disagree: give both or neither"),
    (
        lambda: VAEConfig(dim_mult=(1, 2)),
        "vae: 2 multipliers need 1 temporal_downsample flags, got 3",
    ),
    (lambda: VAEConfig(latent_channels=8), "vae: latent_mean and latent_std need 8 numbers each"),
    (lambda: UMT5Config(num_buckets=30), "umt5: num_buckets 30 is not a multiple of 4"),
    (lambda: CLIPConfig(image_size=225), "clip: image_size 225 is not a multiple of 14"),
    (
        lambda: preset("wan"),
        "unknown preset 'wan': choose one of tiny, flf2v_14b, i2v_14b, t2v_1_3b, fun_inp_1_3b, fun_inp_14b",
    ),
]


@pytest.mark.parametrize("build, message", REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_refusals(build, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


def changed(part: str, **changes):
    config = preset("tiny")
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)})


INCONSISTENT = [
    (lambda: changed("dit", text_dim=64), "tiny: dit.text_dim 64 is not umt5.dim 128"),
    (lambda: changed("dit", out_channels=8), "tiny: dit.out_channels is not vae.latent_channels"),
    (
        lambda: dataclasses.replace(preset("tiny"), clip=None),
        "tiny: a clip config is needed if and only if the dit takes images",
    ),
    (lambda: changed("dit", image_tokens=9), "tiny: clip gives 17 tokens of 128, dit takes 9 of 128"),
    (lambda: changed("dit", in_channels=40), "tiny: dit.in_channels must be 36"),
]


@pytest.mark.parametrize("build, message", INCONSISTENT, ids=[message for _, message in INCONSISTENT])
def test_inconsistent_models(build, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


def edited(edit):
    fields = json.loads(to_json(preset("tiny")))
    edit(fields)
    return json.dumps(fields)


UNREADABLE = {
    "not JSON": ("{", "model configuration: "),
    "empty": ("", "model configuration: "),
    "a list": ("[]", "model configuration: "),
    "unknown field": (edited(lambda c: c["dit"].update(heads=3)), "model configuration: .*heads"),
    "missing part": (edited(lambda c: c.pop("dit")), "model configuration: .*dit"),
    "a part that is a number": (edited(lambda c: c.update(vae=3)), "model configuration: "),
    "text for a number": (edited(lambda c: c["dit"].update(dim="wide")), "model configuration: "),
    "a number for text": (edited(lambda c: c["sampling"].update(solver=3)), "model configuration: .*solver"),
    "a truth for a number": (edited(lambda c: c["dit"].update(num_layers=True)), "model configuration: .*num_layers"),
    "a share of a layer": (edited(lambda c: c["dit"].update(num_layers=2.5)), "model configuration: .*num_layers"),
    "a number for a truth": (edited(lambda c: c["dit"].update(remat=1)), "model configuration: .*remat"),
    "two of three": (edited(lambda c: c["dit"].update(patch_size=[1, 2])), "model configuration: .*patch_size"),
    "text among numbers": (edited(lambda c: c["vae"].update(dim_mult=[1, "2", 4])), "model configuration: .*dim_mult"),
    "not finite": (
        edited(lambda c: c["sampling"].update(shift=float("inf"))),
        "model configuration: shift is inf",
    ),
    "not a number": (edited(lambda c: c["vae"].update(latent_std=[float("nan")] * 16)), "latent_std is nan"),
    "inconsistent": (edited(lambda c: c["dit"].update(dim=190)), "dit: dim 190 is not a multiple of"),
}


@pytest.mark.parametrize("text, message", UNREADABLE.values(), ids=list(UNREADABLE))
def test_unreadable_json(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_json(text)
    assert "\n" not in str(caught.value)
