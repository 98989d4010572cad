"""Procedural clips in the six challenge categories of TGI-Bench, for measuring inbetweening.

Every category has paths that the keyframes leave open and only the caption decides: over or under, clockwise or
counterclockwise, which of two moves first, who passes in front, which of two bounces, when the colour changes, from
which side the new scene comes. So the truth is a guess for a model that does not read. For one that does it is unique
but for how high an arc or a bounce goes, which no words tell: drawn evenly from 6.5 to 8.5 and from 2.5 to 4 pixels.
Clips are pure functions of (split, seed), drawn with the sprites of `benchmarks.tiny.clips`; seed n belongs to category
n modulo 6. In 2 to 3 % of occlusion clips the two objects touch in a keyframe, so that a few of its pixels show who is
in front; the frozen test set of `benchmarks/tgi` has none of these.

Axis letters: T frames, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from benchmarks.tiny.clips import (
    SPLITS,
    Background,
    Scene,
    Sprite,
    arc_path,
    background,
    background_words,
    check_clip,
    noun,
    pick,
    render,
    sprite_words,
    straight_path,
    visible_colour,
)

# A turn by this many quarters, either way, ends in the same picture: the keyframes do not tell which way.
TURNS = MappingProxyType({"triangle": 2, "square": 1, "diamond": 1, "cross": 1, "bar": 1})
WIPES = ("left", "right", "top", "bottom", "fade")
FORMS: MappingProxyType[str, Callable[..., str]] = MappingProxyType(
    {
        "one": lambda one: one,
        "both": lambda one, two: f"{one} and {two}",
        "in turn": lambda one, two: f"first {one}, then {two}",
        "in front": lambda back, front: f"{front}, in front of {back}",
        "behind": lambda back, front: f"{back}, behind {front}",
    }
)
"""How a caption joins what the sprites do, in their order in the scene."""
PAIR_RADIUS = (4.0, 5.0)
SINGLE_RADIUS = (4.6, 6.0)


@dataclass(frozen=True)
class Story:
    """What a challenge clip is drawn and described from.

    Attributes:
      scene: where it begins.
      form: how the caption puts the sprites together, a name in FORMS; unused in a transition.
      ambiguous: whether the keyframes leave the path open.
      after: the scene that takes over, if any.
      wipe: how it does, a name in WIPES: the side it comes from, or "fade".

    Its `caption` fixes the whole clip; `first_image_desc` and `last_image_desc` say what the keyframes alone show.
    """

    scene: Scene
    form: str
    ambiguous: bool
    after: Scene | None = None
    wipe: str = "fade"

    @property
    def caption(self) -> str:
        if self.after is not None:
            how = "slowly" if self.wipe == "fade" else f"from the {self.wipe}"
            return f"{self.first_image_desc} changes to {self.last_image_desc}, {how}"
        words = FORMS[self.form](*map(sprite_words, self.scene.sprites))
        return f"{words}, on {background_words(self.scene.background)}"

    @property
    def first_image_desc(self) -> str:
        return _still(self.scene, 0)

    @property
    def last_image_desc(self) -> str:
        return _still(self.scene if self.after is None else self.after, 1)


@dataclass(frozen=True)
class ChallengeClip:
    """A rendered clip.

    Attributes:
      video: uint8 [T, H, W, 3].
      category: a name in CATEGORIES.
      motion_mask: bool [H, W], the pixels that an object covers in any frame; all of them in a transition.
      story: what it was drawn from.
    """

    video: np.ndarray
    category: str
    motion_mask: np.ndarray
    story: Story

    @property
    def caption(self) -> str:
        return self.story.caption

    @property
    def ambiguous(self) -> bool:
        return self.story.ambiguous


def challenge(seed: int, split: str = "train", frames: int = 25, size: int = 32) -> ChallengeClip:
    """Draw one clip; the same arguments always give the same clip, and other lengths the same story.

    Args:
      seed: number of the clip within its split, >= 0; its category is number seed % 6.
      split: a key of `clips.SPLITS`.
      frames: length T, >= 2.
      size: height and width in pixels.

    Raises:
      ValueError: unknown split, negative seed, fewer than two frames, or a size below 16.
    """
    check_clip(seed, split, frames, size)
    category = tuple(CATEGORIES)[seed % len(CATEGORIES)]
    # The number keeps these streams apart from those of `clips.scene`.
    told = CATEGORIES[category](np.random.default_rng([SPLITS[split], 6, seed]))
    video, mask = draw(told, frames, size)
    return ChallengeClip(video, category, mask, told)


def draw(told: Story, frames: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Video uint8 [T, H, W, 3] and motion mask bool [H, W] of a story."""
    video, mask = render(told.scene, frames, size)
    if told.after is None:
        return video, mask
    share = takeover(told.wipe, frames, size)[..., None]
    video = np.round(video + share * (render(told.after, frames, size)[0].astype(np.float64) - video))
    return video.astype(np.uint8), np.ones_like(mask)


