"""How a file says that wanjax wrote it, so that nothing else is ever replaced.

- JSON: the key "written_by" of its object.
- PNG: the text chunk "Software"; WebP: the EXIF field of that name.
- GIF, MP4, WebM: the comment.
- safetensors: "written_by" of the metadata.
Each holds `mark()`, which begins with "wanjax"; a comment may be JSON with that key instead (`samplers.recall`). A
folder is ours when every file in it is.

Versions before these marks wrote a JSON without the key. It is accepted by its shape (settings, and the version of
wanjax, or the numbers of the plots), and a video, contact sheet or plot without a mark when such a JSON beside it names
it and is not older: what came later under that name is somebody else's.
"""

import json
import os
import re
import stat
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

KEY = "written_by"
SOFTWARE = 0x0131
"""The EXIF (TIFF) tag of the program that made a picture."""
EXIF, USER_COMMENT, ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
"""The tag of EXIF's own fields, that of the user's comment among them, and what an ASCII comment begins with."""
COMMENT = "Comment"
"""The PNG text chunk for the same."""

_NAME = "wanjax"
_PLOTS = ("retro.png", "strength.png", "attention.png")
_PLOT_KEYS = {"model", "settings", "layer", "step", "timestep", "isolated", "kab", "retro", "strength"}
_FRAME = re.compile(r"\d{5,}\.png")


def mark() -> str:
    """What is written into every file: the program and its version."""
    try:
        return f"{_NAME} {metadata.version(_NAME)}"
    except metadata.PackageNotFoundError:  # run from a clone without installing
        return _NAME


def marked(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object that says who wrote it; an object that says so already stays."""
    return value if KEY in value else {KEY: mark()} | value


def foreign(path: Path, names: Callable[[str], Any] | None = None) -> str | None:
    """Why an existing file or folder must not be replaced, as the end of a sentence about it; None when it may be.

    An empty file has nothing to lose and may be, as may an empty folder.

    Args:
      path: a file, or a folder.
      names: of a folder, which names its files can have; None for any, and then an empty file is foreign too.
    """
    if not path.is_dir():
        return None if _empty(path) or _ours(path) else "wanjax did not write it"
    for entry in sorted(path.iterdir()):
        plain = stat.S_ISREG(entry.lstat().st_mode)
        if not plain or (names is not None and not names(entry.name)):
            return f"it holds {entry.name!r}, which is none of the files that wanjax writes there"
        if not (_ours(entry) or (names is not None and _empty(entry))):
            return f"it holds {entry.name!r}, which wanjax did not write"
    return None


def _empty(path: Path) -> bool:
    return path.stat().st_size == 0


def _ours(path: Path) -> bool:
    """Whether one regular file carries the mark, or is of an older version; what cannot be read is not ours."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        value = _json(path)
        return says(value.get(KEY)) or _is_older(value)
    read = {".png": _picture, ".gif": _picture, ".webp": _picture, ".mp4": _video, ".webm": _video,
            ".safetensors": _tensors}.get(suffix)  # fmt: skip
    return read is not None and (says(read(path)) or _named_by_older(path))


def says(text: Any) -> bool:
    """Whether a mark, or the JSON that stands in its place, is wanjax's."""
    if isinstance(text, str) and text.startswith("{"):
        text = _object(text).get(KEY)
    return isinstance(text, str) and (text == _NAME or text.startswith(f"{_NAME} "))


def _json(path: Path) -> dict[str, Any]:
    try:
        return _object(path.read_bytes())
    except OSError:
        return {}


def _object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _picture(path: Path) -> str | None:
    from PIL import Image  # here, as most writers need no picture library

    try:
        with Image.open(path) as image:
            if image.format == "WEBP":
                return image.getexif().get(SOFTWARE)
            text = image.info.get("comment" if image.format == "GIF" else "Software")
            return text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    except Exception:  # Pillow's readers raise nearly anything on foreign bytes
        return None


def _video(path: Path) -> str | None:
    import av

    try:
        with av.open(str(path)) as container:
            return {name.lower(): text for name, text in container.metadata.items()}.get("comment")
    except (OSError, ValueError):
        return None


def _tensors(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as opened:
            return (opened.metadata() or {}).get(KEY)
    except (OSError, SafetensorError):
        return None


def _is_older(value: dict[str, Any]) -> bool:
    """Whether a JSON object without the key has the shape of a report, or of the plots' numbers."""
    if KEY in value:
        return False
    versions = value.get("versions")
    report = {"model", "settings", "video"} <= value.keys() and isinstance(versions, dict) and _NAME in versions
    return report or value.keys() >= _PLOT_KEYS


def _named_by_older(path: Path) -> bool:
    """Whether an older version's JSON says that this file without a mark is its video, frame, sheet or plot."""
    folder, name = path.parent, path.name
    if name in _PLOTS:
        return _not_older(folder / "attention.json", path)
    if name.endswith(".sheet.png"):
        return _names(folder / f"{name.removesuffix('.sheet.png')}.json", path, None)
    if _FRAME.fullmatch(name) and _names(folder.with_name(f"{folder.name}.json"), path, folder.name):
        frames = _json(folder.with_name(f"{folder.name}.json"))["settings"].get("frames")
        return len(os.listdir(folder)) == frames
    return _names(path.with_suffix(".json"), path, name)


def _names(told: Path, path: Path, video: str | None) -> bool:
    """Whether an older report, not older than the file, names a video of this name (None: of the report's stem)."""
    if not _not_older(told, path):
        return False
    value = _json(told)
    if not isinstance(value.get("video"), str) or not isinstance(value["settings"], dict):
        return False
    named = Path(value["video"].replace("\\", "/"))
    return named.name == video if video is not None else named.stem == told.stem


def _not_older(told: Path, path: Path) -> bool:
    try:
        return _is_older(_json(told)) and told.stat().st_mtime_ns >= path.stat().st_mtime_ns
    except OSError:
        return False
