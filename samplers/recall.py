"""What a clip was made of, as text inside the file, and read back from there: `to_text` and `read`.

The text is JSON in ASCII of one line: the mark of wanjax, all fields of `Settings`, the model's name, frames per second
and scale of the file, and digests of the keyframes. No paths, no command line, no machine: clips get shared. It has the
shape of a run's own report (`clip.json`), which `read` understands too, also of earlier versions.

- MP4, WebM, GIF: the comment. PNG: the text chunk "Comment". WebP: the EXIF field UserComment.

`samplers.video` writes it, `wanjax.marks` knows a file by it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dacite
import numpy as np

from samplers.plan import Settings
from wanjax import marks
from wanjax.method import named
from wanjax.settings import renamed

SUFFIXES = (".mp4", ".webm", ".gif", ".webp", ".png", ".json")
_OF_THE_RUN = ("fps", "scale", "mesh")
"""What stands among the settings of a report and is none of `Settings`."""
_MEND = "give a clip or contact sheet that wanjax wrote, or the JSON beside it"


@dataclass(frozen=True)
class Keyframe:
    """One keyframe of a recalled clip; what the file does not tell is None.

    Attributes:
      frame: its pixel frame, from 0.
      sha256: `digest` of its pixels, fitted to the clip's size.
      path: where it was read from, in a report.
    """

    frame: int | None = None
    sha256: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class Recalled:
    """What a file says of how it was made.

    Attributes:
      settings: as the run had them.
      model: the model's name in its configuration.
      source: "tiny" or the model's path, in a report; None in clips.
      fps, scale: of the file; None where it does not tell.
      keyframes: in the order of their frames.
      written_by: the program and its version.
      storyboard: of a film's report, what it says of the clips; else None.
    """

    settings: Settings
    model: str
    source: str | None
    fps: float | None
    scale: int | None
    keyframes: tuple[Keyframe, ...]
    written_by: str
    storyboard: dict[str, Any] | None = None


def to_text(
    settings: Settings, *, model: str, fps: float, scale: int, keyframes: Sequence[np.ndarray], at: Sequence[int]
) -> str:
    """The text for `video.write` and `video.write_png`.

    Args:
      settings: of the run; fields that `Settings` gets later go in by themselves.
      model: its name; of a path the last part.
      keyframes: A of uint8 [H, W, 3], fitted to the clip's size (`Inputs.pixels`).
      at: their pixel frames, from 0.
    """
    fields = dataclasses.asdict(settings) | {"fps": fps, "scale": scale}
    told = [{"frame": int(frame), "sha256": digest(pixels)} for frame, pixels in zip(at, keyframes, strict=True)]
    name = model.replace("\\", "/").rstrip("/").rpartition("/")[2]
    value = marks.marked({"model": {"name": name}, "settings": fields, "keyframes": told})
    return json.dumps(value, allow_nan=False, default=_plain)


def digest(pixels: np.ndarray) -> str:
    """sha256 (hex) of a picture uint8 [H, W, 3], its size included."""
    size = " ".join(map(str, pixels.shape)).encode()
    return hashlib.sha256(size + np.ascontiguousarray(pixels, np.uint8).tobytes()).hexdigest()


def about_keyframes(recalled: Recalled, where: str, keyframes: Sequence[np.ndarray], at: Sequence[int]) -> list[str]:
    """A line for each keyframe that is another picture than the one a clip was made of; nothing where nobody tells.

    Args:
      where: what the lines call the clip.
      keyframes, at: of the run that is to be, as `to_text` takes them.
    """
    told = {one.frame: one.sha256 for one in recalled.keyframes if one.frame is not None and one.sha256 is not None}
    given = {int(frame): digest(pixels) for frame, pixels in zip(at, keyframes, strict=True)}
    lines = [f"keyframe at {frame} is not the picture that {where} was made of (or it is fitted another way)"
             for frame, own in given.items() if frame in told and told[frame] != own]  # fmt: skip
    if told and set(told) != set(given):
        places = [", ".join(map(str, sorted(one))) for one in (told, given)]
        lines.append(f"keyframes at {places[1]}, where {where} had them at {places[0]}")
    return lines


def read(path: str | Path) -> Recalled:
    """What a clip, a contact sheet, a frame, a folder of frames or a run's JSON was made of.

    Raises:
      ValueError: one line naming file and mend: no such file, damaged, of another program or of a version that wrote
        none, or with settings that this version does not know.
    """
    path = Path(path)
    if path.is_dir():
        path = _first_frame(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {_MEND}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: settings are not read from {suffix or 'such a file'}; give {', '.join(SUFFIXES)} "
                         "or a folder of PNG frames")  # fmt: skip
    try:
        text = _READERS[suffix](path)
    except Exception as error:  # readers of media raise nearly anything on damaged bytes
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as {suffix[1:]} ({told[:200]}); {_MEND}") from error
    if text is None or not text.lstrip().startswith("{"):
        raise ValueError(f"{path}: holds no settings; {_MEND}")
    return from_text(text, str(path))


def from_text(text: str, where: str) -> Recalled:
    """What `to_text` or a run's report says; `where` is what messages call it.

    Raises:
      ValueError: as `read`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: its settings are damaged ({error}); {_MEND}") from error
    if not isinstance(value, dict) or not isinstance(value.get("settings"), dict):
        raise ValueError(f"{where}: holds no settings; {_MEND}")
    by = value.get(marks.KEY)
    if by is not None and not marks.says(by):
        raise ValueError(f"{where}: was written by {str(by)[:60]!r}; {_MEND}")
    by = by or _version(value)
    fields = dict(value["settings"])
    other = {name: fields.pop(name, None) for name in _OF_THE_RUN}
    model = value.get("model")
    model = model if isinstance(model, dict) else {"name": model}
    name, source = model.get("name"), model.get("source")
    fps, scale = other["fps"], other["scale"]
    for label, given, kinds in (("model", name, str), ("model source", source, str | None),
                                ("fps", fps, int | float | None), ("scale", scale, int | None)):  # fmt: skip
        if not isinstance(given, kinds) or isinstance(given, bool):
            raise ValueError(f"{where}: {label} {given!r} is none; {_MEND}")
    return Recalled(settings(fields, where, by), name, source, fps, scale, _keyframes(value.get("keyframes")), by,
                    _storyboard(value.get("storyboard"), where))  # fmt: skip


