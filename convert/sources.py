"""What a path holds: which model lies in which file, with configuration and tokenizer; no tensor is read.

A source is a file, or a folder in one of three forms: the original repository's (weight files side by side, also
ComfyUI's), diffusers' (a subfolder a model), or a wanjax model folder; `hf://owner/name` is such a folder of the
Hugging Face hub, through its cache.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert import families, hub
from convert.families import Config, Family
from convert.keymap import ConversionError, Rule, check
from convert.tensors import TORCH_SUFFIXES, SourceError, Tensor, Tensors, open_file, open_index, unscaled
from wanjax import checkpoint, store

SUBFOLDERS = {"transformer": "dit", "vae": "vae", "text_encoder": "umt5", "image_encoder": "clip"}
"""diffusers' folders."""

TOKENIZERS = ("tokenizer.json", "tokenizer/tokenizer.json", "google/umt5-xxl/tokenizer.json")
"""Where a tokenizer may lie in a source, the likeliest first."""

_WEIGHTS = (".safetensors", *TORCH_SUFFIXES)


@dataclass(frozen=True)
class Part:
    """One model of a source.

    Attributes:
      family: which, in which layout.
      config: read from it.
      tensors: under plain names.
    """

    family: Family
    config: Config
    tensors: Tensors

    def check(self, expected: Any) -> None:
        """Compares with the parameters of its config.

        Raises:
          SourceError: missing, extra and wrongly shaped tensors, all of them.
        """
        names = self.family.unused(self.config, self.tensors.named)
        try:
            check(self.family.rules(self.config), expected, self.tensors.shapes, names)
        except ConversionError as error:
            raise SourceError(f"{self.tensors.files[0]}: {error}") from error


@dataclass(frozen=True)
class Source:
    """All that a path holds.

    Attributes:
      path: file or folder.
      parts: "dit", "vae", "umt5", "clip", those that are there.
      tokenizer: its tokenizer.json, None where there is none.
      loras: what was merged into the transformer, as asked for.
    """

    path: Path
    parts: Mapping[str, Part]
    tokenizer: Path | None
    loras: tuple[str, ...] = ()


def find(path: str | Path, only: Iterable[str] = families.SLOTS) -> Source:
    """Looks at a source; reads names and shapes, no tensor.

    Args:
      path: a weight file, a folder in any form, or hf://owner/name.
      only: the parts that are wanted; others are not opened where their place tells what they are.

    Raises:
      SourceError: nothing there, damaged files, or a model in another's place.
    """
    only = tuple(only)
    path = hub.place(path, only)
    if path.is_file():
        # The folder's config.json is this file's where no other model lies beside it.
        alone = sum(file.suffix in _WEIGHTS for file in path.parent.iterdir()) == 1
        part = _part(open_file(path), _stated(path.parent) if alone else {})
        return Source(path, {part.family.part: part}, None)
    if not path.is_dir():
        raise SourceError(f"{path}: no such file or folder; give a model file or the folder that holds one")
    if checkpoint.is_folder(path):
        parts = _wanjax(path, only)
    elif any((path / name).is_dir() for name in SUBFOLDERS):
        parts = _diffusers(path, only)
    else:
        parts = _side_by_side(path, only)
    if not parts:
        raise SourceError(f"{path}: no model files (*.safetensors, *.pth) of {', '.join(only)} in it")
    tokenizer = next((path / name for name in TOKENIZERS if (path / name).is_file()), None)
    return Source(path, parts, tokenizer)


def _wanjax(path: Path, only: tuple[str, ...]) -> dict[str, Part]:
    """A wanjax model folder in either of its forms, for another dtype."""
    _, config = checkpoint.read_config(path, whole=False)
    parts = {}
    for slot in only:
        if (path / f"{slot}.safetensors").is_file():
            tensors = open_file(path / f"{slot}.safetensors")
        elif (path / slot).is_dir():
            tensors = _stored(path, slot)
        else:
            continue
        tensors = _by_layer(tensors)
        patterns = dict.fromkeys(map(_stack, tensors.named))
        rules = [Rule(pattern.removesuffix(f"{LAYER}{{i}}"), pattern) for pattern in patterns]
        family = Family(slot, "wanjax", (), lambda config, rules=rules: rules, lambda shapes, stated: config)
        parts[slot] = Part(family, getattr(config, slot), tensors)
    return parts


