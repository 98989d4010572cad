"""Every model in every layout, from files to outputs, against the torch model that the files were written from."""

import json
import shutil

import jax
import numpy as np
import pytest
import test_clip
import test_dit
import test_umt5
import test_vae
import torch
from reference import relative_error
from safetensors.numpy import load_file, save_file

import convert
from convert import clip, dit, umt5, vae
from convert.keymap import invert
from wanjax import vae as vae_model
from wanjax.dit import WanDiT

TABLES = {"dit": dit, "vae": vae, "umt5": umt5, "clip": clip}
PREFIX = "model.diffusion_model."
FOLDERS = {"dit": "transformer", "vae": "vae", "umt5": "text_encoder", "clip": "image_encoder"}
CLIP = test_clip.small(32, 8)
LIMITS = {"dit": 1e-5, "vae": 1e-4, "umt5": 1e-5, "clip": 1e-5}


def model_of(part):
    """A torch model with random weights, and its output for fixed inputs."""
    if part == "dit":
        model = test_dit.reference_model(test_dit.FLF2V)
        return model, test_dit.run_reference(model, *test_dit.make_inputs(test_dit.FLF2V))
    if part == "vae":
        return test_vae.reference("tiny"), test_vae.theirs("tiny", "decode", 5)
    if part == "umt5":
        model = test_umt5.reference(test_umt5.CONFIG, 1)
        ids, mask = test_umt5.inputs(9)
        return model, test_umt5.theirs(model, ids, mask)[mask.astype(bool)]
    model = test_clip.reference(CLIP, 3)
    return model, test_clip.theirs(model, test_clip.images(CLIP))


def output_of(part, config, params):
    """Ours for the same inputs."""
    if part == "dit":
        return jax.jit(WanDiT(config).apply)({"params": params}, *test_dit.make_inputs(config))
    if part == "vae":
        return jax.jit(lambda p, x: vae_model.decode(config, p, x))(params, test_vae.example("tiny", "decode", 5))
    if part == "umt5":
        ids, mask = test_umt5.inputs(9)
        return test_umt5.ours(config, params, ids, mask)[mask.astype(bool)]
    return test_clip.ours(config, params, test_clip.images(CLIP))


def write_diffusers(part, model, folder):
    model.save_pretrained(folder / FOLDERS[part], max_shard_size="200KB")


def write_old_names(part, model, folder):
    """As transformers 4 wrote the vision tower: every name behind `vision_model.`."""
    model.save_pretrained(folder / FOLDERS[part])
    file = folder / FOLDERS[part] / "model.safetensors"
    save_file({f"vision_model.{name.removeprefix('vision_model.')}": x for name, x in load_file(file).items()}, file)


def original_tensors(part, model, folder):
    model.save_pretrained(folder / "theirs" / FOLDERS[part])
    config, params = convert.load(folder / "theirs", "f32", only=[part])
    tensors = invert(TABLES[part].original(getattr(config, part)), params[part])
    if part == "clip":  # the published file goes on to the last block, which is not read
        last = CLIP.num_layers
        tensors |= {name.replace(".0.", f".{last}.", 1): x for name, x in tensors.items() if "transformer.0." in name}
    return tensors


def write_original(part, model, folder):
    tensors = original_tensors(part, model, folder)
    if part == "dit":
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    else:
        torch.save({name: torch.from_numpy(x.copy()) for name, x in tensors.items()}, folder / f"{part}.pth")


def write_single_file(part, model, folder):
    tensors = original_tensors(part, model, folder)
    save_file({PREFIX + name: x for name, x in tensors.items()}, folder / "single.safetensors")


def config_json(part, folder):
    """What the original folder's config.json tells beyond shapes, for sizes that are not the published ones."""
    told = {"dit": {"num_heads": test_dit.FLF2V.num_heads}}.get(part)
    if told:
        (folder / "config.json").write_text(json.dumps(told))


CASES = [(part, write_diffusers) for part in TABLES] + [("clip", write_old_names)]
CASES += [(part, write_original) for part in TABLES] + [("dit", write_single_file)]


@pytest.mark.parametrize("part, written", CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_outputs(tmp_path, part, written, monkeypatch):
    model, wanted = model_of(part)
    # The small reference's sizes that no shape tells, and an original file has no place to tell.
    for name, own in (("CLIPConfig", CLIP), ("UMT5Config", test_umt5.CONFIG)):
        for field in ("num_heads", "max_distance"):
            if hasattr(own, field):
                monkeypatch.setattr(f"wanjax.config.{name}.{field}", getattr(own, field), raising=False)
    (tmp_path / "source").mkdir()
    written(part, model, tmp_path / "source")
    config_json(part, tmp_path / "source")
    config, params = convert.load(tmp_path / "source", "f32", only=[part])
    assert relative_error(output_of(part, getattr(config, part), params[part]), wanted) <= LIMITS[part]


def test_limits_notice_a_swap(tmp_path):
    """The comparison above can fail: halves of emb_pos swapped in an original file."""
    model, wanted = model_of("dit")
    write_original("dit", model, tmp_path)
    config_json("dit", tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    position = tensors["img_emb.emb_pos"]
    tensors["img_emb.emb_pos"] = np.ascontiguousarray(np.roll(position, position.shape[1] // 2, 1))
    save_file(tensors, file)
    shutil.rmtree(tmp_path / "theirs")
    config, params = convert.load(tmp_path, "f32", only=["dit"])
    assert relative_error(output_of("dit", config.dit, params["dit"]), wanted) > 1e-3
