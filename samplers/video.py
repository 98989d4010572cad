"""Videos, contact sheets and settings out, without half-written files.

Axis letters: T frames, H height, W width, 3 = red, green, blue; all pixels are uint8. Everything is written
through `wanjax.writing`, so that the final name either holds a complete result or nothing new, also after Ctrl-C
or a full disk, and carries the mark by which wanjax knows its own files again (`wanjax.marks`).
"""

import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from wanjax import marks, writing
from wanjax.writing import Checked, OutputError, Target

# suffix -> (encoder, options). Both constant quality, high; webm's "b" of 0 turns off its rate limit.
CODECS = {
    ".mp4": ("libx264", {"crf": "10", "preset": "medium"}),
    ".webm": ("libvpx-vp9", {"crf": "10", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}),
}
SUFFIXES = (*CODECS, ".gif", ".webp")
# Longest side that each format or its encoder takes; a folder of PNG frames has no practical limit.
MAX_SIDE = {".mp4": 16384, ".webm": 16384, ".gif": 65535, ".webp": 16383}

_FRAME_FILE = re.compile(r"\d{5,}\.png")
_BT709 = 1  # the code of ITU-R BT.709 for primaries, transfer and matrix alike in ISO/IEC 23091-2
_LIMITED_RANGE = 1


@dataclass(frozen=True)
class Outputs:
    """Where a run's results go: the video (or folder of frames), its contact sheet and its settings.

    Attributes:
      checked: what `check_output` found there, for `staged`; None for the hidden names that it yields.
    """

    video: Path
    sheet: Path
    settings: Path
    checked: Checked | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines that the user should see, on what runs that were stopped had left beside the outputs."""
        return self.checked.notes if self.checked is not None else ()


def check_output(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
    also: Sequence[Target] = (),
) -> Outputs:
    """Checks, before any compute, that a video can be written to `path`, and says what goes beside it.

    A name without a suffix is a folder of PNG frames. The contact sheet is `<stem>.sheet.png` and the
    settings `<stem>.json`, in the same folder as the video. That folder must exist; that it can be written to
    is tried, and what stopped runs left in it is removed (`Outputs.notes`).

    Args:
      overwrite: whether outputs of wanjax that stand there may be replaced.
      inputs: files and folders that the run reads, which no output may replace.
      also: more files or folders of the same run, which appear with the others (`staged_also`).

    Raises:
      OutputError: an unknown suffix, a missing or unwritable folder, an input or something that wanjax did not
        write under one of the names, something that it did without `overwrite`.
    """
    named = name_outputs(path)
    targets = [_target(named.video), Target(named.sheet), Target(named.settings), *also]
    return replace(named, checked=writing.check(targets, inputs=inputs, overwrite=overwrite))


def name_outputs(path: str | os.PathLike[str]) -> Outputs:
    """What a run writes for `path`, without a look at what is there. OutputError for a name that no video can have."""
    path = Path(path)
    if path.name.lower() in ("", "..", *SUFFIXES):
        raise OutputError(f"output {str(path)!r}: names no file; give one such as clip.mp4")
    _check_suffix(path)
    try:
        path = writing.absolute(path)
    except ValueError as error:
        raise OutputError(f"output {error}") from error
    return Outputs(path, path.with_name(f"{path.stem}.sheet.png"), path.with_name(f"{path.stem}.json"))


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

    On any exception, KeyboardInterrupt included, none of them does, and what was there before stays. Inside the
    block no other run can begin on the same names.

    Raises:
      OutputError: another run is writing one of them, or something appeared or changed there since `check_output`.
    """
    with staged_also(outputs) as (parts, _):
        yield parts


@contextlib.contextmanager
def staged_also(outputs: Outputs) -> Iterator[tuple[Outputs, tuple[Path, ...]]]:
    """`staged`, and hidden names for the targets that `check_output` was given as `also`."""
    if outputs.checked is None:
        raise ValueError("outputs: give what check_output returned")
    with writing.staged(outputs.checked) as (video, sheet, settings, *also):
        yield Outputs(video, sheet, settings), tuple(also)


