"""Videos, contact sheets and settings out, without half-written files.

Axis letters: T frames, H height, W width, 3 = red, green, blue; all pixels are uint8. Everything is written
into a hidden folder (.wanjax-*) beside its final place and moved there by one rename at the end, so that the
final name either holds a complete result or nothing new, also after Ctrl-C or a full disk.
"""

import contextlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# suffix -> (encoder, options). Both constant quality, high; webm's "b" of 0 turns off its rate limit.
CODECS = {
    ".mp4": ("libx264", {"crf": "10", "preset": "medium"}),
    ".webm": ("libvpx-vp9", {"crf": "10", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}),
}
SUFFIXES = (*CODECS, ".gif", ".webp")
# Longest side that each format or its encoder takes; a folder of PNG frames has no practical limit.
MAX_SIDE = {".mp4": 16384, ".webm": 16384, ".gif": 65535, ".webp": 16383}

_HIDDEN = ".wanjax-"
_FRAME_FILE = re.compile(r"\d{5,}\.png")
_BT709 = 1  # the code of ITU-R BT.709 for primaries, transfer and matrix alike in ISO/IEC 23091-2
_LIMITED_RANGE = 1


class OutputError(ValueError):
    """An output that cannot be written; the message is one line naming it and the mend."""


@dataclass(frozen=True)
class Outputs:
    """Where a run's results go: the video (or folder of frames), its contact sheet and its settings."""

    video: Path
    sheet: Path
    settings: Path


def check_output(path: str | os.PathLike[str], overwrite: bool = False) -> Outputs:
    """Checks, before any compute, that a video can be written to `path`, and says what goes beside it.

    A name without a suffix is a folder of PNG frames. The contact sheet is `<stem>.sheet.png` and the
    settings `<stem>.json`, in the same folder as the video. That folder must exist; that it can be written to
    is tried.

    Raises OutputError for an unknown suffix, a missing or unwritable folder, something other than a regular
    file (or a folder of frames) under one of the three names, or an existing one without `overwrite`.
    """
    path = Path(path)
    if path.name.lower() in ("", "..", *SUFFIXES):
        raise OutputError(f"output {str(path)!r}: names no file; give one such as clip.mp4")
    suffix = path.suffix.lower()
    if suffix and suffix not in SUFFIXES:
        raise OutputError(
            f"output {path}: unknown suffix {path.suffix}; use {', '.join(SUFFIXES)} or, for a folder of PNG "
            f"frames, a name without a dot"
        )
    check_folder(path)
    outputs = Outputs(path, path.with_name(f"{path.stem}.sheet.png"), path.with_name(f"{path.stem}.json"))
    for target in (outputs.video, outputs.sheet, outputs.settings):
        _check_target(target, folder=target is outputs.video and not suffix, overwrite=overwrite)
    return outputs


def check_fps(fps: float) -> None:
    """Raises ValueError unless the frames per second are within what every format holds, 0.1 to 1000."""
    if not 0.1 <= fps <= 1000:
        raise ValueError(f"fps {fps}: must be from 0.1 to 1000")


def check_sides(path: str | os.PathLike[str], height: int, width: int) -> None:
    """Raises OutputError when a video of this size, in pixels after scaling, does not fit the format."""
    limit = MAX_SIDE.get(Path(path).suffix.lower())
    if limit is not None and max(height, width) > limit:
        raise OutputError(
            f"output {path}: {height}x{width} pixels after scaling, the format holds {limit} a side; use a smaller "
            f"scale or a folder of PNG frames"
        )


@contextlib.contextmanager
def staged(outputs: Outputs) -> Iterator[Outputs]:
    """Names to write all three outputs to; they appear under their own names together when the block ends well.

    On any exception, KeyboardInterrupt included, none of them does, and what was there before stays.
    """
    with tempfile.TemporaryDirectory(prefix=_HIDDEN, dir=outputs.video.parent) as hidden:
        pairs = [(Path(hidden) / path.name, path) for path in (outputs.video, outputs.sheet, outputs.settings)]
        yield Outputs(*(part for part, _ in pairs))
        for part, path in reversed(pairs):  # the video last: where it is, the others are
            _move(part, path, Path(hidden))


