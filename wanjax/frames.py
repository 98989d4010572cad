"""One frame of a video file, decoded by imageio (PyAV, which holds FFmpeg)."""

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv")
"""Names that a video usually has; what is read is decided by the content."""

_KEPT = 8  # so many last frames are held while looking for the end; to count further back costs a second pass


class NoVideo(ValueError):
    """Not a video that can be decoded; the message is what the decoder says."""


class NoFrame(ValueError):
    """The file has no such frame; the message is to stand behind its name."""

    def __init__(self, index: int, count: int):
        valid = f"0 to {count - 1}, or -{count} to -1 from the end" if count > 1 else "0 or -1"
        none = ": holds no frame that can be decoded; save or copy it again"
        super().__init__(f"@{index}: no such frame; the file holds {count}: give {valid}" if count else none)


def frame(path: Path, index: int) -> np.ndarray:
    """One frame, upright, uint8 [H, W, 3].

    Everything before it is decoded, and for a negative index everything there is: what containers tell of the number
    of frames is not always true.

    Args:
      index: from 0, or negative from the end.

    Raises:
      NoVideo: it is none that can be read.
      NoFrame: it is shorter; says how many frames there are.
    """
    import av  # here, as most keyframes are pictures

    asked = index
    try:
        if index < -_KEPT:
            count = sum(1 for _ in _frames(path))
            if count + index < 0:
                raise NoFrame(index, count)
            index += count
        kept: deque[np.ndarray] = deque(maxlen=max(1, -index))
        count = 0
        for count, one in enumerate(_frames(path), 1):
            kept.append(np.array(one))
            if count == index + 1:
                break
        if count < (index + 1 if index >= 0 else -index):
            raise NoFrame(asked, count)
        found = kept[0]
        return np.ascontiguousarray(np.rot90(found, _quarter_turns(path)))
    except (av.FFmpegError, OSError, IndexError, StopIteration) as error:
        raise NoVideo(" ".join(str(error).split())) from error


def _open(path: Path) -> Any:
    import imageio.v3 as iio

    return iio.imopen(path, "r", plugin="pyav")


def _frames(path: Path) -> Iterator[np.ndarray]:
    with _open(path) as video:
        yield from video.iter(format="rgb24", thread_type="FRAME")


def _quarter_turns(path: Path) -> int:
    """By how many quarters, counterclockwise, a frame is to be turned: telephones store the way they were held."""
    with _open(path) as video:
        matrix = video.metadata(index=0).get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    a, b = np.frombuffer(matrix, "=i4")[:2]
    return round(-math.atan2(b, a) / (math.pi / 2)) % 4
