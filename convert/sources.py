"""What a path holds: which model lies in which file, with configuration and tokenizer; no matrix is read.

A source is a file, or a folder in one of four forms: the original repository's (weight files side by side), diffusers'
(a subfolder a model), ComfyUI's tree (a subfolder a kind, many files in each), or a wanjax model folder;
`hf://owner/name` is such a folder of the Hugging Face hub, through its cache. Single files may be picked in any.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from convert import families, folders, hub, quantised, split, strangers, wanjaxfolder
from convert.choose import DIFFUSERS, ROOTS, SCHEDULER, TOKENIZERS, TREE
from convert.families import Config, Family
from convert.folders import Group
from convert.keymap import ConversionError, check
from convert.tensors import SUFFIXES, SourceError, Tensors, open_file, open_index, read_json, some
from wanjax import checkpoint
from wanjax.config import DiTConfig

NOTHING: Mapping[str, Path] = MappingProxyType({})


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
      path: file or folder; of picked files alone the first.
      parts: "dit", "vae", "umt5", "clip", those that are there.
      tokenizer: its tokenizer.json, None where there is none.
      loras: what was merged into the transformer, as asked for.
      shift: timestep shift that a diffusers folder's scheduler has, None where none is told.
      notes: lines on how it was got, and what was chosen or left out.
    """

    path: Path
    parts: Mapping[str, Part]
    tokenizer: Path | None
    loras: tuple[str, ...] = ()
    shift: float | None = None
    notes: tuple[str, ...] = ()


Found = tuple[dict[str, Part], list[str]]
"""Parts, and notes on them."""


def find(
    path: str | Path | None, only: Iterable[str] = families.SLOTS, files: Mapping[str, str | Path] = NOTHING
) -> Source:
    """Looks at a source; reads names and shapes, and the scales of 8-bit weights.

    Args:
      path: a weight file, a folder in any form, or hf://owner/name; None where `files` are all.
      only: the parts that are wanted; others are not opened where their place tells what they are.
      files: part -> the file (or folder of one model) to take it from, whatever else lies in `path`.

    Raises:
      SourceError: nothing there, damaged files, several models to choose from, or a model in another's place.
    """
    only = tuple(only)
    unwanted = [slot for slot in files if slot not in only]
    if unwanted:
        raise SourceError(
            f"--{unwanted[0]} {files[unwanted[0]]}: not among the parts that are wanted, {', '.join(only)}"
        )
    if path is None and not files:
        raise SourceError(
            "no source: give a file, a folder or hf://owner/name, or files with --dit, --vae, --umt5, --clip"
        )
    parts: dict[str, Part] = {}
    notes: list[str] = []
    for slot, file in files.items():
        where = _place(file, (slot,), notes)
        found, told = _parts(where, (slot,))
        if slot not in found:
            raise SourceError(f"--{slot} {file}: holds no {slot}; {_held(where)}")
        parts[slot] = found[slot]
        notes += told
    rest = tuple(slot for slot in only if slot not in files)
    where, wanted = (path, rest) if path is not None else (next(iter(files.values())), tuple(files)[:1])
    place = _place(where, wanted, notes)
    if path is not None and rest:
        found, told = _parts(place, rest)
        parts |= found
        notes += told
    if not parts:
        kinds = ", ".join(f"*{suffix}" for suffix in SUFFIXES[:1] + SUFFIXES[2:4])
        raise SourceError(f"{place}: no model files ({kinds}) of {', '.join(only)} in it{_reasons(notes)}")
    parts = {slot: parts[slot] for slot in families.SLOTS if slot in parts}
    folder = place if place.is_dir() else None
    tokenizer = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None) if folder else None
    shift = _shift(folder / SCHEDULER) if folder and (folder / SCHEDULER).is_file() else None
    return Source(place, _with_tokens(parts, place, path), tokenizer, (), shift, tuple(dict.fromkeys(notes)))


def _place(path: str | Path, only: Sequence[str], notes: list[str]) -> Path:
    """The file or folder that is meant, which is there; of the hub, with the parts that are wanted."""
    place = hub.place(path, only, notes.append)
    if place.is_file() or place.is_dir():
        return place
    if place.exists():
        raise SourceError(f"{path}: neither a file nor a folder; give a model file or the folder that holds one")
    address = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?(/.*)?", str(path))
    if address and not Path(path).parent.exists():
        raise SourceError(f"{path}: no such file or folder; did you mean {hub.HUB}{path}?")
    raise SourceError(f"{path}: no such file or folder; give a model file or the folder that holds one")


