"""What a run is to write, and every reason not to: this file is for checking alone, `wanjax.writing` writes."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanjax import marks
from wanjax.publishing import OutputError, identity
from wanjax.rooms import leftovers, probe
from wanjax.settings import refuse


@dataclass(frozen=True)
class Target:
    """A file or folder that a run writes.

    Attributes:
      path: absolute, see `absolute`.
      folder: whether it is a folder.
      names: of a folder, which names its files can have; others are never replaced. None for any.
      label: what messages call it.
    """

    path: Path
    folder: bool = False
    names: Callable[[str], Any] | None = None
    label: str = "output"


@dataclass(frozen=True)
class Checked:
    """Targets that can be written, with what stood there: `identity` of each, None for nothing.

    Attributes:
      notes: lines that the user should see, on what dead runs had left.
    """

    targets: tuple[Target, ...]
    seen: tuple[Any, ...]
    notes: tuple[str, ...] = ()


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path that means the same to every library: from the root, without `~`, `.` and `..`.

    Links on the way are followed, a link at the end is not: writing to it would replace the link. `..` is what the
    system takes it for, also behind a link.

    Raises:
      ValueError: a name that no file can have.
    """
    given = Path(os.path.expanduser(path))
    try:
        if given.name in ("", ".."):
            return given.resolve()
        return given.parent.resolve() / given.name
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
        raise ValueError(f"{str(path)!r}: not a usable name ({error}); choose another") from error


def check(
    targets: Sequence[Target], *, inputs: Iterable[str | os.PathLike[str]] = (), overwrite: bool = False
) -> Checked:
    """Checks, before any work, that all targets can be written, and removes what dead runs left beside them.

    Args:
      targets: of one result; the first ones get their names last.
      inputs: files and folders that the run reads; none of them is ever replaced.
      overwrite: whether what wanjax wrote earlier may be replaced.

    Raises:
      OutputError: a folder that is missing or cannot be written to (which is tried), a name that cannot be used, an
        input, anything wanjax did not write, anything at all without `overwrite`, targets that lie in each other.
    """
    _refuse_overlap(targets)
    for target in targets:
        check_parent(target)
    notes = [note for parent in parents(targets) for note in leftovers(parent)]
    inputs = list(inputs)
    for target in targets:
        _refuse_inputs(target, inputs)
    return Checked(tuple(targets), tuple(standing(target, overwrite) for target in targets), tuple(notes))


def parents(targets: Sequence[Target]) -> list[Path]:
    """The folders that targets lie in, each once."""
    return list(dict.fromkeys(target.path.parent for target in targets))


def check_parent(target: Target) -> None:
    """Raises OutputError unless the folder that a target lies in exists and can be written to, which is tried."""
    parent = target.path.parent
    if not parent.exists():
        raise OutputError(f"{target.label} {target.path}: no folder {parent}; create it with mkdir -p {parent}")
    if not parent.is_dir():
        raise OutputError(f"{target.label} {target.path}: {parent} is not a folder; choose another place")
    try:
        # Tried, not asked: permissions say little about read-only mounts, quotas, network drives and root.
        probe(parent)
    except OutputError as error:
        raise OutputError(f"{target.label} {target.path}: {error}") from error
    except OSError as error:
        raise OutputError(
            f"{target.label} {target.path}: cannot write in folder {parent} ({error.strerror}); choose another place"
        ) from error


def standing(target: Target, overwrite: bool) -> Any:
    """What stands there, by `identity`; None for nothing. OutputError for every reason not to touch it."""
    path, told = target.path, f"{target.label} {target.path}"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        raise OutputError(f"{told}: a dangling link; remove it or choose another name") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{told}: not a usable name ({error}); choose another") from error
    folder, file = stat.S_ISDIR(mode) and not path.is_symlink(), not target.folder
    refuse(
        (target.folder and not folder, f"{told}: exists and is not a folder; add a suffix or choose another name"),
        (file and stat.S_ISDIR(mode), f"{told}: exists and is a folder; choose another name"),
        (file and not stat.S_ISREG(mode), f"{told}: exists and is not a regular file; choose another name"),
        error=OutputError,
    )
    if target.folder and not any(path.iterdir()):
        return identity(path)
    if not overwrite and not target.folder:
        raise OutputError(f"{told}: exists; pass --overwrite or choose another name")
    if reason := marks.foreign(path, target.names):
        raise OutputError(f"{told}: {reason}; move it away or choose another name")
    if not overwrite:
        raise OutputError(f"{told}: the folder holds earlier results; pass --overwrite or choose another name")
    return identity(path)


def _refuse_overlap(targets: Sequence[Target]) -> None:
    for i, one in enumerate(targets):
        for other in targets[i + 1 :]:
            if one.path == other.path or one.path in other.path.parents or other.path in one.path.parents:
                raise OutputError(f"{one.label} {one.path}: and {other.label} {other.path} are in each other's way; "
                                  f"choose other names")  # fmt: skip


def _refuse_inputs(target: Target, inputs: Sequence[str | os.PathLike[str]]) -> None:
    if not os.path.lexists(target.path):
        return
    real = Path(os.path.realpath(target.path))  # `resolve` raises for a loop of links
    for given in inputs:
        for name in _chain(absolute(given)):
            inside = real in name.parents or name == real or name == target.path
            if inside or (name.exists() and target.path.exists() and name.samefile(target.path)):
                kind = "holds" if target.folder else "is"
                raise OutputError(f"{target.label} {target.path}: {kind} the input {given}; choose another name")
            if name.is_dir() and name in real.parents:
                raise OutputError(f"{target.label} {target.path}: lies in the input {given}; choose another name")


def _chain(path: Path) -> Iterator[Path]:
    """A path, and what it links to, link by link."""
    for _ in range(40):  # as many as Linux follows
        yield path
        if not path.is_symlink():
            return
        path = absolute(path.parent / os.readlink(path))


def refuse_changed(checked: Checked) -> None:
    """Raises OutputError where something appeared or changed since the check."""
    for target, seen in zip(checked.targets, checked.seen, strict=True):
        if identity(target.path) != seen:
            raise OutputError(f"{target.label} {target.path}: {'appeared' if seen is None else 'changed'} while this "
                              f"run worked, so it was left alone; choose another name")  # fmt: skip
