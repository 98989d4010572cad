"""A wanjax model folder: `config.json`, `tokenizer.json`, a manifest, and the parameters in one of two forms.

What `python -m convert` writes is an Orbax checkpoint for each model, what `save` writes is a safetensors file for each
(`wanjax.store` knows both). Everything that can be wrong and be seen without reading the weights is found by
`open_folder`; the weights are compared with their digests as they are read.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from safetensors.numpy import save_file

from wanjax import compare, hosts, manifest, sharding, store, streaming, writing
from wanjax.config import ModelConfig, from_json, to_json
from wanjax.manifest import MANIFEST, SAFETENSORS, CheckpointError, Manifest
from wanjax.precision import BFLOAT16, FLOAT32, VAE_BFLOAT16
from wanjax.residency import POLICIES, Model, Parts
from wanjax.settings import refuse
from wanjax.shapes import param_shapes
from wanjax.tokenizer import Tokenizer

__all__ = ["CONFIG", "TOKENIZER", "CheckpointError", "Folder", "Model", "bundled", "is_folder", "load", "open_folder",
           "param_shapes", "read_config", "save", "sign", "with_dtype",
           "with_weights"]  # fmt: skip

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS = MappingProxyType({"bf16": None, "int8": "int8", "fp8": "float8_e4m3fn"})
"""How the transformer's kernels may be asked for, and what `Precision.kernel` is then."""
UNREADABLE = (ValueError, TypeError, ArithmeticError, RecursionError)
"""What a configuration of the wrong kind may end in, such as no heads to divide the width by."""


@dataclass(frozen=True)
class Folder:
    """A model folder of which nothing is wrong that can be seen without reading the weights.

    Attributes:
      path: absolute.
      config: sizes, precision and sampling defaults.
      tokenizer: of the text encoder; None where the folder need not be whole.
      notes: lines that a user should see.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    notes: tuple[str, ...] = ()


def bundled() -> Path:
    """The folder of the tiny model that comes with the package."""
    return Path(str(resources.files("wanjax") / "assets" / "tiny"))


def is_folder(path: Path) -> bool:
    """Whether a folder is a wanjax model folder, by its config.json; other libraries have files of that name too."""
    try:
        fields = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and {"dit", "vae", "umt5", "sampling"} <= fields.keys()


def read_config(model: str | os.PathLike[str], whole: bool = True) -> tuple[Path, ModelConfig]:
    """The absolute folder and the configuration of "tiny" or of a path, checked as by `open_folder`.

    Raises:
      CheckpointError: no such model, or not a model folder.
    """
    folder = open_folder(model, whole)
    return folder.path, folder.config


def open_folder(model: str | os.PathLike[str], whole: bool = True) -> Folder:
    """Checks a model folder: configuration, manifest, names, shapes and files of all arrays, tokenizer.

    Args:
      model: "tiny" for the bundled one, or a model folder; "~", ".." and symlinks are followed.
      whole: whether all its files must be there. Without, weights and tokenizer are not looked at.

    Raises:
      CheckpointError: no such model, not a model folder, or a damaged one; names the file or array.
    """
    try:
        # Absolute and without "..", which TensorStore does not take.
        path = bundled() if str(model) == "tiny" else Path(model).expanduser().resolve()
        if not path.is_dir():
            raise CheckpointError(f"model {str(model)!r}: no such folder; give 'tiny' or a wanjax model folder")
        return _open(path, whole)
    except CheckpointError:
        raise
    # No permission, a name too long, a broken disk; a null in the name; an unknown user's home, a loop of symlinks.
    except (OSError, ValueError, RuntimeError) as error:
        reason = manifest.first_line(error)
        raise CheckpointError(f"model {str(model)!r}: cannot be read ({reason}); check the path") from error


def _open(path: Path, whole: bool) -> Folder:
    config, shapes = _config(path)
    found = manifest.manifest_of(path)
    _compare_files(path, found)
    if not whole:
        return Folder(path, config, None)
    stored = found is not None and found.form != SAFETENSORS
    named = (*(part if stored else f"{part}.safetensors" for part in shapes), TOKENIZER)
    lacking = [name for name in named if not (path / name).exists()]
    if found is None and any((path / part).is_dir() for part in shapes):
        lacking = [MANIFEST]
    if lacking:
        raise CheckpointError(f"model {path}: {', '.join(lacking)} missing; convert the weights again")
    for part, tree in shapes.items():
        store.check(path, part, tree, found)
    notes = () if found is not None else (f"model {path}: by an older wanjax, without checksums; a damaged number "
                                          "would not be noticed (wanjax.checkpoint.sign adds them)",)  # fmt: skip
    return Folder(path, config, _tokenizer(path / TOKENIZER, config), notes)


def _config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration in a folder and its parameters' shapes."""
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(f"model {path}: no {CONFIG} in it; convert the weights to a wanjax model folder")
    try:
        config = from_json(file.read_text(encoding="utf-8"))
        return config, param_shapes(config)
    except UNREADABLE as error:
        raise CheckpointError(f"{file}: {manifest.first_line(error)}") from error


def _compare_files(path: Path, found: Manifest | None) -> None:
    for name, digest in {} if found is None else found.files.items():
        if (path / name).is_file() and manifest.file_digest(path / name) != digest:
            raise CheckpointError(f"{path / name}: not the file of the manifest; get it again, or if you changed it, "
                                  "have wanjax.checkpoint.sign write the manifest anew")  # fmt: skip


def _tokenizer(file: Path, config: ModelConfig) -> Tokenizer:
    try:
        tokenizer = Tokenizer(file)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    size, room = tokenizer.vocab_size, config.umt5.vocab_size
    if size > room:
        raise CheckpointError(f"{file}: {size} tokens, the text encoder has {room}; put the model's own there")
    return tokenizer


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
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r}: choose {', '.join(POLICIES)}")
    folder = model if isinstance(model, Folder) else open_folder(model)
    config = folder.config if dtype is None else with_dtype(folder.config, dtype)
    config = config if weights is None else with_weights(config, weights)
    if policy == "stream":
        config = streaming.with_stream(config)
        streaming.check_mesh(mesh)
    shapes = param_shapes(config)

    def read(part: str, mesh: Mesh | None, rules: sharding.Rules) -> Any:
        if config.dit.stream != "no":
            streaming.check_mesh(mesh)
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
    if dtype not in policies:
        raise ValueError(f"dtype {dtype!r}: choose {' or '.join(policies)}")
    dit, vae = policies[dtype]
    return config.with_precision(replace(dit, kernel=config.dit.precision.kernel), vae=vae)


def with_weights(config: ModelConfig, weights: str) -> ModelConfig:
    """The same model with the kernels of the transformer's blocks in "int8" or "fp8" (float8_e4m3fn), quantised while
    they are read where they are stored in more bits; or with all of its weights in "bf16".

    Raises:
      CheckpointError: the config's are of 8 bits already, and others.
      ValueError: another name.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r}: choose one of {', '.join(WEIGHTS)}")
    own, wanted = config.dit.precision, WEIGHTS[weights]
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
    if unlike:
        raise CheckpointError(f"{folder}: the params are not the config's{compare.listed(unlike)}")


def sign(folder: str | os.PathLike[str]) -> None:
    """Writes the manifest of a model folder anew, from the files that are there.

    For a folder by an older wanjax, or after an intended change of config or tokenizer. Of the Orbax form, whose arrays
    have their digests from the conversion, only those of config and tokenizer are made anew.

    Raises:
      CheckpointError: not a model folder, or the arrays are not the config's.
    """
    path = Path(folder).expanduser().resolve()
    _, shapes = _config(path)
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
