"""What settings must be, declared once beside each field, and refused in one line: this file is for checking alone."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

RENAMED: MappingProxyType[str, str] = MappingProxyType(
    {"grid": "schedule", "beta_end": "strength_end", "beta_mid": "strength_mid", "eps": "floor"}
)
"""Fields of settings by the names that they had, for JSON that earlier versions wrote."""


def renamed(fields: Any) -> Any:
    """Settings read from JSON with today's names, at any depth."""
    if isinstance(fields, Mapping):
        return {RENAMED.get(name, name): renamed(value) for name, value in fields.items()}
    return [renamed(value) for value in fields] if isinstance(fields, list) else fields


def setting(
    default: Any,
    kind: Callable[[Any], Any],
    wanted: str,
    good: Callable[[Any], bool] = lambda value: True,
    label: str = "",
    separator: str = "-",
) -> Any:
    """A dataclass field with the rule that `check_settings` holds it to.

    Args:
      default: of the field; if it is None, None is always good.
      kind: makes the value plain (numpy's numbers and arrays do not compare, hash or go into JSON), or refuses it by
        TypeError or ValueError.
      wanted: the mend, such as "give a number".
      good: whether a plain value is in range.
      label: what messages call the field, by default its name.
      separator: between the numbers of a sequence, in messages.
    """
    rule = {"kind": kind, "wanted": wanted, "good": good, "label": label, "separator": separator}
    return dataclasses.field(default=default, metadata={"setting": rule})


def check_settings(settings: Any) -> None:
    """Makes every `setting` of a frozen dataclass plain and checks it; for `__post_init__`.

    Raises:
      ValueError: one line with label, value and what is wanted.
    """
    for field in dataclasses.fields(settings):
        rule, value = field.metadata.get("setting"), getattr(settings, field.name)
        if rule is None or (value is None and field.default is None):
            continue
        shown = " ".join(repr(value).split())
        try:
            value = rule["kind"](value)
            good = rule["good"](value)
        except (TypeError, ValueError):
            good = False
        else:
            shown = rule["separator"].join(f"{x:g}" for x in value) if isinstance(value, tuple) else repr(value)
        if not good:
            raise ValueError(f"{rule['label'] or field.name} {shown}: {rule['wanted']}")
        object.__setattr__(settings, field.name, value)


def floats(values: Any) -> tuple[float, ...]:
    """A sequence or one-dimensional array as plain numbers."""
    return tuple(float(value) for value in values)


def refuse(*reasons: tuple[Any, str], error: type[ValueError] = ValueError) -> None:
    """Raises the error with the message of the first reason that holds."""
    for holds, message in reasons:
        if holds:
            raise error(message)


def one_of(name: str, value: Any, choices: Iterable[str], mend: str = "choose") -> Any:
    """The value, where it is one of the choices. ValueError else."""
    if value not in choices:
        raise ValueError(f"{name} {value!r}: {mend} {', '.join(choices)}")
    return value


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in a range. ValueError else; a truth value or a float is none."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise ValueError(f"{name} {value!r}: give a whole number from {low} to {high}")
    return number


def pixel_frames(at: Sequence[int], frames: int) -> tuple[int, ...]:
    """Places of keyframes among the pixel frames of a clip, negative ones counted from its end, as 0 .. frames - 1.

    Raises:
      ValueError: a place that the clip does not have, or one given twice.
    """
    places = tuple(whole("keyframe at", place, -frames, frames - 1) % frames for place in at)
    if len(set(places)) < len(places):
        given = ", ".join(map(str, sorted(places)))
        raise ValueError(f"keyframes at {given}: two at one frame; give each a frame of its own")
    return places


def check_finite(fields: Mapping[str, Any]) -> None:
    """Raises TypeError, naming the field, for NaN or infinity in what was read from JSON, at any depth."""
    for name, item in fields.items():
        if isinstance(item, dict):
            check_finite(item)
        for number in item if isinstance(item, list) else [item]:
            if isinstance(number, float) and not math.isfinite(number):
                raise TypeError(f"{name} is {number}")


def check_mesh(sizes: Mapping[str, int], heads: int) -> None:
    """Raises ValueError, with the valid numbers, for a mesh that does not divide the heads.

    Args:
      sizes: axis name -> number of devices along it.
      heads: of the transformer, split over `tensor` always, and over `sequence` inside self-attention.
    """
    number = heads
    for axis in ("tensor", "sequence"):
        size = sizes.get(axis, 1)
        if number % size:
            valid = ", ".join(str(n) for n in range(1, min(number, 2 * size) + 1) if number % n == 0)
            held = "" if number == heads else " that `tensor` leaves"
            raise ValueError(f"mesh {axis}={size}: does not divide the {number} heads{held}; give one of {valid}"
                             + (" and the rest to fsdp" if axis == "sequence" else ""))  # fmt: skip
        number //= size


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises ValueError naming the nearest allowed size unless both sides are positive multiples.

    `multiple` is the VAE's spatial stride times the DiT's spatial patch: 16 for Wan2.1.
    """
    nearest = [max(1, (side + multiple // 2) // multiple) * multiple for side in (height, width)]
    if [height, width] != nearest:
        raise ValueError(
            f"size {height}x{width}: height and width must be positive multiples of {multiple}; "
            f"the nearest size is {nearest[0]}x{nearest[1]}"
        )


def check_frames(frames: int, temporal_stride: int) -> None:
    """Raises ValueError naming the two nearest counts unless frames = temporal_stride * n + 1 with n >= 1.

    n = 0 would be one frame, which cannot be both keyframes.
    """
    below = max(1, (frames - 1) // temporal_stride) * temporal_stride + 1
    if frames != below:
        raise ValueError(
            f"frames {frames}: must be {temporal_stride}n+1 with n at least 1; "
            f"the nearest are {below} and {below + temporal_stride}"
        )
