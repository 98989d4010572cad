"""What settings must be, declared once beside each field, and refused in one line."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

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


def pixel_frames(at: Sequence[int], frames: int) -> tuple[int, ...]:
    """Places of keyframes among the pixel frames of a clip, negative ones counted from its end, as 0 .. frames - 1.

    Raises:
      ValueError: a place that the clip does not have.
    """
    outside = [place for place in at if not -frames <= place < frames]
    if outside:
        raise ValueError(f"keyframe at frame {outside[0]}: the clip has frames 0 to {frames - 1} (-1 is the last)")
    return tuple(int(place) % frames for place in at)