def _storyboard(told: Any, where: str) -> dict[str, Any] | None:
    """What a film's report says of its clips. ValueError for what it does not say."""
    if told is None:
        return None
    clips = told.get("clips") if isinstance(told, dict) else None
    kinds = {"prompt": str, "frames": int, "seed": int}
    images, overlap = (told.get(name) if isinstance(told, dict) else None for name in ("images", "overlap"))
    whole = type(overlap) is int and all(isinstance(one, list) and one for one in (clips, images)) and all(
        isinstance(image, str) for image in images) and all(
        isinstance(clip, dict) and isinstance(clip.get(name), kind)
        for clip in clips for name, kind in kinds.items())  # fmt: skip
    if not whole:
        raise ValueError(f"{where}: its storyboard is damaged; {_MEND}")
    return told


def settings(fields: Mapping[str, Any], where: str, by: str = "another version") -> Settings:
    """`Settings` from their JSON, also by names of earlier versions; what is absent takes the default of `Settings`.

    Args:
      fields: by name; a method is its parts, or the name of a profile.
      where: what messages call it.
      by: who wrote them.

    Raises:
      ValueError: unknown fields, or values of a wrong kind or out of range of the method's settings.
    """
    fields = renamed(fields)
    try:
        if isinstance(fields.get("method"), str):
            fields = fields | {"method": dataclasses.asdict(named(fields["method"]))}
        return dacite.from_dict(Settings, _frozen(fields), dacite.Config(strict=True))
    except dacite.UnexpectedDataError as error:
        names = ", ".join(sorted(map(str, error.keys)))
        raise ValueError(f"{where}: setting {names} is unknown to {marks.mark()}, the file is by {by}; update wanjax, "
                         f"take the setting out of the JSON, or {_MEND}") from error  # fmt: skip
    except (dacite.DaciteError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: settings: {' '.join(str(error).split())}; mend the JSON, or {_MEND}") from error


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples that settings have, at any depth."""
    if isinstance(value, dict):
        return {name: _frozen(item) for name, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _keyframes(told: Any) -> tuple[Keyframe, ...]:
    """From a clip (frames and digests) or a report (paths of the first and the last); what is neither says nothing."""
    found = []
    for one in told if isinstance(told, list) else ():
        if isinstance(one, str):
            found.append(Keyframe(path=one))
        elif isinstance(one, dict):
            kinds = {"frame": int, "sha256": str, "path": str}
            found.append(Keyframe(**{k: one[k] for k, kind in kinds.items() if isinstance(one.get(k), kind)}))
    return tuple(found)


def _version(value: Mapping[str, Any]) -> str:
    """Who wrote a report from before the mark."""
    versions = value.get("versions")
    number = versions.get("wanjax") if isinstance(versions, dict) else None
    return f"wanjax {number}" if isinstance(number, str) else "an unknown version"


def _first_frame(folder: Path) -> Path:
    frames = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() == ".png")
    if not frames:
        raise ValueError(f"{folder}: a folder without PNG frames; {_MEND}")
    return frames[0]


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays for JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept in a file")


def _of_picture(path: Path) -> str | None:
    from PIL import Image  # here, as a JSON needs no picture library

    with Image.open(path) as image:
        if image.format == "WEBP":
            return _of_exif(image.getexif().get_ifd(marks.EXIF).get(marks.USER_COMMENT))
        text = image.info.get("comment" if image.format == "GIF" else marks.COMMENT)
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def _of_exif(comment: Any) -> str | None:
    if not isinstance(comment, bytes) or not comment.startswith(marks.ASCII):
        return None
    return comment.removeprefix(marks.ASCII).decode("ascii", "replace")


def _of_video(path: Path) -> str | None:
    import av

    with av.open(str(path)) as container:
        return {name.lower(): text for name, text in container.metadata.items()}.get("comment")


def _of_json(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")


_READERS = dict.fromkeys((".png", ".gif", ".webp"), _of_picture) | dict.fromkeys((".mp4", ".webm"), _of_video) | {
    ".json": _of_json
}  # fmt: skip
