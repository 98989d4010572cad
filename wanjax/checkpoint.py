"""A wanjax model folder: `config.json`, `tokenizer.json`, a manifest, and the parameters in one of two forms.

What `python -m convert` writes is an Orbax checkpoint for each model, what `save` writes is a safetensors file for each
(`wanjax.store` knows both). What can be wrong and be seen without reading the weights is found by `folder.open_folder`;
the weights are compared with their digests as they are read.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from safetensors.numpy import save_file

from wanjax import compare, hosts, manifest, sharding, store, streaming, writing
from wanjax.config import ModelConfig, to_json
from wanjax.folder import CONFIG, TOKENIZER, Folder, bundled, config_of, is_folder, open_folder, read_config
from wanjax.manifest import MANIFEST, SAFETENSORS, CheckpointError, Manifest
from wanjax.precision import BFLOAT16, FLOAT32, VAE_BFLOAT16
from wanjax.residency import POLICIES, Model, Parts
from wanjax.settings import one_of, refuse
from wanjax.shapes import param_shapes

__all__ = ["CONFIG", "TOKENIZER", "CheckpointError", "Folder", "Model", "bundled", "is_folder", "load", "open_folder",
           "param_shapes", "read_config", "save", "sign", "with_dtype",
           "with_weights"]  # fmt: skip

WEIGHTS = MappingProxyType({"bf16": None, "int8": "int8", "fp8": "float8_e4m3fn"})
"""How the transformer's kernels may be asked for, and what `Precision.kernel` is then."""


def load(
    model: str | os.PathLike[str] | Folder = "tiny",
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    fast: bool = False,
    policy: str = "keep",
    weights: str | None = None,
) -> Model:
    """Loads a model, an array at a time, each compared with its digest beside the reading of the next.

    Args:
      model: "tiny" for the bundled one, a model folder, or one that `open_folder` has checked.
      dtype: "float32" or "bfloat16" policy, see `with_dtype`; None takes the folder's own.
      mesh: where the params are put, by `rules`; None puts them on the default device.
      fast: leave the digests be, see `store.restore`.
      policy: "keep" reads all parts now and keeps them. "stage" reads a part when it is asked for and frees the
        others, so that memory holds one at a time; damaged numbers are then found as late. "stream" does too, and of
        the transformer holds one or two layers (`wanjax.streaming`); for one device.
      weights: "bf16", "int8" or "fp8", see `with_weights`; None takes them as they are stored.

    Raises:
      CheckpointError: no such folder, damaged files, tensors that are not the config's, weights they do not give.
    """
    one_of("policy", policy, POLICIES)
    folder = model if isinstance(model, Folder) else open_folder(model)
    config = folder.config if dtype is None else with_dtype(folder.config, dtype)
    config = config if weights is None else with_weights(config, weights)
    config = streaming.with_stream(config) if policy == "stream" else config
    if config.dit.stream != "no":
        streaming.check_mesh(mesh)
    shapes = param_shapes(config)

    def read(part: str, mesh: Mesh | None, rules: sharding.Rules) -> Any:
        if part == "dit" and config.dit.stream != "no":
            return streaming.restore(folder.path, shapes[part], config.dit.stream, fast)
        params = store.restore(folder.path, part, shapes[part], mesh, rules, fast)
        if mesh is not None and mesh.is_multi_process:
            hosts.meet(f"read/{part}")  # one may have found damaged weights, which are no one's but its own
        return params

    ahead = partial(store.read_ahead, folder.path)
    parts = Parts({}, read, tuple(shapes), policy != "keep", mesh, rules, ahead)
    if policy != "keep":
        return Model(config, parts, folder.tokenizer, parts)
    for part in parts:
        parts.get_on(part, None)
    return Model(config, parts.held, folder.tokenizer, parts)


def with_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    """The same model under the policy of a name: "float32" computes as the original does, "bfloat16" is what
    accelerators are fast at, VAE included. ValueError for another name."""
    policies = {"float32": (FLOAT32, FLOAT32), "bfloat16": (BFLOAT16, VAE_BFLOAT16)}
    dit, vae = policies[one_of("dtype", dtype, policies)]
    return config.with_precision(replace(dit, kernel=config.dit.precision.kernel), vae=vae)