def takeover(wipe: str, frames: int, size: int) -> np.ndarray:
    """How much of each pixel shows the new scene, [T, H, W] in [0, 1], none at first and all at last."""
    time = np.linspace(0, 1, frames)[:, None]
    if wipe == "fade":
        return np.broadcast_to(time[:, :, None], (frames, size, size))
    covered = np.clip(time * size - np.arange(size), 0, 1)  # by distance from the side it comes from
    if wipe in ("right", "bottom"):
        covered = covered[:, ::-1]
    along = covered[:, None, :] if wipe in ("left", "right") else covered[:, :, None]
    return np.broadcast_to(along, (frames, size, size))


def _sprite(rng: np.random.Generator, behind: tuple, radius: tuple[float, float], **more) -> Sprite:
    """A sprite of random shape, visible colour and size; `more` sets its motion."""
    shapes = more.pop("shapes", ("circle", "ring", *TURNS))
    shape = pick(rng, tuple(shapes))
    name, rgb = visible_colour(rng, behind)
    extent = float(rng.uniform(*radius))
    return Sprite(shape, (name, name), (rgb, rgb), radius=(extent, extent), **more)


def _pair(rng: np.random.Generator, ground: Background, one: dict, two: dict) -> tuple[Sprite, Sprite]:
    """Two sprites of different shapes and colours."""
    first = _sprite(rng, ground.rgb, PAIR_RADIUS, **one)
    shapes = tuple(s for s in ("circle", "ring", *TURNS) if s != first.shape)
    return first, _sprite(rng, ground.rgb + first.rgb, PAIR_RADIUS, shapes=shapes, **two)


def _still(scene: Scene, when: int) -> str:
    """What the first (0) or last (1) frame of a scene shows."""
    return f"{' and '.join(noun(s, when) for s in scene.sprites)} on {background_words(scene.background)}"


def _told(sprites: tuple[Sprite, ...], ground: Background, form: str = "one", ambiguous: bool = True) -> Story:
    return Story(Scene(sprites, ground), form, ambiguous)