def _parts(path: Path, only: tuple[str, ...]) -> Found:
    """The wanted parts that a file or folder holds."""
    if path.is_file():
        return _of_file(path, only)
    if (path / checkpoint.CONFIG).is_file() and checkpoint.is_folder(path):  # a pipe of that name is not read
        return {slot: Part(*found) for slot, found in wanjaxfolder.parts(path, only).items()}, []
    stranger = strangers.by_folder(file.name for file in path.iterdir()) if "dit" in only else None
    if stranger:
        raise SourceError(f"{path}: {stranger}; {strangers.KNOWN}")
    if _is_diffusers(path):
        return _diffusers(path, only)
    for root in ROOTS:
        if any((path / root / name).is_dir() for name in TREE):
            return _tree(path / root, only)
    return _side_by_side(path, only)


def _part(family: Family, tensors: Tensors, stated: Mapping[str, Any]) -> Part:
    """A model that can be converted, as far as names, shapes, dtypes and scales tell."""
    where = tensors.files[0]
    stranger = strangers.by_name(tensors.named) if family.part == "dit" else None
    if stranger is None:
        tensors = quantised.unscaled(tensors)
        config = families.read_config(family, tensors, stated)
        stranger = strangers.by_shape(config) if isinstance(config, DiTConfig) else None
    if stranger is not None:
        raise SourceError(f"{where}: {stranger}; {strangers.KNOWN}")
    quantised.refuse_others(tensors, family.unused(config, tensors.named))
    return Part(family, config, tensors)


def _of_file(path: Path, only: tuple[str, ...]) -> Found:
    """The models of one file, or of the shards of one index."""
    weights = [file for file in path.parent.iterdir() if file.suffix.lower() in SUFFIXES]
    if folders.INDEX.search(path.name):
        tensors = open_index(path)
        alone = all(file in tensors.files for file in weights)
    elif folders.SHARD.search(path.name):
        raise SourceError(f"{path}: one shard of several; give their index.json, or the folder")
    else:
        tensors, alone = open_file(path), len(weights) == 1
    found, notes = split.models(tensors)
    # The folder's config.json is this file's where no other model lies beside it.
    stated = _stated(path.parent) if alone and len(found) == 1 else {}
    parts = {family.part: _part(family, own, stated) for family, own in found if family.part in only}
    if not parts:
        raise SourceError(f"{path}: holds {_titles(found)}, not the {', '.join(only)}")
    return parts, notes


def _titles(found: Sequence[tuple[Family, Tensors]]) -> str:
    return " and ".join(families.title(family) for family, _ in found)


def _stated(folder: Path) -> dict[str, Any]:
    """The folder's config.json, {} without one."""
    file = folder / "config.json"
    return read_json(file, "configuration") if file.is_file() else {}


def _is_diffusers(path: Path) -> bool:
    """ComfyUI's tree has a `vae` too, but no config.json in it."""
    own = [name for name in DIFFUSERS if (path / name).is_dir()]
    stated = any((path / name / "config.json").is_file() for name in own)
    return bool(own) and (own != ["vae"] or stated or (path / "model_index.json").is_file())


def _diffusers(path: Path, only: tuple[str, ...]) -> Found:
    parts: dict[str, Part] = {}
    notes: list[str] = []
    for name, slot in DIFFUSERS.items():
        folder = path / name
        if slot not in only or not folder.is_dir():
            continue
        groups, told = folders.groups(folder)
        notes += told
        stated, candidates = _stated(folder), []
        for group in groups:
            found, told = split.models(group.open())
            own = [(family, tensors) for family, tensors in found if family.part == slot]
            if not own:
                raise SourceError(f"{folder}: holds {_titles(found)}, not the {slot}")
            candidates += [(group, _part(family, tensors, stated)) for family, tensors in own]
            notes += told
        if not candidates:
            raise SourceError(f"{folder}: no weights in it; download them too, or convert --only other parts")
        parts[slot], told = _best(folder, slot, candidates, one_model=True)
        notes += told
    return parts, notes


