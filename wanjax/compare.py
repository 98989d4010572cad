"""The one comparison of what should be there with what is: missing, extra, or of another shape."""

from collections.abc import Iterable, Mapping

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
