"""Keyframes: image files in, 8-bit RGB arrays of the right size and in the right units out.

Axis letters: H height, W width, 3 = red, green, blue. Sizes are (height, width) everywhere in this project,
unlike Pillow's (width, height); `read` is the only function that hands out a Pillow image.

Resampling is Pillow's: bicubic (a = -0.5), antialiased when shrinking, rounded to 8 bits. The Wan2.1 release
resizes with torch's bicubic instead (a = -0.75, not antialiased, not rounded), so a resized keyframe differs
slightly from its; one that already has the wanted size is the same to the bit. The CLIP input equals that of
`transformers`' CLIP image processor with the centre crop switched off.
"""

import math
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

Fit = Literal["stretch", "crop", "pad"]

BLACK = (0, 0, 0)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What Pillow's readers raise on damaged files, found by feeding them cut and altered files of every format.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, OverflowError,
            RuntimeError, struct.error, zlib.error)  # fmt: skip


class KeyframeError(ValueError):
    """A keyframe file that cannot be used; the message is one line naming the file and the mend."""


class KeyframeWarning(UserWarning):
    """A keyframe file holds more than what is used of it."""


def read(path: str | os.PathLike[str], matte: Sequence[int] = BLACK) -> Image.Image:
    """Reads any image that Pillow opens as 8-bit RGB, upright.

    The EXIF orientation is applied. Transparency (an alpha channel, a transparent palette entry or key
    colour) is composited over `matte`, three values in 0..255, by default black. Gray, palette, 1-bit, CMYK,
    YCbCr and Lab images are converted; embedded ICC profiles are not applied. Deep gray images are scaled,
    never clipped: 16-bit ones by 65535; 32-bit integers by 65535 too unless a value exceeds it, then by 2**31
    - 1; floats by the smallest of 1, 255, 65535 that holds their maximum. 16-bit colour arrives from Pillow
    already cut to its high byte. Of a file with several frames (GIF, WebP, TIFF, APNG) the first is taken,
    with a `KeyframeWarning`.

    Raises KeyframeError when the file is missing, a folder, empty, unreadable, not an image, or damaged.
    """
    path = Path(path)
    _check_file(path)
    try:
        image = Image.open(path)
    except Image.UnidentifiedImageError as error:
        raise KeyframeError(
            f"{path}: not an image Pillow can open; convert it to PNG, JPEG or another common format"
        ) from error
    except Image.DecompressionBombError as error:
        raise KeyframeError(f"{path}: too many pixels ({error}); make the image smaller") from error
    except PermissionError as error:
        raise KeyframeError(f"{path}: no permission to read it; run chmod +r on it") from error
    except _DAMAGED as error:
        raise KeyframeError(f"{path}: truncated or damaged image ({error}); save or copy it again") from error
    with image:
        try:
            # A phone's MPO file is a JPEG followed by previews: no reason to warn about the rest.
            several = image.format != "MPO" and getattr(image, "is_animated", False)
            image.load()
            # Turned before any conversion: Pillow keeps the palette and the transparent entry through it.
            upright = ImageOps.exif_transpose(image)
        except _DAMAGED as error:
            raise KeyframeError(f"{path}: truncated or damaged image ({error}); save or copy it again") from error
        if several:
            warnings.warn(f"{path}: holds several frames; the first is used", KeyframeWarning, stacklevel=2)
        if upright.mode == "F" and not np.isfinite(np.asarray(upright)).all():
            raise KeyframeError(f"{path}: holds NaN or infinite values; save it with finite ones")
        return _to_rgb(upright, tuple(matte))


def fit(image: Image.Image, height: int, width: int, mode: Fit = "stretch", matte: Sequence[int] = BLACK) -> np.ndarray:
    """Brings an RGB image to [height, width, 3] uint8 with Pillow's antialiased bicubic.

    `stretch` (the default, as the published runs do: the size rule `area_size` keeps the aspect, so that
    little is stretched) resizes both axes independently; `crop` keeps the aspect and cuts what overhangs,
    equally on both sides; `pad` keeps the aspect and the whole image, centred over `matte`. An image that
    already has the size comes back unchanged to the bit.

    Raises ValueError for an unknown mode.
    """
    size = (width, height)
    if mode == "stretch":
        fitted = image.resize(size, Image.Resampling.BICUBIC)
    elif mode == "crop":
        fitted = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    elif mode == "pad":
        scale = min(width / image.width, height / image.height)
        # At least one pixel, so that a very long image stays a line and does not vanish.
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        fitted = Image.new("RGB", size, tuple(matte))
        corner = ((width - inner[0]) // 2, (height - inner[1]) // 2)
        fitted.paste(image.resize(inner, Image.Resampling.BICUBIC), corner)
    else:
        raise ValueError(f"fit {mode!r}: choose stretch, crop or pad")
    return np.array(fitted)


def clip_input(image: Image.Image, size: int = 224) -> np.ndarray:
    """The CLIP tower's input [size, size, 3], float32, from the ORIGINAL keyframe (not the fitted one).

    Stretched to a square by bicubic, without a crop, then normalised by CLIP's channel means and deviations.
    """
    pixels = fit(image, size, size).astype(np.float32) / np.float32(255)
    return (pixels - np.asarray(CLIP_MEAN, np.float32)) / np.asarray(CLIP_STD, np.float32)


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


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises ValueError naming the nearest allowed size unless both sides are positive multiples.

    `multiple` is the VAE's spatial stride times the DiT's spatial patch: 16 for Wan2.1.
    """
    nearest = [max(1, (side + multiple // 2) // multiple) * multiple for side in (height, width)]
    if [height, width] != nearest:
        raise ValueError(
            f"size {height}x{width}: height and width must be positive multiples of {multiple}; "
            f"the nearest size is {nearest[0]}x{nearest[1]}"
        )


def check_frames(frames: int, temporal_stride: int) -> None:
    """Raises ValueError naming the two nearest counts unless frames = temporal_stride * n + 1 with n >= 1.

    n = 0 would be one frame, which cannot be both keyframes.
    """
    below = max(1, (frames - 1) // temporal_stride) * temporal_stride + 1
    if frames != below:
        raise ValueError(
            f"frames {frames}: must be {temporal_stride}n+1 with n at least 1; "
            f"the nearest are {below} and {below + temporal_stride}"
        )


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise KeyframeError(f"{path}: no such file; check the path of the keyframe") from error
    except (OSError, ValueError) as error:
        raise KeyframeError(f"{path}: cannot be reached ({error}); check the path of the keyframe") from error
    if stat.S_ISDIR(status.st_mode):
        raise KeyframeError(f"{path}: a folder; name one image file in it")
    if not stat.S_ISREG(status.st_mode):
        raise KeyframeError(f"{path}: not a regular file; save the image to a file first")
    if status.st_size == 0:
        raise KeyframeError(f"{path}: an empty file; save or copy the image again")


def _to_rgb(image: Image.Image, matte: tuple[int, ...]) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        gray = Image.fromarray(_to_eight_bits(values, image.mode))
        if isinstance(transparency, int):
            key = Image.fromarray(np.where(values == transparency, 0, 255).astype(np.uint8))
            gray = Image.merge("LA", (gray, key))
        image = gray
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*matte, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Deep gray to uint8 by the full scales stated in `read`; rounded to nearest, negative is black."""
    scales = {"F": (1, 255, 65535), "I": (65535, 2**31 - 1)}.get(mode, (65535,))
    top = values.max()
    full = next((scale for scale in scales if top <= scale), top)
    return np.rint(np.clip(values.astype(np.float64) / full, 0, 1) * 255).astype(np.uint8)