def _side_by_side(path: Path, only: tuple[str, ...]) -> Found:
    groups, notes = folders.groups(path)
    stated = _stated(path)
    candidates: dict[str, list[tuple[Group, Part]]] = {}
    for group in groups:
        found, told = split.models(group.open())
        notes += told
        for family, tensors in found:
            if family.part in only:
                own = stated if family.part == "dit" or len(groups) == 1 else {}
                candidates.setdefault(family.part, []).append((group, _part(family, tensors, own)))
    return _each_best(path, candidates, notes)


def _tree(path: Path, only: tuple[str, ...]) -> Found:
    """ComfyUI's folders, in which models of all kinds lie: what is not of Wan2.1 is left out."""
    candidates: dict[str, list[tuple[Group, Part]]] = {}
    notes: list[str] = []
    for slot in only:
        left: list[str] = []
        names = [name for name, own in TREE.items() if own == slot]
        for folder in (path / name for name in names if (path / name).is_dir()):
            groups, told = folders.groups(folder, deep=True)
            left += told
            for group in groups:
                try:
                    found, told = split.models(group.open())
                    own = [_part(family, tensors, {}) for family, tensors in found if family.part == slot]
                except SourceError as error:
                    left.append(str(error))
                    continue
                candidates.setdefault(slot, []).extend((group, part) for part in own)
                notes += told
        if left and slot in candidates:
            notes.append(f"{path}: {len(left)} files beside the {slot} are left out, as they are no {slot} of Wan2.1")
        elif left:
            notes.append(f"{path}: no {slot} of Wan2.1 in {' or '.join(names)}: {some(left, 3, '; ')}")
    return _each_best(path, candidates, notes)


def _each_best(path: Path, candidates: Mapping[str, Sequence[tuple[Group, Part]]], notes: list[str]) -> Found:
    parts = {}
    for slot, own in candidates.items():
        parts[slot], told = _best(path, slot, own, one_model=False)
        notes = notes + told
    return parts, notes


def _best(folder: Path, slot: str, candidates: Sequence[tuple[Group, Part]], one_model: bool) -> tuple[Part, list[str]]:
    """The one candidate, or the best of copies."""
    if len(candidates) == 1:
        return candidates[0][1], []
    read = [(group, _read(part)) for group, part in candidates]
    taken, notes = folders.best(folder, slot, read, one_model)
    return candidates[taken][1], notes


def _read(part: Part) -> Tensors:
    """The tensors that are read."""
    unused = set(part.family.unused(part.config, part.tensors.named))
    return part.tensors.renamed(lambda name: None if name in unused else name)


def _held(path: Path) -> str:
    """What a picked file holds instead, for a message."""
    return "it holds " + ", ".join(_parts(path, tuple(families.SLOTS))[0])


def _reasons(notes: Sequence[str]) -> str:
    return f" ({some(notes, 3, '; ')})" if notes else ""


def _with_tokens(parts: dict[str, Part], place: Path, path: str | Path | None) -> dict[str, Part]:
    """An image-to-video transformer with as many image tokens as the vision tower beside it gives."""
    dit = parts.get("dit")
    if dit is None or dit.family.layout == "wanjax" or dit.config.num_images != 1:
        return parts
    tower = parts.get("clip")
    if tower is None and path is not None and place.is_dir():
        try:
            tower = _parts(place, ("clip",))[0].get("clip")
        except SourceError:  # it was not asked for, so what is wrong with it is not, either
            return parts
    if tower is None:
        return parts
    config = dataclasses.replace(dit.config, image_tokens=tower.config.num_tokens)
    return {**parts, "dit": dataclasses.replace(dit, config=config)}


def _shift(file: Path) -> float | None:
    """The timestep shift in a scheduler's configuration."""
    stated = read_json(file, "scheduler configuration")
    name = "flow_shift" if stated.get("flow_shift") is not None else "shift"
    shift = stated.get(name)
    if shift is None or stated.get("use_dynamic_shifting"):
        return None
    if type(shift) not in (int, float) or not math.isfinite(shift) or shift <= 0:
        raise SourceError(f"{file}: {name} is {str(shift)[:80]!r}, not a positive number; get it again")
    return float(shift)
