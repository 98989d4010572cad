"""Entries of docstrings that several names share, `first, last: ...`, as one entry for each name."""

import re

from griffe import Extension, Object

ENTRY = re.compile(
    r"^(?P<indent>[ ]+)(?P<names>\w+(?:,[ ]\w+)+):(?P<text>[ ].*(?:\n(?P=indent)[ ]+\S.*)*)$", re.MULTILINE
)


class Shared(Extension):
    """Griffe reads one name an entry."""

    def on_object(self, *, obj: Object, **_) -> None:
        """Of every object that is documented, before its docstring is read."""
        if obj.docstring is not None:
            obj.docstring.value = ENTRY.sub(_each, obj.docstring.value)


def _each(entry: re.Match[str]) -> str:
    return "\n".join(f"{entry['indent']}{name}:{entry['text']}" for name in entry["names"].split(", "))
