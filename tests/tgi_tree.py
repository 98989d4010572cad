"""A small tree laid out as TGI-Bench is published, of procedural clips: for tests of what reads it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.tiny.challenges import challenge

CLIPS = 8
# As loosely spelled as the published names may be; the canonical ones are those of `challenges.CATEGORIES`.
CHALLENGES = ("Dynamic Motion", "linear", "occluded", "near_static", "appearance-change", "Scene Change",
              "large motion", "Camera Shake ")  # fmt: skip


def name(number: int) -> str:
    """Of a clip's folder."""
    return f"clip_{number:02d}"


def build(folder: Path, lengths: Sequence[int] = (25, 33), clips: int = CLIPS) -> Path:
    """Writes folders of 32x32 JPEG frames, as many as the longest length, and a JSON file for each length.

    Returns `folder`, which must exist and be empty.
    """
    entries = []
    for number in range(clips):
        drawn = challenge(number, "dev", max(lengths))
        place = folder / "TGI-Dataset" / name(number)
        place.mkdir(parents=True)
        for index, frame in enumerate(drawn.video):
            Image.fromarray(frame).save(place / f"{index:05d}.jpg", quality=95, subsampling=0)
        story = drawn.story
        entries.append({"folder": name(number), "first_image_desc": story.first_image_desc,
                        "last_image_desc": story.last_image_desc, "challenge": CHALLENGES[number % len(CHALLENGES)],
                        "caption": story.caption})  # fmt: skip
    for length in lengths:
        captions(folder, length).write_text(json.dumps(entries), encoding="utf-8")
    return folder


def captions(folder: Path, length: int = 25) -> Path:
    """The JSON file of a length."""
    return folder / f"{length}_dataset_caption.json"


def edit(folder: Path, change: Callable[[list[dict[str, Any]]], Any], length: int = 25) -> None:
    """Applies `change` to the list in the JSON file of a length, in place."""
    path = captions(folder, length)
    entries = json.loads(path.read_text(encoding="utf-8"))
    change(entries)
    path.write_text(json.dumps(entries), encoding="utf-8")
