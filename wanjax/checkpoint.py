"""A wanjax model folder: `config.json`, `tokenizer.json`, and the parameters of each model in one of two forms.

Small models are one safetensors file each, with parameter paths as names ("blocks/ffn_in/kernel"); what
`python -m convert` writes is an Orbax checkpoint each and a manifest (`wanjax.store`). Everything is checked before it
is used.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from wanjax import config as configs
from wanjax import rope, sharding, store, vae
from wanjax.clip import CLIPVision
from wanjax.config import BFLOAT16, FLOAT32, ModelConfig
from wanjax.dit import WanDiT
from wanjax.tokenizer import Tokenizer
from wanjax.types import Conditions
from wanjax.umt5 import UMT5Encoder

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


class CheckpointError(ValueError):
    """A model folder that cannot be used; the message is one line (or one list) naming what and the mend."""


@dataclass(frozen=True)
class Model:
    """A model ready to run.

    Attributes:
      config: sizes and precision.
      params: {"dit", "vae", "umt5", "clip"} -> nested dict of arrays ("clip" absent for text-to-video).
      tokenizer: of the text encoder.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Tokenizer


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """Shape and dtype of every parameter, by model, as `jax.ShapeDtypeStruct`s; allocates nothing."""
    key, d = jax.random.key(0), config.dit
    grid = (1, *(2 * size for size in d.patch_size))

    def dit(key: jax.Array) -> Any:
        image = np.zeros((1, d.image_tokens, d.image_dim or 0), np.float32)
        conditions = Conditions(
            np.zeros((1, d.text_length, d.text_dim), np.float32),
            image if d.num_images >= 1 else None,
            image if d.num_images == 2 else None,
            np.zeros((*grid, d.condition_channels), np.float32) if d.condition_channels else None,
        )
        table = rope.table(tuple(n // s for n, s in zip(grid[1:], d.patch_size, strict=True)), d.head_dim)
        latents = np.zeros((*grid, d.out_channels), np.float32)
        return WanDiT(d).init(key, latents, np.zeros(1, np.float32), conditions, table)["params"]

    def umt5(key: jax.Array) -> Any:
        ids = np.zeros((1, 4), np.int32)
        return UMT5Encoder(config.umt5).init(key, ids, ids)["params"]

    shapes = {
        "dit": jax.eval_shape(dit, key),
        "vae": jax.eval_shape(lambda key: vae.init(config.vae, key), key),
        "umt5": jax.eval_shape(umt5, key),
    }
    if config.clip is not None:
        pixels = np.zeros((1, config.clip.image_size, config.clip.image_size, 3), np.float32)
        shapes["clip"] = jax.eval_shape(lambda key: CLIPVision(config.clip).init(key, pixels)["params"], key)
    return shapes


def save(folder: str | os.PathLike[str], config: ModelConfig, params: dict[str, Any], tokenizer: Path) -> None:
    """Writes a model folder beside its final place and renames it at the end.

    Args:
      folder: must not exist.
      params: as in `Model`; written in the dtypes they have.
      tokenizer: a `tokenizer.json` to copy.

    Raises:
      CheckpointError: the folder exists, or params are not the config's.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; choose another name or remove it")
    for part, expected in param_shapes(config).items():
        _compare(folder / part, expected, params.get(part, {}))
    with tempfile.TemporaryDirectory(prefix=".wanjax-", dir=folder.parent) as hidden:
        new = Path(hidden) / "new"
        new.mkdir()
        for part, tree in params.items():
            # safetensors writes the buffer as it lies: a transposed view would be read back scrambled.
            flat = {name: np.ascontiguousarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
            save_file(flat, new / f"{part}.safetensors")
        (new / CONFIG).write_text(configs.to_json(config) + "\n", encoding="utf-8")
        shutil.copyfile(tokenizer, new / TOKENIZER)
        os.replace(new, folder)


def bundled() -> Path:
    """The folder of the tiny model that comes with the package."""
    return Path(str(resources.files("wanjax") / "assets" / "tiny"))


def is_folder(path: Path) -> bool:
    """Whether a folder is a wanjax model folder, by its config.json; other libraries have files of that name too."""
    try:
        fields = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and {"dit", "vae", "umt5", "sampling"} <= fields.keys()


def read_config(model: str | os.PathLike[str], whole: bool = True) -> tuple[Path, ModelConfig]:
    """The folder and configuration of "tiny" or of a path, if `whole` with all its files present; reads no weights.

    Raises:
      CheckpointError: no such model, or not a model folder.
    """
    folder = bundled() if str(model) == "tiny" else Path(model)
    try:
        return _read_config(folder, str(model), whole)
    except OSError as error:  # no permission, a name too long, a broken disk
        raise CheckpointError(f"model {str(model)!r}: cannot be read ({error.strerror}); check the path") from error


def _read_config(folder: Path, model: str, whole: bool) -> tuple[Path, ModelConfig]:
    if not folder.is_dir():
        raise CheckpointError(f"model {model!r}: no such folder; give 'tiny' or a wanjax model folder")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"model {folder}: no {CONFIG} in it; convert the weights to a wanjax model folder")
    try:
        config = configs.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, ArithmeticError, RecursionError) as error:  # such as no heads to divide the width by
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    parts = ["dit", "vae", "umt5"] + (["clip"] if config.clip else [])
    stored = (folder / store.MANIFEST).is_file()
    names = [*(part if stored else f"{part}.safetensors" for part in parts), TOKENIZER]
    lacking = [name for name in names if not (folder / name).exists()]
    if lacking and whole:
        raise CheckpointError(f"model {folder}: {', '.join(lacking)} missing; convert the weights again")
    return folder, config


def load(
    model: str | os.PathLike[str] = "tiny",
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    fast: bool = True,
) -> Model:
    """Loads a model. Of a converted one each host reads its shards alone; of a safetensors file one tensor at a time.

    Args:
      model: "tiny" for the bundled one, or a model folder.
      dtype: "float32" or "bfloat16" policy for transformer and encoders; None takes the folder's own.
        The VAE stays as it is stored in the config.
      mesh: where the params are put, by `rules`; None puts them on the default device.
      fast: of a converted model, trust the checksums of what is read. False reads everything once more and compares
        it with the manifest.

    Raises:
      CheckpointError: no such folder, damaged files, or tensors that are not the config's.
    """
    folder, config = read_config(model)
    if dtype is not None:
        config = config.with_precision(policy(dtype))
    tokenizer = Tokenizer(folder / TOKENIZER)
    if tokenizer.vocab_size > config.umt5.vocab_size:
        raise CheckpointError(
            f"{folder / TOKENIZER}: {tokenizer.vocab_size} tokens, the text encoder has {config.umt5.vocab_size}"
        )
    shapes = param_shapes(config)
    if not (folder / store.MANIFEST).is_file():
        params = {part: _read(folder / f"{part}.safetensors", tree, mesh, rules) for part, tree in shapes.items()}
        return Model(config, params, tokenizer)
    try:
        manifest = store.read_manifest(folder)
        for part, tree in shapes.items():
            store.check(folder, part, tree, manifest)
        if not fast:
            store.verify(folder, manifest.arrays)
        params = {part: store.restore(folder, part, tree, mesh, rules) for part, tree in shapes.items()}
    except store.StoreError as error:
        raise CheckpointError(str(error)) from error
    return Model(config, params, tokenizer)


def policy(dtype: str) -> configs.Precision:
    """The precision policy of a name. ValueError for another than float32 and bfloat16."""
    policies = {"float32": FLOAT32, "bfloat16": BFLOAT16}
    if dtype not in policies:
        raise ValueError(f"dtype {dtype!r}: choose {' or '.join(policies)}")
    return policies[dtype]


def _read(file: Path, expected: Any, mesh: Mesh | None, rules: sharding.Rules) -> Any:
    """Params of one file on the device or mesh, in the dtypes of `expected`; shapes are compared first."""
    leaves = flatten_dict(expected, sep="/")
    specs = flatten_dict(sharding.specs(expected, rules, mesh), sep="/")
    places = {name: mesh and NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {}
    try:
        with safe_open(file, framework="np") as tensors:
            names = list(tensors.keys())
            _compare_shapes(file, expected, {name: tuple(tensors.get_slice(name).get_shape()) for name in names})
            for name, leaf in leaves.items():
                array = tensors.get_tensor(name).astype(leaf.dtype, copy=False)
                params[name] = jax.device_put(array, places[name])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file ({error}); get it again") from error
    return unflatten_dict(params, sep="/")


def _compare(file: Path, expected: Any, params: Any) -> None:
    """As `_compare_shapes`, for a tree of arrays."""
    found = {name: tuple(leaf.shape) for name, leaf in flatten_dict(params, sep="/").items()}
    _compare_shapes(file, expected, found)


def _compare_shapes(file: Path, expected: Any, found: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError listing every parameter that is missing, extra or of another shape."""
    wanted = {name: tuple(leaf.shape) for name, leaf in flatten_dict(expected, sep="/").items()}
    differences = [
        f"{name}: {found.get(name, 'missing')}, config wants {wanted.get(name, 'none')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if differences:
        raise CheckpointError(f"{file}: not the model of config.json\n  " + "\n  ".join(differences))
