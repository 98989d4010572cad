"""What the bundled tiny model cannot know of a prompt and of keyframes, said before it makes mush of them."""

import re
from pathlib import Path

import numpy as np

WORDS = "words.txt"
"""In a model's folder: every word of the captions that it was trained with, one a line. Other models have none."""

COLOURS = 4  # of two grounds and two shapes
NEAR = 24  # how far a pixel's value may lie from a colour, of 255: edges and the borders of grounds are soft
LEAST = 0.9  # drawn keyframes have 92 to 100 % of their pixels there, photographs at 32x32 mostly less


def about(folder: Path, prompt: str, keyframes: list[np.ndarray]) -> list[str]:
    """At most one line for a model that says which words it knows; none for others.

    Args:
      folder: of the model.
      prompt: of the clip.
      keyframes: uint8 [H, W, 3], fitted.
    """
    file = folder / WORDS
    if not file.is_file():
        return []
    known = set(file.read_text(encoding="utf-8").split())
    strange = list(dict.fromkeys(word for word in re.findall(r"[^\W\d_]+", prompt.lower()) if word not in known))
    parts = []
    if strange:
        parts.append(f"the prompt's {', '.join(map(repr, strange[:8]))}{' and more' if strange[8:] else ''}")
    if any(share_of_flat_colours(image) < LEAST for image in keyframes):
        parts.append("keyframes unlike the drawn shapes it was trained on")
    if not parts:
        return []
    return [f"the tiny model does not know {' or '.join(parts)}; expect mush (it is for trying the code)"]


def share_of_flat_colours(image: np.ndarray) -> float:
    """Share of the pixels of uint8 [H, W, 3] that lie near one of its four commonest colours."""
    pixels = image.reshape(-1, 3).astype(int)
    left = np.ones(len(pixels), bool)
    for _ in range(COLOURS):
        if not left.any():
            break
        _, which, counts = np.unique(pixels[left] // 16, axis=0, return_inverse=True, return_counts=True)
        centre = pixels[left][which.ravel() == counts.argmax()].mean(0)
        left &= np.abs(pixels - centre).max(1) > NEAR
    return float(1 - left.mean())
