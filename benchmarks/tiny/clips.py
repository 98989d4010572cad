"""Procedural clips with captions: what the bundled tiny model is trained and measured on.

A clip shows one shape (or, in the rich variety, two) moving over a plain or two-tone background. It is a pure
function of (split, seed), and splits draw from different random streams, so training and held-out clips
cannot coincide. About half of the clips move along an arc whose side the keyframes do not tell: only the caption
says whether it goes over or under, so a model that ignores its text cannot do well on them.

Axis letters: T frames, H height, W width, 3 = RGB; image coordinates are pixels, x to the right and y down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

# Each split draws from a random stream of its own. "heldout" measures training, "dev" is for choosing settings of
# the methods, "test" for the published figures alone.
SPLITS = MappingProxyType({"train": 0, "heldout": 1, "dev": 2, "test": 3})

COLOURS = MappingProxyType(
    {
        "red": (0.86, 0.12, 0.14),
        "green": (0.14, 0.66, 0.24),
        "blue": (0.15, 0.28, 0.86),
        "yellow": (0.96, 0.86, 0.16),
        "orange": (0.96, 0.52, 0.10),
        "purple": (0.50, 0.18, 0.66),
        "cyan": (0.16, 0.80, 0.86),
        "pink": (0.97, 0.56, 0.74),
        "white": (0.96, 0.96, 0.96),
        "grey": (0.50, 0.50, 0.50),
        "black": (0.06, 0.06, 0.06),
        "brown": (0.46, 0.28, 0.12),
    }
)
COLOUR_JITTER = 0.05
MIN_CONTRAST = 0.45  # Euclidean distance in RGB between an object and what lies behind it

SUPERSAMPLING = 4  # samples per pixel edge
REFERENCE_SIZE = 32  # lengths below are pixels of a 32 x 32 frame
RADIUS = (4.6, 6.0)
MIN_DISTANCE = 10.0
ARC_DISTANCE = (12.0, 20.0)
ARC_HEIGHT = (6.5, 8.5)

# How far a motion or change has come at a share of the clip's time, both in [0, 1].
PACES: MappingProxyType[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType(
    {
        "even": lambda time: time,
        "early": lambda time: 1 - (1 - time) ** 2.5,
        "late": lambda time: time**2.5,
        "first half": lambda time: np.minimum(2 * time, 1),
        "second half": lambda time: np.maximum(2 * time - 1, 0),
    }
)


def _polygon(*corners: tuple[float, float]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Membership test of a convex polygon whose corners run clockwise on screen (y down)."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        result = np.ones(x.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            result &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
        return result

    return inside


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Membership test of a star of five points, one of them up; its inner corners lie at 0.45 of its radius."""
    point, inner = 2 * np.pi / 5, 0.45
    # Every half of a point is the same wedge: angle from the point's middle, edge from its tip to the inner corner.
    angle = abs((np.arctan2(x, -y) + point / 2) % point - point / 2)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    corner = inner * np.cos(point / 2), inner * np.sin(point / 2)
    return (corner[0] - 1) * across - corner[1] * (along - 1) >= 0


