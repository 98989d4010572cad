"""Foreign weight files of a small model, written without the libraries that users' files come from."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from nano import NANO, random_params, write_tokenizer
from safetensors.numpy import save_file

from convert import clip, dit, umt5, vae
from convert.keymap import invert
from convert.tensors import Tensor, Tensors
from wanjax import checkpoint

TABLES = {"dit": dit, "vae": vae, "umt5": umt5, "clip": clip}
# Sizes as in the published models where shapes do not tell them: heads of 128, 257 vision tokens, 16 CLIP heads.
DIT = dataclasses.replace(NANO.dit, dim=128, num_heads=1, text_length=512)


def original(part, config, params):
    """Tensors in the original layout, with what the published CLIP file also carries."""
    tensors = invert(TABLES[part].original(config), params)
    if part == "clip":
        last = f"visual.transformer.{config.num_layers}."
        tensors |= {name.replace("visual.transformer.0.", last): tensor for name, tensor in tensors.items()
                    if name.startswith("visual.transformer.0.")}  # fmt: skip
        tensors |= {"log_scale": np.float32(1).reshape(1), "textual.norm.weight": np.ones(3, np.float32)}
    return tensors


CONFIG = dataclasses.replace(NANO, dit=DIT, clip=dataclasses.replace(NANO.clip, num_heads=16))
SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"


@functools.cache
def plain_params():
    """What the model is made of; not to be changed."""
    return random_params(CONFIG)


@functools.cache
def plain_shapes():
    return checkpoint.param_shapes(CONFIG)


def write_original(path, config, params):
    tensors = original("dit", config.dit, params["dit"])
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, path / file)
    where = {name: file for file, held in shards.items() for name in held}
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    files = {"vae": "Wan2.1_VAE.pth", "umt5": "models_t5.pth", "clip": "models_clip.pth"}
    for part, file in files.items():
        state = original(part, getattr(config, part), params[part])
        torch.save({name: torch.from_numpy(np.array(tensor)) for name, tensor in state.items()}, path / file)
    (path / "google" / "umt5-xxl").mkdir(parents=True)
    write_tokenizer(path / "google" / "umt5-xxl" / "tokenizer.json")


def imagined(shapes, dtype=np.float32):
    """Tensors of these shapes that cannot be read."""
    named = {name: Tensor(shape, np.dtype(dtype), lambda: 1 / 0) for name, shape in shapes.items()}
    return Tensors((Path("imagined.safetensors"),), named)


def copy_of(folder, target):
    shutil.copytree(folder, target)
    return target
