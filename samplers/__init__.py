"""Samplers of wanjax: from keyframes and prompts to videos.

    from samplers import Settings, inbetween, load, write

The names are looked up when they are asked for, so that `python -m samplers.inbetween --help` imports little.
"""

from importlib import import_module
from types import MappingProxyType
from typing import Any

_NAMES = MappingProxyType(
    {
        "Plan": "samplers.plan",
        "Result": "samplers.pipeline",
        "Settings": "samplers.plan",
        "inbetween": "samplers.pipeline",
        "load": "wanjax.checkpoint",
        "write": "samplers.video",
    }
)

__all__ = ["Plan", "Result", "Settings", "inbetween", "load", "write"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