LAYER = "#"


def _by_layer(tensors: Tensors) -> Tensors:
    """The same with stacked arrays ("blocks/...") as one tensor a layer, so that no stack is read whole."""
    named = {}
    for name, tensor in tensors.named.items():
        if not name.startswith("blocks/"):
            named[name] = tensor
            continue
        for i in range(tensor.shape[0]):
            named[f"{name}{LAYER}{i}"] = Tensor(tensor.shape[1:], tensor.dtype, lambda t=tensor, i=i: _row(t, i))
    return Tensors(tensors.files, named)


def _row(tensor: Tensor, i: int) -> np.ndarray:
    return tensor.read()[i] if tensor.rows is None else tensor.rows(i)


def _stack(name: str) -> str:
    """The rule's pattern of a tensor of `_by_layer`."""
    return f"{name.rpartition(LAYER)[0]}{LAYER}{{i}}" if LAYER in name else name


def _stored(path: Path, slot: str) -> Tensors:
    """Arrays of a converted folder, by parameter path."""
    try:
        arrays = store.read_manifest(path).arrays
    except store.StoreError as error:
        raise SourceError(str(error)) from error
    own = {name: entry for name, entry in arrays.items() if name.startswith(f"{slot}/")}

    def tensor(name: str, entry: Mapping[str, Any]) -> Tensor:
        where = store.place(path, name)
        return Tensor(tuple(entry["shape"]), np.dtype(entry["dtype"]), lambda: store.open_array(where).read().result(),
                      lambda i: store.open_array(where)[i].read().result())  # fmt: skip

    named = {name.split("/", 1)[1]: tensor(name, entry) for name, entry in own.items()}
    return Tensors((path / store.MANIFEST,), named)


def _part(tensors: Tensors, stated: Mapping[str, Any]) -> Part:
    tensors = unscaled(families.plain(tensors))
    family = families.identify(tensors)
    return Part(family, families.read_config(family, tensors, stated), tensors)


def _stated(folder: Path) -> dict[str, Any]:
    """The folder's config.json, {} without one."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: not readable JSON ({error})") from error
    if not isinstance(stated, dict):
        raise SourceError(f"{file}: not a configuration")
    return stated


def _groups(folder: Path) -> list[Tensors]:
    """Every model file of a folder, the shards of an index as one."""
    indexes = sorted(folder.glob("*.index.json"))
    groups = [open_index(index) for index in indexes]
    shards = {file for group in groups for file in group.files}
    alone = [file for file in sorted(folder.iterdir()) if file.suffix in _WEIGHTS and file not in shards]
    lost = [file.name for file in alone if "-of-" in file.stem]
    if lost:
        raise SourceError(f"{folder}: {', '.join(lost)} are shards without their index.json; download it too")
    return groups + [open_file(file) for file in alone]


def _diffusers(path: Path, only: tuple[str, ...]) -> dict[str, Part]:
    parts = {}
    for name, slot in SUBFOLDERS.items():
        folder = path / name
        if slot not in only or not folder.is_dir():
            continue
        groups = _groups(folder)
        if len(groups) != 1:
            raise SourceError(f"{folder}: {len(groups)} models in it; one is wanted ({slot})")
        part = _part(groups[0], _stated(folder))
        if part.family.part != slot:
            raise SourceError(f"{folder}: holds a {families.describe(part.config)}, not the {slot}")
        parts[slot] = part
    return parts


def _side_by_side(path: Path, only: tuple[str, ...]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    stated = _stated(path)
    groups = _groups(path)
    for tensors in groups:
        family = families.identify(unscaled(families.plain(tensors)))
        if family.part not in only:
            continue
        part = _part(tensors, stated if family.part == "dit" or len(groups) == 1 else {})
        if family.part in parts:
            files = parts[family.part].tensors.files[0].name, tensors.files[0].name
            raise SourceError(f"{path}: {' and '.join(files)} are both a {family.part}; move one away")
        parts[family.part] = part
    return parts
