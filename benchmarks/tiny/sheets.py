"""Sheets that tell by themselves what they show: captions above, names of rows and numbers of frames beside.

Axis letters: T frames, H height, W width.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from samplers.video import enlarge
from wanjax import marks, writing

GROUND, INK, FAINT = (24, 24, 24), (235, 235, 235), (165, 165, 165)
GAP = 4
TEXT = 14  # pixels of a letter; what is below 12 cannot be read on a page
LINE = TEXT + 6


@dataclass(frozen=True)
class Block:
    """One clip of a sheet: a caption over rows, each a name and a video uint8 [T, H, W, 3]; all of one size."""

    caption: str
    rows: Mapping[str, np.ndarray]


def letters(size: int = TEXT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size=size)


def wrapped(text: str, width: int, size: int = TEXT) -> str:
    """The text with line breaks between words, so that no line with more than one word is wider than so many pixels."""
    font, lines = letters(size), []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def sheet(blocks: Sequence[Block], frames: Sequence[int], scale: int = 2) -> np.ndarray:
    """One picture uint8 [height, width, 3]: the chosen frames of every row of every block, enlarged `scale` times.

    Raises:
      ValueError: no blocks or frames, or videos that differ in size.
    """
    shapes = {video.shape[1:] for block in blocks for video in block.rows.values()}
    if not frames or len(shapes) != 1:
        raise ValueError(f"sheet: videos of {sorted(shapes)} and {len(frames)} frames; give one size, and frames")
    ((height, width, _),) = shapes
    font = letters()
    label = max(int(font.getlength(name)) for block in blocks for name in block.rows) + 2 * GAP
    step_x, step_y = width * scale + GAP, height * scale + GAP
    tall = LINE + sum(LINE + GAP + len(block.rows) * step_y for block in blocks) + GAP
    picture = Image.new("RGB", (label + len(frames) * step_x, tall), GROUND)
    draw = ImageDraw.Draw(picture)
    for column, number in enumerate(frames):
        draw.text((label + column * step_x, 2), f"{number}", fill=FAINT, font=font)
    top = LINE
    for block in blocks:
        draw.text((GAP, top + 2), block.caption, fill=INK, font=font)
        top += LINE + GAP
        for name, video in block.rows.items():
            draw.text((GAP, top + (height * scale - TEXT) // 2), name, fill=FAINT, font=font)
            for column, number in enumerate(frames):
                frame = Image.fromarray(enlarge(video[number], scale))
                picture.paste(frame, (label + column * step_x, top))
            top += step_y
    return np.asarray(picture)


def write(path: str | os.PathLike[str], picture: np.ndarray) -> None:
    """Writes a picture uint8 [height, width, 3] as a PNG, whole or not at all, also in the place of another program's
    file: a caller whose user names it asks before (`benchmarks.measure.output`).

    Raises:
      OutputError: no such folder, or a folder or link of that name. OSError: a full disk.
    """
    info, content = PngInfo(), io.BytesIO()
    info.add_text("Software", marks.mark())
    Image.fromarray(picture).save(content, format="PNG", pnginfo=info)
    writing.write_bytes(path, content.getvalue(), overwrite=True, anything=True)
