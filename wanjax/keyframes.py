"""Keyframes: image files, frames of videos, pictures and arrays in; 8-bit RGB of the right size and units out.

Axis letters: H height, W width, 3 = red, green, blue. Sizes are (height, width) everywhere in this project,
unlike Pillow's (width, height); `read` and `image` are the only functions that hand out Pillow images.

Resampling is Pillow's: bicubic (a = -0.5), antialiased when shrinking, rounded to 8 bits. The Wan2.1 release
resizes with torch's bicubic instead (a = -0.75, not antialiased, not rounded), so a resized keyframe differs
slightly from its; one that already has the wanted size is the same to the bit. `diffusers` resizes with Pillow's
Lanczos, which is the other choice here. The CLIP input equals that of `transformers`' CLIP image processor, with the
centre crop switched off (stretch) or as it is by default (crop).
"""

import math
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from wanjax import colour, frames
from wanjax.settings import one_of, refuse
from wanjax.writing import absolute

Fit = Literal["stretch", "crop", "pad"]
ClipFit = Literal["stretch", "crop"]
Resample = Literal["bicubic", "lanczos"]

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
BLACK = (0, 0, 0)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What Pillow's readers raise on damaged files, found by feeding them cut and altered files of every format.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, OverflowError,
            RuntimeError, struct.error, zlib.error)  # fmt: skip
_REACHED = (
    (FileNotFoundError, "no such file; check the path of the keyframe"),
    (Exception, "cannot be reached ({}); check the path of the keyframe"),
)
_OPENED = (
    (Image.DecompressionBombError, "too many pixels ({}); make the image smaller"),
    (PermissionError, "no permission to read it; run chmod +r on it"),
    (frames.NoVideo, "neither an image nor a video that can be read ({}); convert it or copy it again"),
    (Exception, "truncated or damaged image ({}); save or copy it again"),
)


class KeyframeError(ValueError):
    """A keyframe file that cannot be used; the message is one line naming the file and the mend."""


class KeyframeWarning(UserWarning):
    """A keyframe file holds more than what is used of it."""


def image(source: Any, matte: Sequence[int] = BLACK, name: str = "keyframe") -> Image.Image:
    """A keyframe, however a Python program holds it, as 8-bit RGB, upright, in sRGB.

    Args:
      source: a path as `read` takes it, a Pillow image of any mode (treated as a file of it would be), or a NumPy, JAX
        or other array uint8 [H, W, 3].
      matte: see `read`.
      name: what messages call it.

    Raises:
      KeyframeError: anything else; the message says what it is and how to make it one of these.
    """
    if isinstance(source, str | os.PathLike):
        return read(source, matte)
    if isinstance(source, Image.Image):
        return _finish(source, name, matte)
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return Image.fromarray(_pixels(source, name))
    raise KeyframeError(f"{name}: {type(source).__name__}; give a path, a Pillow image or a uint8 array [H, W, 3]")


