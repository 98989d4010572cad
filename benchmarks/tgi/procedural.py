"""Drawn clips in the six categories of TGI-Bench (`benchmarks.tiny.challenges`), with a test set that is frozen.

Settings are chosen on the split "dev"; "test" is for the published figures alone. The test set's first 144 clips, 24
of each category, are held fast by a manifest of hashes beside this file, so that figures of different days and
machines are of the same clips: what is drawn is compared with it before any use.

A risk is left. Frames are rounded to 8 bits from float32 arithmetic, so a machine or a numpy that rounds a power or
a cosine another way could change a pixel by a level and be refused, although the clips are as good as the same. On
x86-64 all of numpy 2.0 to 2.4 and every instruction set from SSE4 to AVX-512 give the same bits.

Axis letters: L frames, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tgi.data import DataError, DataSet, Item, fingerprint, identified, read_json
from benchmarks.tiny.challenges import backwards, challenge
from benchmarks.tiny.clips import check_clip

SPLITS = ("dev", "test")
LENGTHS = (25, 33, 65, 81)
CLIPS = 144
SIZE = 32
DIGITS = 16  # of each hash, in the manifest
MANIFEST = Path(__file__).with_name("test_manifest.json")


def procedural(
    split: str,
    length: int,
    count: int = CLIPS,
    size: int = SIZE,
    manifest: str | os.PathLike[str] = MANIFEST,
) -> DataSet:
    """The first `count` clips of a split; ids are like "test-00017".

    The identity's sha256 is over everything the items say and the contents of all frames.

    Args:
      split: "dev" or "test".
      length: frames L, at least 2; of the test set one of LENGTHS.
      count: clips, at least 1; of the test set at most CLIPS. A multiple of six is balanced over the categories.
      size: height and width in pixels, at least 16. At sizes other than SIZE, the test set is compared with the
        manifest at SIZE, as both show the same story.
      manifest: of the test set, written by `benchmarks.tgi.freeze`.

    Raises:
      DataError: arguments out of range, no readable manifest, or clips that are not the frozen ones.
    """
    _check(split, length, count, size)
    items, prints = draw(split, length, count, size)
    if split == "test":
        _verify(Path(manifest), *((items, prints) if size == SIZE else draw(split, length, count, SIZE)))
    told = hashlib.sha256("\n".join(str(item.backwards) for item in items).encode()).hexdigest()[:DIGITS]
    return identified(f"procedural-{split}", "procedural", items, prints, split=split, size=size, backwards=told)


def draw(split: str, length: int, count: int, size: int) -> tuple[list[Item], list[str]]:
    """Clips and their fingerprints, compared with nothing; see `procedural` for the arguments."""
    items, prints = [], []
    for seed in range(count):
        clip, read = challenge(seed, split, length, size), partial(_read, seed, split, length, size)
        ends = clip.story.first_image_desc, clip.story.last_image_desc
        extra = {"ambiguous": clip.ambiguous, "seed": seed}
        name, reversed_time = f"{split}-{seed:05d}", backwards(clip.story).caption
        items.append(Item(name, clip.category, clip.caption, *ends, length, extra, read, reversed_time))
        prints.append(fingerprint(items[-1], clip.video))
    return items, prints


def _read(seed: int, split: str, length: int, size: int) -> np.ndarray:
    return challenge(seed, split, length, size).video


def _check(split: str, length: int, count: int, size: int) -> None:
    if split not in SPLITS:
        raise DataError(f"split {split!r}: choose dev or test; models are trained on the others")
    try:
        check_clip(0, split, length, size)
    except ValueError as error:
        raise DataError(f"procedural clips: {error}") from error
    if count < 1:
        raise DataError(f"count {count}: take at least 1 clip")
    if split == "test" and length not in LENGTHS:
        raise DataError(f"length {length}: the test set is frozen for {', '.join(map(str, LENGTHS))} frames; take one")
    if split == "test" and count > CLIPS:
        raise DataError(f"count {count}: the test set has {CLIPS} clips; take at most as many")


def _verify(manifest: Path, items: Sequence[Item], prints: Sequence[str]) -> None:
    """Raises DataError unless the clips are those of the manifest."""
    told: Any = read_json(manifest)
    length = items[0].length
    try:
        captions, hashes = told["captions"][: len(items)], told["hashes"][str(length)][: len(items)]
        wrong = [n for n, (one, other) in enumerate(zip(prints, hashes, strict=True)) if one[:DIGITS] != other]
        worded = [n for n, (item, caption) in enumerate(zip(items, captions, strict=True)) if item.caption != caption]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{manifest}: no manifest of {len(items)} clips of {length} frames ({type(error).__name__}: {error}); "
            f"restore it, or write one with python -m benchmarks.tgi.freeze"
        ) from error
    if wrong or worded:
        first = items[min(wrong + worded)].id
        captions = f"{len(worded)} captions differ" if worded else "all captions agree"
        raise DataError(
            f"test set of {length} frames: {len(wrong)} of {len(items)} clips are not the frozen ones, {first} first "
            f"({captions}), so the generator changed, or this machine rounds another way; restore benchmarks/tiny/"
            f"challenges.py and clips.py, or freeze a new set with python -m benchmarks.tgi.freeze"
        )
