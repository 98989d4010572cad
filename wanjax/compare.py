"""The one comparison of what should be there with what is: missing, extra, or of another shape."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Shape = tuple[int, ...]

LISTED = 20
"""Lines of a list in a message; a model that is not the one has thousands of differences."""


def differences(
    found: Mapping[str, Shape], wanted: Mapping[str, Shape]
) -> dict[str, tuple[Shape | None, Shape | None]]:
    """Every name whose shapes are not equal.

    Returns:
      name -> (shape that was found, shape that is wanted), sorted by name; None where one side lacks it.
    """
    pairs = {name: (found.get(name), wanted.get(name)) for name in sorted(found.keys() | wanted.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def lines(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[str]:
    """The differences in words: one line a name, for parameters that a config asks for."""
    return [
        f"{name}: {'missing' if own is None else own}, config wants {'none' if asked is None else asked}"
        for name, (own, asked) in differences(found, wanted).items()
    ]


def listed(items: Iterable[str], limit: int = LISTED) -> str:
    """Lines of a message's list, each indented on a line of its own, cut with "and N more" after `limit`."""
    items = list(items)
    shown = items if len(items) <= limit else [*items[:limit], f"and {len(items) - limit} more"]
    return "".join(f"\n  {item}" for item in shown)


def check_fields(name: str, value: Any, shapes: dict[str, tuple | None]) -> None:
    """Compares array fields of `value` with shapes, as `check_leaf`."""
    for field, wanted in shapes.items():
        check_leaf(f"{name}.{field}", getattr(value, field), wanted)


def check_leaf(name: str, leaf: Any, wanted: tuple | None) -> None:
    """Compares an array with a shape; None is absent, a letter any size but 0. ValueError names both."""

    def show(shape: tuple | None) -> str:
        return "absent" if shape is None else f"[{', '.join(map(str, shape))}]"

    found = None if leaf is None else tuple(np.shape(leaf))
    fits = found == wanted
    if found is not None and wanted is not None and len(found) == len(wanted):
        fits = all(n == size or (isinstance(size, str) and n > 0) for n, size in zip(found, wanted, strict=True))
    if not fits:
        raise ValueError(f"{name} is {show(found)}; this model takes {show(wanted)}")