_BACKWARDS = MappingProxyType(
    {"early": "late", "late": "early", "first half": "second half", "second half": "first half"}
    | {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
)


def backwards(told: Story) -> Story:
    """The story that shows the same video in reversed time, so that its caption says what one sees then."""
    scene, after = _scene_backwards(told.scene), told.after
    if after is not None:
        # What came in from one side is uncovered towards it.
        return dataclasses.replace(
            told, scene=_scene_backwards(after), after=scene, wipe=_BACKWARDS.get(told.wipe, told.wipe)
        )
    if told.form == "in turn":  # the one that moved last moves first; apart as they are, their order is not seen
        scene = dataclasses.replace(scene, sprites=scene.sprites[::-1])
    return dataclasses.replace(told, scene=scene)


def _scene_backwards(scene: Scene) -> Scene:
    return dataclasses.replace(scene, sprites=tuple(
        dataclasses.replace(one, colours=one.colours[::-1], rgb=one.rgb[::-1], start=one.end, end=one.start,
                            radius=one.radius[::-1], angle=one.angle[::-1], pace=_BACKWARDS.get(one.pace, one.pace))
        for one in scene.sprites
    ))  # fmt: skip


def _turn(rng: np.random.Generator, sprite: Sprite) -> Sprite:
    quarters = TURNS[sprite.shape] * (1 if rng.random() < 0.5 else -1)
    return dataclasses.replace(sprite, angle=(0.0, float(quarters)))


def _large_motion(rng: np.random.Generator) -> Story:
    """An arc over or under, a turn either way, or both."""
    ground = background(rng)
    arcs, turns = ((True, False), (True, False), (True, True), (False, True))[int(rng.integers(4))]
    sprite = _sprite(rng, ground.rgb, SINGLE_RADIUS, shapes=TURNS if turns else ("circle", "ring", *TURNS),
                     start=(0.0, 0.0), end=(0.0, 0.0))  # fmt: skip
    if arcs:
        start, end, arc, height = arc_path(rng)
        sprite = dataclasses.replace(sprite, start=start, end=end, arc=arc, arc_height=height)
    else:
        start, end = straight_path(rng, sprite.radius[0])
        sprite = dataclasses.replace(sprite, start=start, end=end)
    return _told((_turn(rng, sprite) if turns else sprite,), ground)


def _linear_motion(rng: np.random.Generator) -> Story:
    """A straight path: at an even pace, slowing down or speeding up, or two in turn."""
    ground = background(rng)
    if rng.random() < 0.65:
        sprite = _sprite(rng, ground.rgb, SINGLE_RADIUS, start=(0.0, 0.0), end=(0.0, 0.0))
        start, end = straight_path(rng, sprite.radius[0])
        pace = pick(rng, ("even", "early", "late"))
        return _told((dataclasses.replace(sprite, start=start, end=end, pace=pace),), ground, "one", pace != "even")
    lanes = [float(lane + rng.uniform(-1, 1)) for lane in (rng.permutation([9.0, 23.0]))]
    upright = rng.random() < 0.5
    moves = [
        _lane(rng, lane, upright, pace=pace) for lane, pace in zip(lanes, ("first half", "second half"), strict=True)
    ]
    first, second = _pair(rng, ground, *moves)
    return _told((first, second), ground, "in turn")


def _lane(rng: np.random.Generator, lane: float, upright: bool, ascending: bool | None = None, **more) -> dict:
    """A straight motion from side to side of the frame at a distance `lane` from its top (or left, if upright)."""
    ends = [float(rng.uniform(5, 7)), float(rng.uniform(25, 27))]
    if not (rng.random() < 0.5 if ascending is None else ascending):
        ends.reverse()
    start, end = ((lane, at) if upright else (at, lane) for at in ends)
    return {"start": start, "end": end, **more}


def _occlusion(rng: np.random.Generator) -> Story:
    """Two objects cross, or one crosses another at rest; the caption says who is in front."""
    ground = background(rng)
    upright, ascending = rng.random() < 0.5, bool(rng.random() < 0.5)
    lane = float(rng.uniform(11, 21))
    other = lane + float(rng.uniform(-2, 2))
    one = _lane(rng, lane, upright, ascending)
    if rng.random() < 0.6:
        two = _lane(rng, other, upright, not ascending)
    else:
        rest = (other, 16.0) if upright else (16.0, other)
        two = {"start": rest, "end": rest}
    sprites = _pair(rng, ground, one, two)
    back, front = sprites if rng.random() < 0.5 else sprites[::-1]
    return _told((back, front), ground, "behind" if rng.random() < 0.5 else "in front")


def _near_static(rng: np.random.Generator) -> Story:
    """A small bounce up or down by the one object, by one of two, or a drift of a few pixels."""
    ground = background(rng)
    kind = pick(rng, ("bounce", "bounce", "which", "which", "drift"))
    if kind == "which":
        places = [(float(x + rng.uniform(-1, 1)), float(rng.uniform(11, 21))) for x in rng.permutation([9.0, 23.0])]
        rest, bounce = _pair(rng, ground, *({"start": at, "end": at} for at in places))
        bounce = _bounce(rng, bounce)
        return _told((rest, bounce), ground, "both")
    at = rng.uniform(11, 21, 2)
    moved = at
    if kind == "drift":
        angle = rng.uniform(0, 2 * np.pi)
        moved = at + rng.uniform(2, 3.5) * np.array([np.cos(angle), np.sin(angle)])
    ends = {"start": tuple(map(float, at)), "end": tuple(map(float, moved))}
    sprite = _sprite(rng, ground.rgb, SINGLE_RADIUS, **ends)
    if kind == "drift":
        return _told((sprite,), ground, "one", False)
    return _told((_bounce(rng, sprite),), ground)


def _bounce(rng: np.random.Generator, sprite: Sprite) -> Sprite:
    return dataclasses.replace(sprite, arc=pick(rng, ("over", "under")), arc_height=float(rng.uniform(2.5, 4)))


def _appearance_change(rng: np.random.Generator) -> Story:
    """The colour or the size changes: evenly, early or late at rest, or evenly on a straight path."""
    ground = background(rng)
    ends = tuple(map(float, rng.uniform(8, 24, 2)))
    sprite = _sprite(rng, ground.rgb, SINGLE_RADIUS, start=ends, end=ends)
    change = pick(rng, ("colour", "colour", "size", "both"))
    if change != "size":
        name, rgb = visible_colour(rng, (*ground.rgb, sprite.rgb[0]))
        sprite = dataclasses.replace(sprite, colours=(sprite.colours[0], name), rgb=(sprite.rgb[0], rgb))
    if change != "colour":
        radii = (float(rng.uniform(3.4, 4.2)), float(rng.uniform(5.6, 7)))
        sprite = dataclasses.replace(sprite, radius=radii if rng.random() < 0.5 else radii[::-1])
    if rng.random() < 0.7:
        return _told((dataclasses.replace(sprite, pace=pick(rng, ("even", "early", "late"))),), ground)
    start, end = straight_path(rng, max(sprite.radius))
    return _told((dataclasses.replace(sprite, start=start, end=end),), ground, "one", False)


def _scene_transition(rng: np.random.Generator) -> Story:
    """Another background, with the same or another object, comes in from one side or fades in."""
    grounds = background(rng), background(rng)
    while grounds[1].colours[0] == grounds[0].colours[0] or grounds[1].colours[-1] == grounds[0].colours[-1]:
        grounds = grounds[0], background(rng)
    place = tuple(map(float, rng.uniform(8, 24, 2)))
    if rng.random() < 0.4:
        sprite = _sprite(rng, grounds[0].rgb + grounds[1].rgb, SINGLE_RADIUS, start=place, end=place)
        sprites = sprite, sprite
    else:
        other = tuple(map(float, rng.uniform(8, 24, 2)))
        sprites = (_sprite(rng, grounds[0].rgb, SINGLE_RADIUS, start=place, end=place),
                   _sprite(rng, grounds[1].rgb, SINGLE_RADIUS, start=other, end=other))  # fmt: skip
    wipe = pick(rng, WIPES)
    first, last = (Scene((s,), g) for s, g in zip(sprites, grounds, strict=True))
    return Story(first, "one", True, last, wipe)


CATEGORIES: MappingProxyType[str, Callable[[np.random.Generator], Story]] = MappingProxyType(
    {
        "large motion": _large_motion,
        "linear motion": _linear_motion,
        "occlusion": _occlusion,
        "near-static": _near_static,
        "appearance change": _appearance_change,
        "scene transition": _scene_transition,
    }
)