def split(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """The absolute path of a keyframe's file, and which of its frames: "clip.mp4@-1" is the last one of clip.mp4.

    A file whose own name ends like that is meant where it exists.

    Raises:
      KeyframeError: a name that no file can have.
    """
    with _in_words(path, _REACHED):
        whole = absolute(path)
        told = re.fullmatch(r"(?s)(.*[^/\\])@(-?\d+)", os.fspath(path))
        if told is None or os.path.lexists(whole):
            return whole, None
        return absolute(told[1]), int(told[2])


def read(path: str | os.PathLike[str], matte: Sequence[int] = BLACK) -> Image.Image:
    """Reads any image that Pillow opens, or a frame of a video, as 8-bit RGB, upright, in sRGB.

    "FILE@N" names frame N of a video or of an image with several frames (GIF, WebP, TIFF, APNG), from 0, or from the
    end if negative; a frame of a video (MP4, WebM, MOV, ...) has to be named.

    The EXIF orientation is applied, as is that of a video. Transparency (an alpha channel, a transparent palette entry
    or key colour) is composited over `matte`, three values in 0..255, by default black. Gray, palette, 1-bit, CMYK,
    YCbCr and Lab images are converted, by the embedded ICC profile where there is one (`wanjax.colour`); one that
    cannot be used is told with a `KeyframeWarning`. Deep gray images are scaled, never clipped: 16-bit ones by 65535;
    32-bit integers by 65535 too unless a value exceeds it, then by 2**31 - 1; floats by the smallest of 1, 255, 65535
    that holds their maximum. 16-bit colour arrives from Pillow already cut to its high byte. Of a file with several
    frames the first is taken if none is named, with a `KeyframeWarning`.

    Raises KeyframeError when the file is missing, a folder, empty, unreadable, not an image or video, or damaged, or
    has no such frame.
    """
    path, index = split(path)
    _check_file(path)
    try:
        with _in_words(path):
            opened = Image.open(path)
    except Image.UnidentifiedImageError as error:
        return _frame(path, index, error)
    with opened:
        if index is not None:
            _seek(opened, path, index)
        with _in_words(path):
            # A phone's MPO file is a JPEG followed by previews: no reason to warn about the rest.
            several = index is None and opened.format != "MPO" and getattr(opened, "is_animated", False)
        if several:
            warnings.warn(
                f"{path}: holds several frames; the first is used; name another as {path.name}@N",
                KeyframeWarning,
                stacklevel=2,
            )
        return _finish(opened, str(path), matte)


def _seek(opened: Image.Image, path: Path, index: int) -> None:
    with _in_words(path):
        count = getattr(opened, "n_frames", 1)
        if not -count <= index < count:
            raise frames.NoFrame(index, count)
        opened.seek(index % count)


def _frame(path: Path, index: int | None, error: Exception) -> Image.Image:
    """A frame of what Pillow does not know."""
    if index is None:
        mend = "not an image Pillow can open; convert it to PNG, JPEG or another common format"
        if path.suffix.lower() in frames.SUFFIXES:
            mend = f"a video; name one of its frames, such as {path.name}@0 or, the last, {path.name}@-1"
        raise KeyframeError(f"{path}: {mend}") from error
    with _in_words(path):
        return Image.fromarray(frames.frame(path, index))


@contextmanager
def _in_words(name: os.PathLike[str] | str, table: tuple[tuple[type, str], ...] = _OPENED) -> Iterator[None]:
    """What libraries raise of a file becomes a `KeyframeError`; where the caller has another way, it goes on."""
    try:
        yield
    except (KeyframeError, Image.UnidentifiedImageError):
        raise
    except frames.NoFrame as error:
        raise KeyframeError(f"{name}{error}") from None
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        words = next(words for kind, words in table if isinstance(error, kind))
        raise KeyframeError(f"{name}: {words.format(' '.join(str(error).split()))}") from error


def _finish(opened: Image.Image, name: str, matte: Sequence[int]) -> Image.Image:
    """Upright RGB of an opened image."""
    with _in_words(name):
        opened.load()
        # Turned before any conversion: Pillow keeps the palette and the transparent entry through it.
        upright = ImageOps.exif_transpose(opened)
    endless = upright.mode == "F" and not np.isfinite(np.asarray(upright)).all()
    refuse(
        (0 in upright.size, f"{name}: {upright.height}x{upright.width} pixels; give an image that has some"),
        (endless, f"{name}: holds NaN or infinite values; save it with finite ones"),
        error=KeyframeError,
    )
    converted, unused = colour.to_srgb(upright, tuple(matte))
    if unused is not None:
        warnings.warn(
            f"{name}: its colour profile cannot be used ({unused}); the colours are taken for sRGB",
            KeyframeWarning,
            stacklevel=3,
        )
    return converted


def _pixels(array: Any, name: str) -> np.ndarray:
    """uint8 [H, W, 3] of an array of any library, or the reason why it is none."""
    given = f"{name}: array {array.dtype} {tuple(array.shape)}"
    shape = tuple(array.shape)
    mend = "give uint8 [H, W, 3], values 0 to 255"
    refuse((0 in shape, f"{given}: holds no pixels; {mend}"), error=KeyframeError)
    if len(shape) == 4 and shape[0] == 1:
        mend = "give one image, array[0]"
    elif len(shape) == 2 or shape[-1:] == (1,):
        mend = "gray: give it three times, as np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=-1)"
    elif len(shape) == 3 and shape[-1] == 4:
        mend = "with alpha: give Image.fromarray(array), which is composited over the matte"
    elif len(shape) == 3 and shape[0] == 3 and shape[-1] != 3:
        mend = "channels last: give array.transpose(1, 2, 0)"
    refuse((len(shape) != 3 or shape[-1] != 3, f"{given}: not [H, W, 3]; {mend}"), error=KeyframeError)
    try:
        pixels = np.asarray(array)
    except Exception as error:  # whatever another library's arrays raise: on another device, with gradients, deleted
        raise KeyframeError(f"{given}: cannot be read ({str(error).splitlines()[0]}); give a NumPy array") from error
    mend = "np.rint(array * 255).astype(np.uint8) for values 0 to 1, keyframes.from_unit(array) for -1 to 1"
    if np.issubdtype(pixels.dtype, np.integer):
        mend = "array.astype(np.uint8) for values 0 to 255"
    refuse((pixels.dtype != np.uint8, f"{given}: not uint8; give {mend}"), error=KeyframeError)
    return np.ascontiguousarray(pixels)


def fit(
    image: Image.Image,
    height: int,
    width: int,
    mode: Fit = "stretch",
    matte: Sequence[int] = BLACK,
    resample: Resample = "bicubic",
) -> np.ndarray:
    """Brings an RGB image to [height, width, 3] uint8 with Pillow's antialiased filters.

    `stretch` (the default, as the published runs do: the size rule `area_size` keeps the aspect, so that
    little is stretched) resizes both axes independently; `crop` keeps the aspect and cuts what overhangs,
    equally on both sides; `pad` keeps the aspect and the whole image, centred over `matte`. An image that
    already has the size comes back unchanged to the bit. `resample` is "bicubic" as in the Wan2.1 release, or
    "lanczos" as in diffusers.

    Raises ValueError for an unknown mode or filter.
    """
    size, kernel = (width, height), _kernel(resample)
    if mode == "stretch":
        fitted = image.resize(size, kernel)
    elif mode == "crop":
        fitted = ImageOps.fit(image, size, kernel)
    elif mode == "pad":
        scale = min(width / image.width, height / image.height)
        # At least one pixel, so that a very long image stays a line and does not vanish.
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        fitted = Image.new("RGB", size, tuple(matte))
        corner = ((width - inner[0]) // 2, (height - inner[1]) // 2)
        fitted.paste(image.resize(inner, kernel), corner)
    else:
        raise ValueError(f"fit {mode!r}: choose stretch, crop or pad")
    return np.array(fitted)


def clip_input(
    image: Image.Image, size: int = 224, fit: ClipFit = "stretch", resample: Resample = "bicubic"
) -> np.ndarray:
    """The CLIP tower's input [size, size, 3], float32, from the ORIGINAL keyframe (not the fitted one).

    `stretch` brings it to a square without a crop, as the Wan2.1 release does; `crop` brings the shorter side to
    `size` and takes the centre, as `transformers`' processor and so diffusers do. Then it is normalised by CLIP's
    channel means and deviations.

    Raises ValueError for an unknown fit or filter.
    """
    if fit == "stretch":
        resized = image.resize((size, size), _kernel(resample))
    elif fit == "crop":
        short = min(image.size)
        width, height = (size if side == short else int(size * side / short) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = image.resize((width, height), _kernel(resample)).crop((left, top, left + size, top + size))
    else:
        raise ValueError(f"CLIP fit {fit!r}: choose stretch or crop")
    pixels = np.asarray(resized).astype(np.float32) / np.float32(255)
    return (pixels - np.asarray(CLIP_MEAN, np.float32)) / np.asarray(CLIP_STD, np.float32)


def _kernel(resample: str) -> Image.Resampling:
    return RESAMPLE[one_of("resample", resample, RESAMPLE)]


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """uint8 0..255 of any shape to float32 in [-1, 1], the units of the VAE."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def from_unit(values: np.ndarray) -> np.ndarray:
    """Floats in [-1, 1] of any shape to uint8: values outside are clipped, the rest rounded to nearest."""
    scaled = (np.clip(np.asarray(values, np.float32), -1, 1) + 1) * np.float32(127.5)
    return np.rint(scaled).astype(np.uint8)


def area_size(image_size: tuple[int, int], area: int, multiple: int = 16) -> tuple[int, int]:
    """The (height, width) with the aspect of `image_size` (height, width) and at most `area` pixels.

    sqrt(area * aspect) and sqrt(area / aspect), aspect = height / width, each brought down to a multiple of
    `multiple` (at least one). Computed in integers: the float formula of the Wan2.1 release loses a whole
    multiple when its root of an exact square comes out an ulp low.
    """
    height, width = image_size
    sides = (math.isqrt(area * height // width), math.isqrt(area * width // height))
    rows, columns = (max(1, side // multiple) * multiple for side in sides)
    return rows, columns


def _check_file(path: Path) -> None:
    with _in_words(path, _REACHED):
        status = path.stat()
    refuse(
        (stat.S_ISDIR(status.st_mode), f"{path}: a folder; name one image file in it"),
        (not stat.S_ISREG(status.st_mode), f"{path}: not a regular file; save the image to a file first"),
        (status.st_size == 0, f"{path}: an empty file; save or copy the image again"),
        error=KeyframeError,
    )