# Every shape is a membership test on local coordinates in which it fits the unit circle.
SHAPES: MappingProxyType[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = MappingProxyType(
    {
        "circle": lambda x, y: x * x + y * y <= 0.85,
        "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.78,
        "triangle": _polygon((0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)),
        "diamond": lambda x, y: abs(x) + abs(y) <= 1.0,
        "ring": lambda x, y: abs(x * x + y * y - 0.60) <= 0.38,
        "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 0.95),
        "bar": lambda x, y: (abs(x) <= 0.97) & (abs(y) <= 0.36),
        "star": _star,
    }
)
# Stars came later: they are drawn where they are asked for, and every other clip kept its number.
COMMON_SHAPES = tuple(name for name in SHAPES if name != "star")
SYMMETRIC_SHAPES = ("circle", "ring")  # rotation cannot be seen on them


@dataclass(frozen=True)
class Sprite:
    """One moving object. Pairs hold the value in the first and in the last frame.

    Attributes:
      shape: a key of SHAPES.
      colours: names in COLOURS.
      rgb: the two colours as drawn, jittered, in [0, 1].
      start, end: centre (x, y) in pixels of a 32 x 32 frame.
      arc: "straight", "over" (bulges towards the top) or "under".
      arc_height: bulge in pixels, unused when straight.
      radius: half the extent in pixels.
      angle: orientation in quarter turns, clockwise on screen.
      pace: a key of PACES, followed by the motion and by every change.
    """

    shape: str
    colours: tuple[str, str]
    rgb: tuple[tuple[float, float, float], tuple[float, float, float]]
    start: tuple[float, float]
    end: tuple[float, float]
    arc: str = "straight"
    arc_height: float = 0.0
    radius: tuple[float, float] = (5.0, 5.0)
    angle: tuple[float, float] = (0.0, 0.0)
    pace: str = "even"


@dataclass(frozen=True)
class Background:
    """A plain background, or two tones divided by a line.

    Attributes:
      colours: one or two names in COLOURS.
      rgb: the same as drawn.
      vertical: whether the dividing line is vertical.
      edge: where it lies, in pixels of a 32 x 32 frame.
    """

    colours: tuple[str, ...]
    rgb: tuple[tuple[float, float, float], ...]
    vertical: bool = False
    edge: float = 16.0


@dataclass(frozen=True)
class Scene:
    """Everything a clip is drawn and captioned from; later sprites lie in front."""

    sprites: tuple[Sprite, ...]
    background: Background


@dataclass(frozen=True)
class Clip:
    """A rendered clip.

    Attributes:
      video: uint8 [T, H, W, 3].
      caption: one English sentence fragment that fixes the motion.
      ambiguous: whether the keyframes alone leave the path open.
      motion_mask: bool [H, W], the pixels that an object covers in any frame.
      scene: what it was drawn from.
    """

    video: np.ndarray
    caption: str
    ambiguous: bool
    motion_mask: np.ndarray
    scene: Scene


def clip(seed: int, split: str = "train", frames: int = 25, size: int = 32, rich: bool = False,
         shape: str | None = None) -> Clip:  # fmt: skip
    """Draw one clip; the same arguments always give the same clip.

    Args:
      seed: number of the clip within its split, >= 0.
      split: a key of SPLITS.
      frames: length T, >= 2.
      size: height and width in pixels.
      rich: also turning, growing, colour-changing objects and pairs of objects.
      shape: a key of SHAPES that its objects have, None for COMMON_SHAPES by chance.

    Raises:
      ValueError: unknown split or shape, negative seed, fewer than two frames, or a size below 16.
    """
    check_clip(seed, split, frames, size)
    drawn = scene(seed, split, rich, shape)
    video, mask = render(drawn, frames, size)
    return Clip(video, caption(drawn), any(s.arc != "straight" for s in drawn.sprites), mask, drawn)


def check_clip(seed: int, split: str, frames: int = 25, size: int = 32) -> None:
    """Raises ValueError for what no clip can be drawn of; see `clip`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if frames < 2:
        raise ValueError(f"frames is {frames}; a clip needs at least 2")
    if size < 16:
        raise ValueError(f"size is {size}; shapes are not recognisable below 16 pixels")


def scene(seed: int, split: str = "train", rich: bool = False, shape: str | None = None) -> Scene:
    """Choose shapes, colours and motions; see `clip` for the arguments and errors."""
    check_clip(seed, split)
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; use one of {', '.join(SHAPES)}")
    rng = np.random.default_rng([SPLITS[split], seed])
    ground = background(rng)
    shapes = COMMON_SHAPES if shape is None else (shape,)
    first = _sprite(rng, ground.rgb, rich, shapes)
    if not rich or rng.random() < 0.6:
        return Scene((first,), ground)
    for _ in range(64):
        second = _sprite(rng, ground.rgb + first.rgb, rich, shapes)
        if second.shape != first.shape:
            return Scene((first, second), ground)
    return Scene((first,), ground)


def pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    """One of the names."""
    return names[int(rng.integers(len(names)))]


def _rgb(rng: np.random.Generator, name: str) -> tuple[float, float, float]:
    jittered = np.clip(np.array(COLOURS[name]) + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3), 0, 1)
    return tuple(float(v) for v in jittered)


def background(rng: np.random.Generator) -> Background:
    """Plain or two-tone, by equal chance."""
    first = pick(rng, tuple(COLOURS))
    rgb = _rgb(rng, first)
    if rng.random() < 0.5:
        return Background((first,), (rgb,))
    second = pick(rng, tuple(c for c in COLOURS if c != first))
    vertical = bool(rng.random() < 0.5)
    return Background((first, second), (rgb, _rgb(rng, second)), vertical, float(rng.uniform(10, 22)))


def visible_colour(rng: np.random.Generator, behind: tuple) -> tuple[str, tuple[float, float, float]]:
    """A colour that stands out from everything behind it; the best of many tries when none fully does."""
    tries = []
    for _ in range(48):
        name = pick(rng, tuple(COLOURS))
        rgb = _rgb(rng, name)
        contrast = min(float(np.linalg.norm(np.subtract(rgb, other))) for other in behind)
        if contrast >= MIN_CONTRAST:
            return name, rgb
        tries.append((contrast, name, rgb))
    _, name, rgb = max(tries)
    return name, rgb


def _sprite(rng: np.random.Generator, behind: tuple, rich: bool, shapes: tuple[str, ...]) -> Sprite:
    shape = pick(rng, shapes)
    name, rgb = visible_colour(rng, behind)
    names, rgbs = (name, name), (rgb, rgb)
    radius = float(rng.uniform(*RADIUS))
    radii, angles = (radius, radius), (0.0, 0.0)
    change = pick(rng, ("none", "turn", "size", "colour")) if rich else "none"
    if change == "turn" and shape not in SYMMETRIC_SHAPES:
        angles = (0.0, float(rng.choice([-2, -1, 1, 2])))
    if change == "size":
        small = float(rng.uniform(3.4, 4.2))
        radii = (small, radius) if rng.random() < 0.5 else (radius, small)
    if change == "colour":
        last, last_rgb = visible_colour(rng, (*behind, rgb))
        names, rgbs = (name, last), (rgb, last_rgb)
    if rng.random() < 0.5:
        start, end, arc, height = arc_path(rng)
    else:
        start, end = straight_path(rng, radius)
        arc, height = "straight", 0.0
    return Sprite(shape, names, rgbs, start, end, arc, height, radii, angles)


def straight_path(rng: np.random.Generator, radius: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Two centres at least MIN_DISTANCE apart with the whole object inside the frame.

    A third of them lie where arcs also start and end, so a straight path is not told apart by its keyframes.
    """
    if rng.random() < 1 / 3:
        start, end, _, _ = arc_path(rng)
        return start, end
    low, high = radius + 0.5, REFERENCE_SIZE - radius - 0.5
    while True:
        start, end = rng.uniform(low, high, 2), rng.uniform(low, high, 2)
        if np.linalg.norm(end - start) >= MIN_DISTANCE:
            return tuple(map(float, start)), tuple(map(float, end))


def arc_path(rng: np.random.Generator) -> tuple[tuple[float, float], tuple[float, float], str, float]:
    """A mostly horizontal path near mid-height, from which an arc to either side stays inside the frame."""
    distance = float(rng.uniform(*ARC_DISTANCE))
    centre = REFERENCE_SIZE / 2 + float(rng.uniform(-1, 1)) * (ARC_DISTANCE[1] - distance) / 2
    left = (centre - distance / 2, REFERENCE_SIZE / 2 + float(rng.uniform(-1.5, 1.5)))
    right = (centre + distance / 2, REFERENCE_SIZE / 2 + float(rng.uniform(-1.5, 1.5)))
    start, end = (left, right) if rng.random() < 0.5 else (right, left)
    return start, end, pick(rng, ("over", "under")), float(rng.uniform(*ARC_HEIGHT))


def direction(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Name one of eight directions of a motion: "right", "up and left" and so on."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    words = []
    if abs(dy) > 0.414 * abs(dx):
        words.append("down" if dy > 0 else "up")
    if abs(dx) > 0.414 * abs(dy):
        words.append("right" if dx > 0 else "left")
    return " and ".join(words)


def caption(drawn: Scene) -> str:
    """Describe a scene so that its motion is fixed, e.g. "a red ring moves left in an arc over, on a blue
    background"."""
    parts = [sprite_words(s) for s in drawn.sprites]
    text = parts[0] if len(parts) == 1 else f"{parts[1]}, in front of {parts[0]}"
    return f"{text}, on {background_words(drawn.background)}"


def background_words(ground: Background) -> str:
    """E.g. "a red and blue background"."""
    return f"{_article(ground.colours[0])} {' and '.join(ground.colours)} background"


def noun(sprite: Sprite, when: int = 0) -> str:
    """E.g. "an orange bar", by the colour in the first (0) or last (1) frame."""
    return f"{_article(sprite.colours[when])} {sprite.colours[when]} {sprite.shape}"


def sprite_words(sprite: Sprite) -> str:
    """What a sprite is and does, e.g. "a red bar moves up in a straight line and turns blue"."""
    if sprite.start == sprite.end:
        text = f"{noun(sprite)} {({'over': 'bounces up', 'under': 'bounces down'}).get(sprite.arc, 'stays still')}"
    else:
        path = "in a straight line" if sprite.arc == "straight" else f"in an arc {sprite.arc}"
        text = f"{noun(sprite)} moves {direction(sprite.start, sprite.end)} {path}"
    turns = sprite.angle[1] - sprite.angle[0]
    if turns:
        amount = "half" if abs(turns) == 2 else "quarter"
        text += f" and makes a {amount} turn {'clockwise' if turns > 0 else 'counterclockwise'}"
    grows, recolours = sprite.radius[0] != sprite.radius[1], sprite.colours[0] != sprite.colours[1]
    if grows:
        text += " and grows" if sprite.radius[1] > sprite.radius[0] else " and shrinks"
    if recolours:
        text += f" and turns {sprite.colours[1]}"
    if grows or recolours:
        return text + {"early": " at first", "late": " at last"}.get(sprite.pace, "")
    return text + {"early": " and slows down", "late": " and speeds up"}.get(sprite.pace, "")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def render(drawn: Scene, frames: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene with antialiased edges.

    Returns:
      video uint8 [T, H, W, 3] and motion mask bool [H, W].
    """
    canvas = np.broadcast_to(_backdrop(drawn.background, size), (frames, size, size, 3)).copy()
    mask = np.zeros((size, size), bool)
    time = np.linspace(0.0, 1.0, frames, dtype=np.float32)
    for sprite in drawn.sprites:
        progress = PACES[sprite.pace](time)
        cover = _coverage(sprite, progress, size)
        mask |= (cover > 0).any(axis=0)
        paint = _between(np.array(sprite.rgb[0]), np.array(sprite.rgb[1]), progress[:, None])
        canvas += cover[..., None] * (paint[:, None, None].astype(np.float32) - canvas)
    return np.round(canvas * 255).astype(np.uint8), mask


def _between(first: np.ndarray | float, last: np.ndarray | float, progress: np.ndarray) -> np.ndarray:
    return first + (np.asarray(last) - first) * progress


def _backdrop(background: Background, size: int) -> np.ndarray:
    """float32 [H, W, 3]; the dividing line is antialiased too."""
    first = np.array(background.rgb[0], np.float32)
    last = np.array(background.rgb[-1], np.float32)
    beyond = np.clip(np.arange(size) + 1 - background.edge * size / REFERENCE_SIZE, 0, 1).astype(np.float32)
    beyond = beyond[None, :, None] if background.vertical else beyond[:, None, None]
    return np.broadcast_to(first + (last - first) * beyond, (size, size, 3))


def path(sprite: Sprite, progress: np.ndarray) -> np.ndarray:
    """Centres [T, 2] (x, y), in pixels of a 32 x 32 frame, at progress [T] in [0, 1]; arcs are parabolas."""
    centres = _between(np.array(sprite.start), np.array(sprite.end), progress[:, None])
    if sprite.arc != "straight":
        side = -1.0 if sprite.arc == "over" else 1.0
        centres[:, 1] += side * sprite.arc_height * 4 * progress * (1 - progress)
    return centres


def _coverage(sprite: Sprite, progress: np.ndarray, size: int) -> np.ndarray:
    """Share of every pixel that the sprite covers, float32 [T, H, W].

    Only a window around the object is sampled, which is several times faster than sampling the frame.
    """
    scale = size / REFERENCE_SIZE
    centres = path(sprite, progress) * scale
    radii = _between(sprite.radius[0], sprite.radius[1], progress) * scale
    turns = _between(sprite.angle[0], sprite.angle[1], progress) * (np.pi / 2)
    window = int(np.ceil(2 * radii.max())) + 2
    corner = np.floor(centres - window / 2).astype(int)

    offsets = (np.arange(window * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    local = (corner - centres)[:, :, None] + offsets  # [T, 2, window * SUPERSAMPLING]
    local = (local / radii[:, None, None]).astype(np.float32)
    x, y = local[:, 0, None, :], local[:, 1, :, None]
    if sprite.angle != (0.0, 0.0):
        cos, sin = (f(turns).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        x, y = cos * x + sin * y, cos * y - sin * x
    x, y = np.broadcast_arrays(x, y)
    samples = SHAPES[sprite.shape](x, y).reshape(len(progress), window, SUPERSAMPLING, window, SUPERSAMPLING)
    share = samples.mean(axis=(2, 4), dtype=np.float32)

    margin = 2 * window  # an object that leaves the frame is cut off
    padded = np.zeros((len(progress), size + 2 * margin, size + 2 * margin), np.float32)
    steps = np.arange(window)
    rows = np.clip(corner[:, 1], -margin, size + margin - window)[:, None] + steps + margin
    columns = np.clip(corner[:, 0], -margin, size + margin - window)[:, None] + steps + margin
    padded[np.arange(len(progress))[:, None, None], rows[:, :, None], columns[:, None, :]] = share
    return padded[:, margin : margin + size, margin : margin + size]
