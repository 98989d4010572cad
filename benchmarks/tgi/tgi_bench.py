"""TGI-Bench as it is published (arXiv 2603.17651).

    <folder>/TGI-Dataset/<clip>/00000.jpg, 00001.jpg, ...
    <folder>/25_dataset_caption.json, and the same for 33, 65 and 81 frames (may also lie in TGI-Dataset)

Each JSON file is a list of {"folder", "first_image_desc", "last_image_desc", "challenge", "caption"}, all text; the
clip is frames 0 to L-1 of the folder.

Axis letters: L frames, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from benchmarks.tgi.data import DataError, DataSet, Item, identified, read_json, refuse
from wanjax import keyframes

TREE = "TGI-Dataset"
FIELDS = ("folder", "first_image_desc", "last_image_desc", "challenge", "caption")
_CAPTIONS = re.compile(r"(\d+)_dataset_caption\.json")
_FRAME = re.compile(r"(\d{5})(\.jpg|\.jpeg|\.png)", re.IGNORECASE)

ALIASES = MappingProxyType(
    {
        "large motion": ("dynamic motion", "dynamic", "large"),
        "linear motion": ("linear",),
        "occlusion": ("occluded",),
        "near-static": ("static",),
        "appearance change": (),
        "scene transition": ("scene change",),
    }
)
"""Canonical names of the categories, and what else they are called."""


def canonical(challenge: str) -> str:
    """A category's canonical name; an unknown one in lower case. Spaces, hyphens and underscores do not matter."""
    for name, aliases in ALIASES.items():
        if _bare(challenge) in map(_bare, (name, *aliases)):
            return name
    return challenge.strip().lower()