def write(
    path: str | os.PathLike[str], frames: np.ndarray, fps: float, scale: int = 1, made_of: str | None = None
) -> None:
    """Writes uint8 frames [T, H, W, 3] as the video the suffix of `path` names, enlarged `scale` times.

    - .mp4: H.264, .webm: VP9; both 4:2:0 in BT.709, near-transparent quality. That needs even sides, so an
      odd height or width repeats its last row or column once.
    - .gif: 256 colours a frame, times rounded to 1/100 s so that they do not drift. .webp: lossless, times in
      ms. Both loop. These two formats store a run of identical frames as one frame of the run's duration.
    - no suffix: a folder of PNG files 00000.png, 00001.png, ...; `fps` is not kept.

    `made_of` is what `recall.to_text` says of the clip, kept in the file (in every PNG of a folder).

    Replaces what `path` held if wanjax wrote it; `check_output` asks before. On any exception, KeyboardInterrupt
    included, nothing new stays on disk.

    Raises ValueError for frames of another shape or dtype, no frames, or fps or scale out of range;
    OutputError for an unknown suffix, or something that wanjax did not write.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames {frames.dtype} {frames.shape}: give uint8 [T, H, W, 3] with T at least 1")
    check_fps(fps)
    _check_suffix(path)
    with _replacing(path) as part:
        if suffix in CODECS:
            _encode(part, suffix, frames, fps, scale, made_of)
        elif suffix:
            _animate(part, suffix, frames, fps, scale, made_of)
        else:
            part.mkdir()
            for index, frame in enumerate(frames):
                picture = Image.fromarray(enlarge(frame, scale))
                picture.save(part / f"{index:05d}.png", compress_level=3, pnginfo=_png_mark(made_of))


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
    frames: np.ndarray,
    keyframes: Sequence[np.ndarray] = (),
    columns: int = 7,
    rows: int = 2,
    at: Sequence[int] | None = None,
) -> np.ndarray:
    """One picture of a video: evenly chosen frames, the first and the last among them, labelled by number.

    frames: uint8 [T, H, W, 3]; `keyframes`: images uint8 [H, W, 3] which the video was made from, set before the frame
    in whose place they are, the last frame's after it, to compare; `at`: these places, ascending, by default the two
    ends. At most columns * rows tiles, read row by row, with as many rows more as several keyframes need; small frames
    are enlarged by nearest neighbour to about 128 pixels, large ones reduced to at most 384. Returns uint8
    [sheet height, sheet width, 3].

    Raises ValueError when the tiles cannot hold two frames and the keyframes, a keyframe has another size, or there are
    not as many places as keyframes.
    """
    last = len(frames) - 1
    at = (0, last)[: len(keyframes)] if at is None else tuple(at)
    if len(at) != len(keyframes):
        raise ValueError(f"contact sheet: {len(keyframes)} keyframes at {len(at)} places; give a place for each")
    for keyframe in keyframes:
        if keyframe.shape != frames.shape[1:]:
            raise ValueError(f"keyframe {keyframe.shape}: fit it to the video's {frames.shape[1:]} first")
    inner = [place for place in at if 0 < place < last]
    rows += math.ceil(2 * len(inner) / columns)
    places = columns * rows - len(keyframes) - len(inner)
    if places < 2:
        raise ValueError(
            f"contact sheet of {columns}x{rows} tiles: too small for 2 frames and {len(keyframes)} keyframes; use more "
            "columns"
        )
    chosen = np.unique([*np.rint(np.linspace(0, last, places)).astype(int), *inner])
    names = {0: "first keyframe", last: "last keyframe"}
    tiles = []
    for index in chosen:
        own = [(names.get(place, f"keyframe {place}"), pixels)
               for place, pixels in zip(at, keyframes, strict=True) if place == index]  # fmt: skip
        frame = [(f"{index}", frames[index])]
        tiles += frame + own if index == last else own + frame
    return _grid(tiles, min(columns, len(tiles)))


def variants_sheet(variants: Mapping[str, Sequence[tuple[int, np.ndarray]]]) -> np.ndarray:
    """One picture of several videos, a row for each.

    Args:
      variants: name -> (number, frame uint8 [H, W, 3]) of evenly chosen frames, as many of each.

    Returns:
      uint8 [sheet height, sheet width, 3].
    """
    tiles = [(f"{name} \u00b7 {index}", frame) for name, frames in variants.items() for index, frame in frames]
    return _grid(tiles, len(next(iter(variants.values()))))


def write_png(path: str | os.PathLike[str], image: np.ndarray, made_of: str | None = None) -> None:
    """Writes uint8 [H, W, 3] as a PNG file, whole or not at all; replaces one that wanjax wrote.

    `made_of` as in `write`.
    """
    with _replacing(Path(path)) as part:
        Image.fromarray(image).save(part, format="PNG", pnginfo=_png_mark(made_of))


def write_json(path: str | os.PathLike[str], settings: Any) -> None:
    """`wanjax.writing.write_json`; replaces a file that wanjax wrote."""
    writing.write_json(path, settings, overwrite=True)


def check_folder(path: Path) -> None:
    """Raises OutputError unless the folder that `path` lies in exists and can be written to, which is tried."""
    writing.check_parent(Target(writing.absolute(path)))


def _check_suffix(path: Path) -> None:
    if path.suffix and path.suffix.lower() not in SUFFIXES:
        raise OutputError(
            f"output {path}: unknown suffix {path.suffix}; use {', '.join(SUFFIXES)} or, for a folder of PNG "
            f"frames, a name without a dot"
        )


def _target(path: Path) -> Target:
    return Target(path, folder=not path.suffix, names=_FRAME_FILE.fullmatch)


def _replacing(path: Path) -> contextlib.AbstractContextManager[Path]:
    """A hidden name to write to, renamed to `path` at the end."""
    target = _target(writing.absolute(path))
    return writing.beside(target.path, folder=target.folder, names=target.names, overwrite=True)


def _png_mark(made_of: str | None) -> PngInfo:
    info = PngInfo()
    info.add_text("Software", marks.mark())
    if made_of is not None:
        info.add_text(marks.COMMENT, made_of)
    return info


def _encode(path: Path, suffix: str, frames: np.ndarray, fps: float, scale: int, made_of: str | None) -> None:
    codec, options = CODECS[suffix]
    height, width = (side * scale for side in frames.shape[1:3])
    rate = Fraction(fps).limit_denominator(65535)
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    container_options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    with av.open(str(path), "w", format=suffix[1:], options=container_options) as container:
        container.metadata["comment"] = made_of or marks.mark()
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


def _animate(path: Path, suffix: str, frames: np.ndarray, fps: float, scale: int, made_of: str | None) -> None:
    # GIF counts hundredths of a second, WebP thousandths; rounding the frame's time and not its length
    # keeps the whole in step.
    tick = 10 if suffix == ".gif" else 1
    times = np.rint(np.arange(len(frames) + 1) * (1000 / fps / tick)).astype(int) * tick
    durations = np.maximum(np.diff(times), tick).tolist()
    exif = Image.Exif()
    exif[marks.SOFTWARE] = marks.mark()
    if made_of is not None:
        exif[marks.EXIF] = {marks.USER_COMMENT: marks.ASCII + made_of.encode("ascii")}
    # WebP: at 480x864 as small as with the default effort (80, 2) in a third of the time.
    webp = {"lossless": True, "quality": 30, "method": 1, "exif": exif.tobytes()}
    options: dict[str, Any] = (
        webp if suffix == ".webp" else {"disposal": 1, "comment": (made_of or marks.mark()).encode()}
    )
    options |= {"save_all": True, "duration": durations, "loop": 0}
    pictures = np.stack([enlarge(frame, scale) for frame in frames])
    # Opened here, as Pillow leaves its own file open on KeyboardInterrupt.
    with path.open("wb") as file, iio.imopen(file, "w", plugin="pillow", extension=suffix) as container:
        container.write(pictures, is_batch=True, **options)


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
