"""A model folder, and every reason why it is none that shows before its weights are read: this file is for checking
alone, `wanjax.checkpoint` loads and writes."""

import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from wanjax import store
from wanjax.config import ModelConfig, from_json
from wanjax.manifest import MANIFEST, SAFETENSORS, CheckpointError, Manifest, file_digest, manifest_of, told
from wanjax.settings import refuse
from wanjax.shapes import param_shapes
from wanjax.tokenizer import Tokenizer

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
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
    # No permission, a name too long, a broken disk; a null in the name; an unknown user's home, a loop of symlinks.
    kinds = (OSError, ValueError, RuntimeError)
    with told(f"model {str(model)!r}: cannot be read", "check the path", *kinds):
        # Absolute and without "..", which TensorStore does not take.
        path = bundled() if str(model) == "tiny" else Path(model).expanduser().resolve()
        if not path.is_dir():
            raise CheckpointError(f"model {str(model)!r}: no such folder; give 'tiny' or a wanjax model folder")
        return _open(path, whole)


def _open(path: Path, whole: bool) -> Folder:
    config, shapes = config_of(path)
    found = manifest_of(path)
    _compare_files(path, found)
    if not whole:
        return Folder(path, config, None)
    stored = found is not None and found.form != SAFETENSORS
    named = (*(part if stored else f"{part}.safetensors" for part in shapes), TOKENIZER)
    lacking = [name for name in named if not (path / name).exists()]
    if found is None and any((path / part).is_dir() for part in shapes):
        lacking = [MANIFEST]
    refuse((lacking, f"model {path}: {', '.join(lacking)} missing; convert the weights again"), error=CheckpointError)
    for part, tree in shapes.items():
        store.check(path, part, tree, found)
    notes = () if found is not None else (f"model {path}: by an older wanjax, without checksums; a damaged number "
                                          "would not be noticed (wanjax.checkpoint.sign adds them)",)  # fmt: skip
    return Folder(path, config, _tokenizer(path / TOKENIZER, config), notes)


def config_of(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration in a folder and its parameters' shapes. CheckpointError: none, or of something else."""
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(f"model {path}: no {CONFIG} in it; convert the weights to a wanjax model folder")
    with told(f"{file}: not of a model", "get it again or convert the weights again", *UNREADABLE):
        config = from_json(file.read_text(encoding="utf-8"))
        return config, param_shapes(config)


def _compare_files(path: Path, found: Manifest | None) -> None:
    for name, digest in {} if found is None else found.files.items():
        if (path / name).is_file() and file_digest(path / name) != digest:
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
