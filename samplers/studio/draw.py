"""Keyframes that are drawn instead of found: a coloured shape over a plain ground, as the bundled model knows them.

Lengths are shares of the picture's shorter side, places shares of its width and height, y downward.
"""

import math
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw

COLOURS: MappingProxyType[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (219, 31, 36), "green": (36, 168, 61), "blue": (38, 71, 219), "yellow": (245, 219, 41),
        "orange": (245, 133, 26), "purple": (128, 46, 168), "cyan": (41, 204, 219), "pink": (247, 143, 189),
        "white": (245, 245, 245), "grey": (128, 128, 128), "black": (15, 15, 15), "brown": (117, 71, 31),
    }
)  # fmt: skip
"""The colours that the bundled model was trained with, uint8 RGB."""

_ROUND = {"circle": (math.sqrt(0.85), 0.0), "ring": (math.sqrt(0.98), math.sqrt(0.22))}  # radius, and that of the hole
_POLYGONS = {
    "square": (((-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)),),
    "triangle": (((0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)),),
    "diamond": (((0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)),),
    "cross": (
        ((-0.32, -0.95), (0.32, -0.95), (0.32, 0.95), (-0.32, 0.95)),
        ((-0.95, -0.32), (0.95, -0.32), (0.95, 0.32), (-0.95, 0.32)),
    ),
    "bar": (((-0.97, -0.36), (0.97, -0.36), (0.97, 0.36), (-0.97, 0.36)),),
}
SHAPES = (*_ROUND, *_POLYGONS)
PATHS = ("straight", "over", "under")
LEAST, MOST = 0.1, 0.3
"""Of `Drawing.size`: below, shapes cannot be told apart in 32 pixels."""
_SUPERSAMPLING = 8


@dataclass(frozen=True)
class Drawing:
    """One keyframe.

    Attributes:
      shape: one of SHAPES. colour, ground: in COLOURS.
      x, y: of the shape's centre, 0..1.
      size: half the shape's extent, LEAST..MOST.
    """

    shape: str = "circle"
    colour: str = "red"
    ground: str = "blue"
    x: float = 0.25
    y: float = 0.5
    size: float = 0.17

    def __post_init__(self) -> None:
        named = (("shape", SHAPES), ("colour", COLOURS), ("ground", COLOURS))
        for name, known in named:
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose {', '.join(known)}")
        for name, low, high in (("x", 0, 1), ("y", 0, 1), ("size", LEAST, MOST)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} {value!r}: give a number from {low:g} to {high:g}")


def draw(drawing: Drawing, height: int, width: int) -> np.ndarray:
    """The picture, uint8 [height, width, 3], with smooth edges."""
    sheet = Image.new("RGB", (width * _SUPERSAMPLING, height * _SUPERSAMPLING), COLOURS[drawing.ground])
    paint(sheet, drawing, COLOURS[drawing.colour])
    return np.asarray(sheet.reduce(_SUPERSAMPLING))


def paint(sheet: Image.Image, drawing: Drawing, colour: tuple[int, int, int]) -> None:
    """Paints the shape alone, in a colour, on a sheet of any size."""
    pen, radius = ImageDraw.Draw(sheet), drawing.size * min(sheet.size)
    x, y = drawing.x * sheet.width, drawing.y * sheet.height
    if drawing.shape in _ROUND:
        for share, fill in zip(_ROUND[drawing.shape], (colour, COLOURS[drawing.ground]), strict=True):
            if share:
                pen.ellipse([x - share * radius, y - share * radius, x + share * radius, y + share * radius], fill)
    for corners in _POLYGONS.get(drawing.shape, ()):
        pen.polygon([(x + a * radius, y + b * radius) for a, b in corners], fill=colour)


def prompt(first: Drawing, last: Drawing, path: str = "straight") -> str:
    """What happens from one drawing to the other, in the words that the bundled model was trained with.

    Raises:
      ValueError: an unknown path.
    """
    if path not in PATHS:
        raise ValueError(f"path {path!r}: choose {', '.join(PATHS)}")
    text = f"{_article(first.colour)} {first.colour} {first.shape}"
    way = direction(last.x - first.x, last.y - first.y)
    if way:
        text += f" moves {way} in " + ("a straight line" if path == "straight" else f"an arc {path}")
    else:
        text += {"over": " bounces up", "under": " bounces down"}.get(path, " stays still")
    if last.size != first.size:
        text += " and grows" if last.size > first.size else " and shrinks"
    if last.colour != first.colour:
        text += f" and turns {last.colour}"
    return f"{text}, on {_article(first.ground)} {first.ground} background"


def direction(dx: float, dy: float) -> str:
    """One of eight directions such as "up and left"; nothing for no motion."""
    words = []
    if abs(dy) > 0.414 * abs(dx):
        words.append("down" if dy > 0 else "up")
    if abs(dx) > 0.414 * abs(dy):
        words.append("right" if dx > 0 else "left")
    return " and ".join(words)


def between(first: Drawing, last: Drawing, path: str, share: float) -> Drawing:
    """Where the shape is told to be at a share of the clip, to show an example's motion."""
    side = {"over": -1, "under": 1}.get(path, 0)
    mix = {name: getattr(first, name) + share * (getattr(last, name) - getattr(first, name))
           for name in ("x", "y", "size")}  # fmt: skip
    mix["y"] = min(max(mix["y"] + side * 0.25 * 4 * share * (1 - share), 0.0), 1.0)
    return replace(first if share < 0.5 else last, **mix)


def strobe(first: Drawing, last: Drawing, path: str, side: int = 192, times: int = 7) -> np.ndarray:
    """A thumbnail uint8 [side, side, 3] of the whole motion: both ends, and ghosts on the way."""
    size = (2 * side, 2 * side)
    sheet = Image.new("RGB", size, COLOURS[first.ground])
    for share in [*np.linspace(0, 1, times)[1:-1], 0.0, 1.0]:
        ghost = sheet.copy()
        one = between(first, last, path, float(share))
        paint(ghost, one, COLOURS[one.colour])
        sheet = Image.blend(sheet, ghost, 1.0 if share in (0, 1) else 0.22)
    return np.asarray(sheet.reduce(2))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


EXAMPLES: tuple[tuple[Drawing, Drawing, str], ...] = (
    (Drawing("circle", "yellow", "blue", 0.22, 0.5), Drawing("circle", "yellow", "blue", 0.78, 0.5), "over"),
    (Drawing("square", "cyan", "black", 0.25, 0.27), Drawing("square", "cyan", "black", 0.74, 0.72), "straight"),
    (Drawing("ring", "white", "purple", 0.78, 0.52), Drawing("ring", "white", "purple", 0.22, 0.48), "under"),
    (Drawing("cross", "orange", "green", 0.24, 0.74), Drawing("cross", "orange", "green", 0.74, 0.28), "straight"),
    (Drawing("triangle", "pink", "brown", 0.22, 0.5), Drawing("triangle", "pink", "brown", 0.76, 0.5), "over"),
    (Drawing("diamond", "red", "white", 0.76, 0.48), Drawing("diamond", "red", "white", 0.24, 0.5), "under"),
)
"""(first, last, path) of the gallery."""