def write(path: str | os.PathLike[str], frames: np.ndarray, fps: float, scale: int = 1) -> None:
    """Writes uint8 frames [T, H, W, 3] as the video the suffix of `path` names, enlarged `scale` times.

    - .mp4: H.264, .webm: VP9; both 4:2:0 in BT.709, near-transparent quality. That needs even sides, so an
      odd height or width repeats its last row or column once.
    - .gif: 256 colours a frame, times rounded to 1/100 s so that they do not drift. .webp: lossless, times in
      ms. Both loop. These two formats store a run of identical frames as one frame of the run's duration.
    - no suffix: a folder of PNG files 00000.png, 00001.png, ...; `fps` is not kept.

    Replaces what `path` held (of a folder: only one of frames); `check_output` asks before. On any exception,
    KeyboardInterrupt included, nothing new stays on disk.

    Raises ValueError for frames of another shape or dtype, no frames, or fps or scale out of range;
    OutputError for an unknown suffix.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames {frames.dtype} {frames.shape}: give uint8 [T, H, W, 3] with T at least 1")
    check_fps(fps)
    if suffix and suffix not in SUFFIXES:
        raise OutputError(f"output {path}: unknown suffix {path.suffix}; use {', '.join(SUFFIXES)}")
    with _replacing(path) as part:
        if suffix in CODECS:
            _encode(part, suffix, frames, fps, scale)
        elif suffix:
            _animate(part, suffix, frames, fps, scale)
        else:
            part.mkdir()
            for index, frame in enumerate(frames):
                Image.fromarray(enlarge(frame, scale)).save(part / f"{index:05d}.png", compress_level=3)


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """Nearest-neighbour enlargement of [..., H, W, 3] by a whole factor: [..., factor H, factor W, 3].

    Raises ValueError when the factor is not at least 1.
    """
    if factor < 1:
        raise ValueError(f"scale {factor}: must be a whole number of at least 1")
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def enlarge_factor(height: int, width: int, target: int = 256) -> int:
    """The smallest whole factor that brings the shorter side to `target` pixels; 1 for what is larger."""
    return math.ceil(target / min(height, width, target))


def contact_sheet(
    frames: np.ndarray, keyframes: Sequence[np.ndarray] = (), columns: int = 7, rows: int = 2
) -> np.ndarray:
    """One picture of a video: evenly chosen frames, the first and the last among them, labelled by number.

    frames: uint8 [T, H, W, 3]; `keyframes`: up to two images uint8 [H, W, 3] which the video was made from,
    set before the first and after the last frame, to compare. At most columns * rows tiles, read row by row;
    small frames are enlarged by nearest neighbour to about 128 pixels, large ones reduced to at most 384.
    Returns uint8 [sheet height, sheet width, 3].

    Raises ValueError when the tiles cannot hold two frames and the keyframes, or a keyframe has another size.
    """
    places = columns * rows - len(keyframes)
    if places < 2 or len(keyframes) > 2:
        raise ValueError(
            f"contact sheet of {columns}x{rows} tiles: too small for 2 frames and {len(keyframes)} keyframes "
            f"(at most two); use more columns"
        )
    for keyframe in keyframes:
        if keyframe.shape != frames.shape[1:]:
            raise ValueError(f"keyframe {keyframe.shape}: fit it to the video's {frames.shape[1:]} first")
    chosen = np.unique(np.rint(np.linspace(0, len(frames) - 1, places)).astype(int))
    tiles = [(f"{index}", frames[index]) for index in chosen]
    if len(keyframes):
        tiles.insert(0, ("first keyframe", keyframes[0]))
    if len(keyframes) == 2:
        tiles.append(("last keyframe", keyframes[1]))
    return _grid(tiles, min(columns, len(tiles)))


def write_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] as a PNG file, whole or not at all."""
    with _replacing(Path(path)) as part:
        Image.fromarray(image).save(part, format="PNG")