def _bare(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


def tgi_bench(folder: str | os.PathLike[str], length: int) -> DataSet:
    """The clips of one length, in the order of the JSON file.

    Checked here: the JSON, every frame's presence, and from the image headers that the first and the last frame of a
    clip have one size. What only decoding tells (damaged images, other sizes in between) an item's `read` raises.
    The identity's sha256 is over the JSON file and the names and sizes of the frame files, not their contents: hashing
    a benchmark's frames would take minutes at every start.

    Args:
      folder: holds TGI-Dataset and the JSON files.
      length: frames L, one that a JSON file is there for.

    Raises:
      DataError: all problems together, see `data.refuse`.
    """
    folder = Path(folder)
    if not (folder / TREE).is_dir():
        raise DataError(f"{folder}: holds no folder {TREE}; give the folder that TGI-Bench was unpacked into")
    captions = _captions(folder, length)
    entries = _entries(captions)
    problems = _wrong_entries(captions.name, entries)
    items, prints = [], [hashlib.sha256(captions.read_bytes()).hexdigest()]
    for name, entry in {entry["folder"]: entry for entry in entries if _is_name(entry.get("folder"))}.items():
        try:
            files = _frames(folder / TREE / name, length)
        except DataError as error:
            problems.append(str(error))
            continue
        prints += [f"{name}/{file.name} {file.stat().st_size}" for file in files]
        if not problems:  # then every entry has its fields
            items.append(_item(entry, length, tuple(folder / TREE / name / file.name for file in files)))
    refuse(problems)
    return identified("tgi-bench", "tgi-bench", items, prints)


def _captions(folder: Path, length: int) -> Path:
    """The JSON file of a length; the one beside TGI-Dataset goes before one within."""
    found = {}
    for place in (folder / TREE, folder):
        for path in place.iterdir():
            if match := _CAPTIONS.fullmatch(path.name):
                found[int(match[1])] = path
    if not found:
        raise DataError(f"{folder}: holds no <length>_dataset_caption.json; copy the captions of TGI-Bench there")
    if length not in found:
        lengths = ", ".join(map(str, sorted(found)))
        raise DataError(f"{folder}: no captions for {length} frames; choose a length of {lengths}")
    return found[length]


def _entries(path: Path) -> list[Any]:
    """The JSON's list; entries that are no objects come back as empty ones, to be named with the other problems."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: holds {type(entries).__name__}, not a list of clips; fetch it again")
    if not entries:
        raise DataError(f"{path}: an empty list; fetch it again")
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def _wrong_entries(file: str, entries: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with the fields, one line a clip, and folders named twice."""
    problems = []
    for number, entry in enumerate(entries):
        what = f"{file}: clip {number} (folder {entry.get('folder')!r})"
        wrong = [name for name in FIELDS if not isinstance(entry.get(name), str)]
        if wrong:
            problems.append(f"{what}: no text under {', '.join(wrong)}; complete the file or fetch it again")
        elif not _is_name(entry["folder"]):
            problems.append(f"{what}: not the name of a folder in {TREE}; correct the file")
    times = Counter(entry["folder"] for entry in entries if isinstance(entry.get("folder"), str))
    twice = (name for name, count in times.items() if count > 1)
    return problems + [
        f"{file}: folder {name!r} is named {times[name]} times; keep one clip a folder" for name in twice
    ]


def _is_name(folder: Any) -> bool:
    """Whether this is one part of a path, with nothing that would make it another place."""
    return isinstance(folder, str) and bool(re.fullmatch(r"[^\s./\\\0][^/\\\0]*", folder)) and folder == folder.rstrip()


def _frames(folder: Path, length: int) -> list[os.DirEntry[str]]:
    """The files of frames 0 to L-1 in order, headers of the first and the last checked."""
    what = f"folder {folder.name}"
    files: dict[str, dict[int, os.DirEntry[str]]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if (match := _FRAME.fullmatch(entry.name)) and entry.is_file():
                    files.setdefault(match[2], {})[int(match[1])] = entry
    except OSError as error:
        raise DataError(f"{what}: cannot be read in {TREE} ({error.strerror}); fetch the data set again") from error
    if len(files) != 1:
        kinds = f"both {' and '.join(sorted(files))} frames; keep one kind" if files else "no 00000.jpg; fetch it again"
        raise DataError(f"{what}: holds {kinds}")
    suffix, numbered = next(iter(files.items()))
    missing = [number for number in range(length) if number not in numbered]
    if missing and max(numbered) < missing[0]:
        raise DataError(f"{what}: {len(numbered)} frames, {length} are needed; take a shorter length or fetch it again")
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise DataError(f"{what}: {missing[0]:05d}{suffix}{more} missing; fetch it again")
    chosen = [numbered[number] for number in range(length)]
    for file in chosen:
        if not file.stat().st_size:
            raise DataError(f"{what}: {file.name} is empty; fetch it again")
    first, last = (_size(what, Path(file.path)) for file in (chosen[0], chosen[-1]))
    if first != last:
        raise DataError(_sizes_differ(what, chosen[-1].name, last, chosen[0].name, first))
    return chosen


def _size(what: str, path: Path) -> tuple[int, int]:
    """Upright (height, width) by the image's header."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return image.size if turned else image.size[::-1]
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{what}: {path.name} is no readable image ({error}); fetch it again") from error


def _sizes_differ(what: str, name: str, size: Sequence[int], other: str, wanted: Sequence[int]) -> str:
    sizes = f"{name} is {size[0]}x{size[1]}, {other} {wanted[0]}x{wanted[1]}"
    return f"{what}: {sizes}; a clip needs frames of one size, fetch it again"


def _item(entry: dict[str, Any], length: int, files: tuple[Path, ...]) -> Item:
    first, last, caption = (entry[name] for name in ("first_image_desc", "last_image_desc", "caption"))
    extra = {name: value for name, value in entry.items() if name not in FIELDS}
    read = partial(_read, f"folder {entry['folder']}", files)
    return Item(entry["folder"], canonical(entry["challenge"]), caption, first, last, length, extra, read)


def _read(what: str, files: tuple[Path, ...]) -> np.ndarray:
    """The frames uint8 [L, H, W, 3]."""
    frames: list[np.ndarray] = []
    for file in files:
        try:
            frame = np.asarray(keyframes.read(file))
        except keyframes.KeyframeError as error:
            raise DataError(f"{what}: {error}") from error
        if frames and frame.shape != frames[0].shape:
            raise DataError(_sizes_differ(what, file.name, frame.shape, files[0].name, frames[0].shape))
        frames.append(frame)
    return np.stack(frames)
