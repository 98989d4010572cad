"""A folder of one's own videos: the first L stored frames of each, its first and last as the keyframes.

Frames are taken as they are stored, whatever their times: a video of varying rate is not resampled, and a GIF in
which a run of equal frames is one long frame gives it once. A picture that the file says is turned (phones) comes
upright.

Axis letters: L frames, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import os
from functools import partial
from itertools import islice
from pathlib import Path

import av
import numpy as np

from benchmarks.tgi.data import DataError, DataSet, Item, fingerprint, identified, read_json, refuse

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")


def videos(folder: str | os.PathLike[str], length: int, captions: str | os.PathLike[str] | None = None) -> DataSet:
    """All videos in a folder, by name; an item's id is the file name without its suffix.

    Every video is decoded once here, so that none turns out to be too short later. The identity's sha256 is over
    ids, captions and decoded frames.

    Args:
      folder: files with a name in SUFFIXES are read; others, hidden ones and folders are passed over.
      length: frames L, at least 2.
      captions: JSON file {file name: caption}; a video that it does not name has the caption "".

    Raises:
      DataError: all problems together, see `data.refuse`.
    """
    if length < 2:
        raise DataError(f"length {length}: a clip needs at least 2 frames")
    paths = _paths(Path(folder))
    told = {} if captions is None else _captions(Path(captions))
    names = {path.name for path in paths}
    problems = [f"{captions}: names {name!r}, no video in {folder}; correct it" for name in told if name not in names]
    items: dict[str, Item] = {}
    prints = []
    for path in paths:
        if path.stem in items:
            problems.append(f"{path.name}: another video is called {path.stem} too; rename one")
            continue
        read = partial(_read, path, length)
        item = items[path.stem] = Item(path.stem, "", told.get(path.name, ""), "", "", length, {}, read)
        try:
            prints.append(fingerprint(item, read()))
        except DataError as error:
            problems.append(str(error))
    refuse(problems)
    return identified("videos", "videos", list(items.values()), prints)


def _paths(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read as a folder ({error.strerror}); give a folder of videos") from error
    paths = [folder / name for name in names if not name.startswith(".")]
    paths = [path for path in paths if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    if not paths:
        raise DataError(f"{folder}: holds no video; put files of {', '.join(SUFFIXES)} there")
    return paths


def _captions(path: Path) -> dict[str, str]:
    told = read_json(path)
    if not isinstance(told, dict) or not all(isinstance(caption, str) for caption in told.values()):
        raise DataError(f'{path}: not captions by file name; write {{"clip.mp4": "a dog turns round"}}')
    return told


def _read(path: Path, length: int) -> np.ndarray:
    """The first frames, uint8 [L, H, W, 3]."""
    try:
        with av.open(str(path)) as container:
            streams = container.streams.video
            frames = [_upright(picture) for picture in islice(container.decode(streams[0]), length)] if streams else []
    except (av.error.FFmpegError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path.name}: not a readable video ({reason}); convert or copy it again") from error
    if len(frames) < length:
        raise DataError(f"{path.name}: {len(frames)} frames, {length} are needed; remove it or take a shorter length")
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{path.name}: its frames change size; convert it to one size")
    return np.stack(frames)


def _upright(picture: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3]."""
    turned = getattr(picture, "rotation", 0)  # degrees counterclockwise; the oldest PyAV allowed does not tell
    return np.rot90(picture.to_ndarray(format="rgb24"), round(turned / 90))
