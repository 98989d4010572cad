"""Where frames look, as HTML: words as a table of frames, keyframes with what is looked at lit, before and after KAB.

Axis letters: F latent frames, K keys (tokens of the prompt, patches of a keyframe).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from samplers.studio.views import png, text
from wanjax.keyframes import fit, image

_HOT = np.array([[16, 18, 27], [64, 46, 120], [160, 64, 140], [240, 120, 90], [255, 214, 130], [255, 250, 230]], float)
_SIGNED = np.array([[90, 170, 255], [46, 84, 150], [22, 25, 36], [150, 76, 52], [255, 150, 90]], float)
VIEWS = ("before", "after", "change")
SIDE = 64
"""Pixels of a keyframe's thumbnail."""


def colours(values: np.ndarray, stops: np.ndarray = _HOT) -> np.ndarray:
    """uint8 [..., 3] of values in 0..1 along evenly spaced colours [N, 3]."""
    place = np.clip(np.nan_to_num(values), 0, 1) * (len(stops) - 1)
    low = np.minimum(place.astype(int), len(stops) - 2)
    share = (place - low)[..., None]
    return np.rint(stops[low] * (1 - share) + stops[low + 1] * share).astype(np.uint8)


def views(branch: dict[str, Any]) -> dict[str, np.ndarray]:
    """A branch's shares [F, K] before, after, and what KAB changes."""
    before, after = (np.asarray(branch[name], float) for name in ("plain", "biased"))
    return {"before": before, "after": after, "change": after - before}


def scaled(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same as 0..1: shares by their root, against the largest of both; changes by theirs, 0.5 for none."""
    most = max(found["before"].max(), found["after"].max(), 1e-9)
    change = max(np.abs(found["change"]).max(), 1e-4)
    shares = {name: np.sqrt(found[name] / most) for name in VIEWS[:2]}
    root = np.sign(found["change"]) * np.sqrt(np.abs(found["change"]) / change)
    return shares | {"change": 0.5 + root / 2}


def html(numbers: dict[str, Any], keyframes: Sequence[np.ndarray]) -> str:
    """Everything that `explain.numbers` says of attention.

    Args:
      keyframes: uint8 [H, W, 3] of the images that the model sees, first and last.
    """
    branches = numbers["attention"]
    first = branches["text"]
    labels = [f"{low}–{high}" if low != high else f"{low}" for low, high in numbers["pixel_frames"]]
    parts = [_words(first["labels"], labels, views(first))]
    seen = [name for name in ("first", "last") if name in branches]
    for name, pixels in zip(seen, keyframes, strict=False):
        parts.append(_keyframe(name, labels, views(branches[name]), pixels))
    kab = numbers["kab"]
    told = ("KAB acts in this layer and step." if kab else
            "KAB does not act in this layer and step: before and after are the same.")  # fmt: skip
    where = f"Layer {numbers['layer']}, step {numbers['step']}"
    return (f'<div class="wj-heat"><p>{where}: how much each frame looks at each word and each patch of the keyframes, '
            f"mean over heads. {told}</p>{''.join(parts)}</div>")  # fmt: skip


def _words(words: Sequence[str], frames: Sequence[str], found: dict[str, np.ndarray]) -> str:
    """A table of frames and words, the views below each other; what is after the text's end counts for no shade."""
    shades, bodies = scaled({view: own[:, :-1] for view, own in found.items()}), []
    names = [word.strip() or "␣" for word in words[:-1]]
    head = "".join(f"<th><span>{text(name)}</span></th>" for name in names)
    for view in VIEWS:
        pictures = colours(shades[view], _SIGNED if view == "change" else _HOT)
        rows = []
        for number, (frame, row, tints) in enumerate(zip(frames, found[view], pictures, strict=True)):
            cells = "".join(_cell(f"frame {frame}, {name}: {value:+.4f}", tint)
                            for name, value, tint in zip(names, row, tints, strict=False))  # fmt: skip
            label = f'<th class="wj-view">{view}</th>' if number == 0 else "<th></th>"
            rows.append(f"<tr>{label}<th>{frame}</th>{cells}</tr>")
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    return (f'<h4>Words</h4><div class="wj-words"><table><thead><tr><th></th><th></th>{head}</tr></thead>'
            f"{''.join(bodies)}</table></div>")  # fmt: skip


def _cell(told: str, tint: np.ndarray) -> str:
    red, green, blue = map(int, tint)
    return f'<td style="background:rgb({red},{green},{blue})" title="{text(told)}"></td>'


def _keyframe(name: str, frames: Sequence[str], found: dict[str, np.ndarray], pixels: np.ndarray) -> str:
    """A row of thumbnails for each view, one a frame, lit where it looks."""
    patches = found["before"].shape[1] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        return ""
    small = np.asarray(fit(image(pixels), SIDE, SIDE, "stretch", (0, 0, 0)))
    shades, rows = scaled({view: own[:, 1:] for view, own in found.items()}), []
    for view in VIEWS:
        lit = colours(shades[view], _SIGNED if view == "change" else _HOT)
        strip = [_lit(small, one.reshape(side, side, 3)) for one in lit]
        pictures = [
            f'<img src="{png(one)}" alt="" title="frame {frame}">' for frame, one in zip(frames, strip, strict=True)
        ]
        cells = "".join(f"<figure>{picture}<figcaption>{frame}</figcaption></figure>"
                        for frame, picture in zip(frames, pictures, strict=True))  # fmt: skip
        rows.append(f'<div class="wj-strip"><b>{view}</b>{cells}</div>')
    return f"<h4>{text(name.capitalize())} keyframe</h4>{''.join(rows)}"


def _lit(picture: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """A picture uint8 [S, S, 3] under patches' colours uint8 [s, s, 3]."""
    rows = np.arange(len(picture)) * len(patches) // len(picture)
    over = patches[rows][:, rows].astype(float)
    return np.rint(0.3 * picture + 0.7 * over).astype(np.uint8)
