"""A complete model folder, smaller than tiny and with random weights: for tests of everything around it."""

import json
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from wanjax import checkpoint, manifest, store
from wanjax.config import (
    CLIPConfig,
    DiTConfig,
    ModelConfig,
    SamplingDefaults,
    UMT5Config,
    VAEConfig,
    to_json,
)

CLIP = CLIPConfig(num_layers=1, dim=32, num_heads=2, ffn_dim=64, image_size=16, patch_size=8)
UMT5 = UMT5Config(num_layers=1, dim=32, num_heads=2, head_dim=16, ffn_dim=64, vocab_size=64)
DIT = DiTConfig(
    num_layers=2, dim=48, num_heads=2, ffn_dim=96, text_dim=32, text_length=8, freq_dim=32,
    image_dim=32, image_tokens=CLIP.num_tokens,
)  # fmt: skip
VAE = VAEConfig(base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True))
SAMPLING = SamplingDefaults(frames=5, size=(16, 24), steps=3, guidance=2.0, shift=3.0, fps=8, negative_prompt="")
NANO = ModelConfig("nano", DIT, VAE, UMT5, CLIP, SAMPLING)

WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    "a",
    "red",
    "blue",
    "circle",
    "square",
    "moves",
    "left",
    "right",
    "up",
    "down",
    "over",
    "under",
]


def write_tokenizer(path: Path) -> Path:
    """A word-level tokenizer.json."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(path))
    return path


def random_params(config: ModelConfig, seed: int = 0):
    """Seeded weights for every parameter: norms near one, matrices variance-preserving, biases small."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        noise = rng.normal(size=shape.shape)
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name in ("scale", "gamma"):
            noise = 1 + 0.1 * noise
        elif name == "kernel":
            stacked = jax.tree_util.keystr(path[:1], simple=True) == "blocks"
            noise = noise / np.sqrt(np.prod(noise.shape[1 if stacked else 0 : -1]))
        else:
            noise = 0.1 * noise
        return noise.astype(shape.dtype)

    shapes = checkpoint.param_shapes(config)
    return {part: jax.tree_util.tree_map_with_path(leaf, tree) for part, tree in shapes.items()}


def write_model(folder: Path, config: ModelConfig = NANO, seed: int = 0) -> Path:
    """A model folder with random weights, as `--model PATH` takes it."""
    tokenizer = write_tokenizer(folder.parent / f"{folder.name}.tokenizer.json")
    checkpoint.save(folder, config, random_params(config, seed), tokenizer)
    return folder


def write_place(folder: Path, names: str = "abc") -> Path:
    """A folder with a model, "nano", and a keyframe of its size for each name, such as "a.png"."""
    write_model(folder / "nano")
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def write_orbax(folder):
    """A folder in the form of `python -m convert`, without Orbax's own files, which nobody here reads."""
    folder.mkdir()
    entries = {}
    for part, tree in random_params(NANO).items():
        for path, leaf in flatten_dict(tree, sep="/").items():
            name = f"{part}/{path}"
            array = store.create(store.place(folder, name), leaf.shape, leaf.dtype, path.startswith("blocks/"))
            array.write(leaf).result()
            entries[name] = manifest.entry_of(leaf)
    (folder / "config.json").write_text(to_json(NANO))
    write_tokenizer(folder / "tokenizer.json")
    (folder / "manifest.json").write_text(store.Manifest(entries, {}, "test", "keep").dumps())
    checkpoint.sign(folder)
    return folder


def edit_config(folder: Path, **changes) -> None:
    """Replaces top-level fields of a written config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