def with_weights(config: ModelConfig, weights: str) -> ModelConfig:
    """The same model with the kernels of the transformer's blocks in "int8" or "fp8" (float8_e4m3fn), quantised while
    they are read where they are stored in more bits; or with all of its weights in "bf16".

    Raises:
      CheckpointError: the config's are of 8 bits already, and others.
      ValueError: another name.
    """
    own, wanted = config.dit.precision, WEIGHTS[one_of("weights", weights, WEIGHTS, "choose one of")]
    if own.kernel not in (None, wanted):
        raise CheckpointError(f"model {config.name}: its kernels are stored in {own.kernel}, which do not give "
                              f"{weights} ones; convert the original weights again with --dtype {weights}")  # fmt: skip
    own = replace(own, kernel=wanted) if wanted else replace(own, param="bfloat16")
    return replace(config, dit=replace(config.dit, precision=own))


def save(folder: str | os.PathLike[str], config: ModelConfig, params: Mapping[str, Any], tokenizer: Path) -> None:
    """Writes a model folder of safetensors files beside its final place and renames it at the end.

    Args:
      folder: must not exist.
      params: as in `Model`; written in the dtypes they have.
      tokenizer: a `tokenizer.json` to copy.

    Raises:
      CheckpointError: the folder exists, params are not the config's, or there is no such tokenizer.
    """
    folder = Path(folder).expanduser().resolve()
    refuse((folder.exists(), f"{folder}: exists; choose another name or remove it"),
           (config.dit.precision.kernel == WEIGHTS["fp8"],
            f"{folder}: safetensors' numpy side reads no float8; take int8, or python -m convert --dtype fp8"),
           error=CheckpointError)  # fmt: skip
    _compare(folder, config, params)
    refuse((not Path(tokenizer).is_file(), f"{tokenizer}: no such file; give a tokenizer.json"), error=CheckpointError)
    with writing.beside(folder, folder=True) as new:
        new.mkdir()
        arrays = {}
        for part, tree in params.items():
            # safetensors writes the buffer as it lies: a transposed view would be read back scrambled.
            flat = {name: np.ascontiguousarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
            save_file(flat, new / f"{part}.safetensors")
            arrays |= {f"{part}/{name}": manifest.entry_of(array) for name, array in flat.items()}
        (new / CONFIG).write_text(to_json(config) + "\n", encoding="utf-8")
        shutil.copyfile(tokenizer, new / TOKENIZER)
        (new / MANIFEST).write_text(_manifest(new, arrays).dumps(), encoding="utf-8")


def _compare(folder: Path, config: ModelConfig, params: Mapping[str, Any]) -> None:
    """CheckpointError unless params are those of the config."""

    def flat(trees: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(leaf.shape) for name, leaf in flatten_dict(dict(trees), sep="/").items()}

    unlike = compare.lines(flat(params), flat(param_shapes(config)))
    refuse((unlike, f"{folder}: the params are not the config's{compare.listed(unlike)}"), error=CheckpointError)


def sign(folder: str | os.PathLike[str]) -> None:
    """Writes the manifest of a model folder anew, from the files that are there.

    For a folder by an older wanjax, or after an intended change of config or tokenizer. Of the Orbax form, whose arrays
    have their digests from the conversion, only those of config and tokenizer are made anew.

    Raises:
      CheckpointError: not a model folder, or the arrays are not the config's.
    """
    path = Path(folder).expanduser().resolve()
    _, shapes = config_of(path)
    found = manifest.manifest_of(path)
    if found is not None and found.form != SAFETENSORS:
        new = replace(found, files=_files(path))
    else:
        arrays = {}
        for part, tree in shapes.items():
            store.check(path, part, tree, None)
            arrays |= store.entries(path, part)
        new = _manifest(path, arrays)
    writing.write_text(path / MANIFEST, new.dumps(), overwrite=True, anything=True)


def _manifest(path: Path, arrays: Mapping[str, Mapping[str, Any]]) -> Manifest:
    """Of a folder of safetensors files."""
    from wanjax import __version__  # here: the package imports this module

    return Manifest(dict(sorted(arrays.items())), {}, f"wanjax {__version__}", "keep", (), _files(path), SAFETENSORS)


def _files(path: Path) -> dict[str, str]:
    return {name: manifest.file_digest(path / name) for name in (CONFIG, TOKENIZER) if (path / name).is_file()}