def write_json(path: str | os.PathLike[str], settings: Any) -> None:
    """Writes what `json` can hold, indented and in UTF-8, whole or not at all.

    Raises TypeError for a value JSON does not know and ValueError for NaN and infinity, which it does not
    either.
    """
    text = json.dumps(settings, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with _replacing(Path(path)) as part:
        # A lone surrogate (an undecodable byte of a command line) becomes \udcxx, which is JSON's own escape.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to (a file or a folder) in a hidden folder beside `path`, renamed to it at the end."""
    with tempfile.TemporaryDirectory(prefix=_HIDDEN, dir=path.parent) as hidden:
        part = Path(hidden) / f"new{path.suffix}"
        yield part
        _move(part, path, Path(hidden))


def _move(part: Path, path: Path, hidden: Path) -> None:
    """Renames a finished file or folder to its final name."""
    if not part.is_dir() or not path.exists():
        os.replace(part, path)
        return
    # A folder that holds something cannot be renamed over: the old one steps aside, and back on failure.
    _check_frame_folder(path)
    old = hidden / "old"
    os.replace(path, old)
    try:
        os.replace(part, path)
    except BaseException:
        os.replace(old, path)
        raise


def check_folder(path: Path) -> None:
    """Raises OutputError unless the folder that `path` lies in exists and can be written to, which is tried."""
    parent = path.parent
    if not parent.exists():
        raise OutputError(f"output {path}: no folder {parent}; create it with mkdir -p {parent}")
    if not parent.is_dir():
        raise OutputError(f"output {path}: {parent} is not a folder; choose another place")
    try:
        # Tried, not asked: permissions say little about read-only mounts, quotas, network drives and root.
        with tempfile.TemporaryDirectory(prefix=_HIDDEN, dir=parent) as hidden:
            (Path(hidden) / "probe").write_bytes(b"probe")
    except OSError as error:
        raise OutputError(
            f"output {path}: cannot write in folder {parent} ({error.strerror}); choose another place"
        ) from error


def _check_target(target: Path, folder: bool, overwrite: bool) -> None:
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        if not target.is_symlink():
            return
        raise OutputError(f"output {target}: a dangling link; remove it or choose another name") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"output {target}: not a usable name ({error}); choose another") from error
    if folder:
        if not stat.S_ISDIR(mode) or target.is_symlink():
            raise OutputError(f"output {target}: exists and is not a folder; add a suffix or choose another name")
        _check_frame_folder(target)
        if any(target.iterdir()) and not overwrite:
            raise OutputError(f"output {target}: the folder holds frames; pass --overwrite or choose another name")
        return
    if stat.S_ISDIR(mode):
        raise OutputError(f"output {target}: exists and is a folder; choose another name")
    if not stat.S_ISREG(mode):
        raise OutputError(f"output {target}: exists and is not a regular file; choose another name")
    if not overwrite:
        raise OutputError(f"output {target}: exists; pass --overwrite or choose another name")


def _check_frame_folder(path: Path) -> None:
    """Refuses a folder that holds anything but frames, so that overwriting never loses other files."""
    foreign = [entry.name for entry in path.iterdir() if not _FRAME_FILE.fullmatch(entry.name)]
    if foreign:
        raise OutputError(f"output {path}: the folder holds {min(foreign)!r}, not only frames; choose another name")


def _encode(path: Path, suffix: str, frames: np.ndarray, fps: float, scale: int) -> None:
    codec, options = CODECS[suffix]
    height, width = (side * scale for side in frames.shape[1:3])
    rate = Fraction(fps).limit_denominator(65535)
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    container_options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    with av.open(str(path), "w", format=suffix[1:], options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = height + odd[0][1], width + odd[1][1]
        stream.pix_fmt = "yuv420p"
        # Untagged files leave the matrix to the player's guess, which shifts the colours.
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED_RANGE
        for index, frame in enumerate(frames):
            pixels = np.pad(enlarge(frame, scale), odd, mode="edge")
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            picture.pts = index
            picture.time_base = 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _animate(path: Path, suffix: str, frames: np.ndarray, fps: float, scale: int) -> None:
    # GIF counts hundredths of a second, WebP thousandths; rounding the frame's time and not its length
    # keeps the whole in step.
    tick = 10 if suffix == ".gif" else 1
    times = np.rint(np.arange(len(frames) + 1) * (1000 / fps / tick)).astype(int) * tick
    durations = np.maximum(np.diff(times), tick).tolist()
    images = (Image.fromarray(enlarge(frame, scale)) for frame in frames)
    # WebP: at 480x864 as small as with the default effort (80, 2) in a third of the time.
    webp = {"lossless": True, "quality": 30, "method": 1}
    options: dict[str, Any] = webp if suffix == ".webp" else {"disposal": 1}
    options |= {"format": suffix[1:], "save_all": True, "duration": durations, "loop": 0}
    with path.open("wb") as file:  # opened here, as Pillow leaves its own file open on KeyboardInterrupt
        next(images).save(file, append_images=images, **options)


def _grid(tiles: Sequence[tuple[str, np.ndarray]], columns: int) -> np.ndarray:
    """Pastes labelled pictures of one size, row by row, on a dark ground."""
    height, width = tiles[0][1].shape[:2]
    factor = enlarge_factor(height, width, 128)
    shrink = math.ceil(max(height, width) / 384)
    pictures = [Image.fromarray(enlarge(pixels, factor)) for _, pixels in tiles]
    if factor == 1 and shrink > 1:
        pictures = [picture.reduce(shrink) for picture in pictures]
    gap, label = 4, 14
    step_x, step_y = pictures[0].width + gap, pictures[0].height + gap + label
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), (24, 24, 24))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for place, ((text, _), picture) in enumerate(zip(tiles, pictures, strict=True)):
        corner = (gap + place % columns * step_x, gap + place // columns * step_y)
        draw.text(corner, text, fill=(230, 230, 230), font=font)
        sheet.paste(picture, (corner[0], corner[1] + label))
    return np.asarray(sheet)
