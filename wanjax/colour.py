"""Pictures of any mode to 8-bit sRGB, by the colour profile that they carry.

What carries no profile is taken for sRGB and only unpacked, to the bit; so is what carries one that is sRGB to within
a level. The profile is applied by LittleCMS (Pillow's ImageCms), relative colorimetric with black point compensation,
before transparency is composited.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

# ICC's names of the spaces that a picture's numbers can be in -> Pillow's modes.
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_GRAY = ("1", "L", "LA", "La")


class _Unusable(ValueError):
    """A profile that does not fit its picture, or is damaged."""


def to_srgb(image: Image.Image, matte: Sequence[int]) -> tuple[Image.Image, str | None]:
    """A loaded picture of any mode as RGB in sRGB, its transparency composited over `matte` (0..255 each).

    Deep gray (16 and 32 bits, float) is scaled as `wanjax.keyframes.read` says.

    Returns:
      The picture, and why its colour profile was not used, if it has one that could not be.
    """
    transform, reason = None, None
    if profile := image.info.get("icc_profile"):
        try:
            transform = _transform(profile, image.mode)
        except _Unusable as error:
            reason = str(error)
    if image.mode == "F" or image.mode.startswith("I"):
        colour, alpha = _deep(image, transform)
    elif image.has_transparency_data:
        layer = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        colour, alpha = _apply(layer, transform), layer.getchannel("A")
    else:
        colour, alpha = _apply(image, transform), None
    if alpha is None:
        return colour, reason
    colour.putalpha(alpha)
    ground = Image.new("RGBA", colour.size, (*matte, 255))
    return Image.alpha_composite(ground, colour).convert("RGB"), reason


def _transform(profile: bytes, mode: str) -> Any:
    """To sRGB: a transform of Pillow's, for gray a curve [256, 3]; None where it would change nothing."""
    from PIL import ImageCms  # here, as it is a library of its own, and most pictures need none of it

    if mode in ("LAB", "HSV"):
        return None  # not the numbers that a profile speaks of
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        source = _SPACES.get(space)
        gray = mode in _GRAY or mode == "F" or mode.startswith("I")
        if source is None or (source == "CMYK") != (mode == "CMYK") or (source == "L" and not gray):
            raise _Unusable(f"it is for {space}, the picture is {mode}")
        if source == "RGB" and gray and mode not in _GRAY:
            raise _Unusable(f"it is for {space}, the picture is deep gray")
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        if source == "L":
            flags |= ImageCms.Flags.NOOPTIMIZE  # else a curve of 33 points, 10 levels off in the dark
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), source, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, TypeError, AttributeError) as error:
        raise _Unusable(f"damaged: {' '.join(str(error).split())}") from error
    found = transform if source != "L" else _curve(transform)
    return None if source != "CMYK" and _is_srgb(found) else found


def _curve(transform: Any) -> np.ndarray:
    """uint8 [256, 3]: what a transform makes of each shade of gray."""
    return np.asarray(_applied(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), transform))[0]


def _is_srgb(transform: Any) -> bool:
    """Whether a transform moves no colour of a grid by more than its rounding."""
    if isinstance(transform, np.ndarray):
        moved, expected = transform, np.arange(256)[:, None]
    else:
        ramp = np.arange(0, 256, 15, dtype=np.uint8)
        expected = np.stack(np.meshgrid(ramp, ramp, ramp), axis=-1).reshape(len(ramp), -1, 3)
        moved = np.asarray(_applied(Image.fromarray(expected), transform))
    return bool(np.abs(moved.astype(int) - expected).max() <= 1)


def _apply(image: Image.Image, transform: Any) -> Image.Image:
    """RGB, without regard to transparency, by a transform of Pillow's or a curve."""
    if transform is None:
        return image.convert("RGB")
    if isinstance(transform, np.ndarray):
        gray = image.getchannel("R") if image.mode == "RGBA" else image.convert("L")
        return Image.fromarray(transform[np.asarray(gray)])
    return _applied(image.convert(transform.input_mode), transform)


def _applied(image: Image.Image, transform: Any) -> Image.Image:
    from PIL import ImageCms

    return ImageCms.applyTransform(image, transform)


def _deep(image: Image.Image, transform: Any) -> tuple[Image.Image, Image.Image | None]:
    """RGB of deep gray, and its alpha where one value is the transparent one."""
    values = np.asarray(image)
    shades = _shades(values, image.mode)
    if transform is None:
        colour = Image.fromarray(np.rint(shades).astype(np.uint8)).convert("RGB")
    else:  # LittleCMS takes 8 bits here, so the shades between two are interpolated
        channels = [np.interp(shades, np.arange(256), transform[:, channel]) for channel in range(3)]
        colour = Image.fromarray(np.rint(np.stack(channels, axis=-1)).astype(np.uint8))
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return colour, None
    return colour, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))


def _shades(values: np.ndarray, mode: str) -> np.ndarray:
    """Deep gray to 0..255 as float64, by the full scales stated in `wanjax.keyframes.read`; negative is black."""
    scales = {"F": (1, 255, 65535), "I": (65535, 2**31 - 1)}.get(mode, (65535,))
    top = values.max()
    full = next((scale for scale in scales if top <= scale), top)
    return np.clip(values.astype(np.float64) / full, 0, 1) * 255
