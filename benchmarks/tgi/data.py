"""What is inbetweened: clips with their captions, all of one length.

The sources are `tgi_bench` (the published benchmark), `procedural` (drawn clips, among them a frozen test set) and
`videos` (one's own). Each is a module with a function of its name that checks all it needs before any work starts
and returns a `DataSet`; frames are read when asked for.

Axis letters: L frames, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wanjax.keyframes import fit

NAMED = 10  # problems that one error message names; the rest is counted


class DataError(ValueError):
    """Data that cannot be used: one line a problem, each naming the culprit and the mend."""


@dataclass(frozen=True)
class Item:
    """One clip to be inbetweened.

    Attributes:
      id: unique in its data set, stable, fit for a file name.
      challenge: category by its canonical name (see `tgi_bench.canonical`), "" where there is none.
      caption: of the whole clip.
      first_image_desc, last_image_desc: what the first and the last frame show.
      length: frames L.
      extra: what else is known, as JSON. Procedural clips: {"ambiguous": bool, "seed": int}.
      read: the frames, uint8 [L, H, W, 3] at their own size; raises DataError.
      backwards: caption of the clip in reversed time, None where nobody says.
    """

    id: str
    challenge: str
    caption: str
    first_image_desc: str
    last_image_desc: str
    length: int
    extra: Mapping[str, Any] = field(hash=False)
    read: Callable[[], np.ndarray] = field(compare=False, repr=False)
    backwards: str | None = None


def stretched(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames uint8 [L, H, W, 3] brought to `size` (height, width) as keyframes are, uint8 [L, height, width, 3]."""
    return np.stack([fit(Image.fromarray(frame), *size) for frame in frames])


@dataclass(frozen=True)
class DataSet:
    """Clips of one length.

    Attributes:
      name: of the set, without its length.
      items: in stable order.
      length: frames L of every item.
      identity: what results are bound to, as JSON: name, source, length, sha256 and ids, and what else the source
        chose the clips by. Not where the files lie: moving them changes nothing.
    """

    name: str
    items: tuple[Item, ...]
    length: int
    identity: Mapping[str, Any] = field(hash=False)


def fingerprint(item: Item, frames: np.ndarray) -> str:
    """sha256 (hex) of all that an item says and of its frames uint8 [L, H, W, 3]."""
    told = [item.id, item.challenge, item.caption, item.first_image_desc, item.last_image_desc, dict(item.extra)]
    text = json.dumps([*told, frames.shape], sort_keys=True)
    return hashlib.sha256(text.encode() + frames.tobytes()).hexdigest()


def identified(name: str, source: str, items: Sequence[Item], prints: Sequence[str], **chosen: Any) -> DataSet:
    """A data set from items and what tells their contents, in the same order; `chosen` joins its identity."""
    identity = {
        "name": name,
        "source": source,
        "length": items[0].length,
        "sha256": hashlib.sha256("\n".join(prints).encode()).hexdigest(),
        "ids": [item.id for item in items],
    }
    return DataSet(name, tuple(items), items[0].length, identity | chosen)


def refuse(problems: Sequence[str]) -> None:
    """Raises one DataError for all problems, the first ten named and the rest counted; returns when there are none."""
    if not problems:
        return
    lines = list(problems[:NAMED])
    if len(problems) > 1:
        lines.insert(0, f"{len(problems)} problems:")
    if len(problems) > NAMED:
        lines.append(f"and {len(problems) - NAMED} more")
    raise DataError("\n".join(lines))


def read_json(path: Path) -> Any:
    """What a JSON file in UTF-8 holds.

    Raises:
      DataError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); fetch or write it again") from error
