"""Paths as users write them, made absolute before any library sees them."""

import os
from pathlib import Path


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path with `~` and `..` resolved; a link at its end stays what it is.

    TensorStore refuses `..`, and a folder that is changed later would be another one. `..` after a link is the folder
    above what the link points to, as it is for the system, so only the folder that the path lies in is resolved.

    Raises:
      ValueError: `~name` of a user that is not there.
    """
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: no such user; give the folder's whole path") from error
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name
