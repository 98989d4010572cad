"""Giving finished files and folders their names: never over anything, together or not at all.

A move has three places: `part`, the finished file or folder in its hidden folder; `target`, the name it is to get; and
`old`, the place in the hidden folder for what stood there. All three are on one file system. For a folder of a run the
three follow from the hidden folder and the name: new/NAME, ../NAME and old/NAME.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEW, OLD = "new", "old"

# What systems answer that know no hard links: FAT, some network drives, Android.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EINVAL}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}


class OutputError(ValueError):
    """An output that cannot be written; the message is one line naming it and the mend."""


@dataclass(frozen=True)
class Move:
    """One file or folder of a result on its way from the hidden folder `room` to its name.

    Attributes:
      room: the hidden folder, beside the target.
      name: of the target.
      made: (device, inode) of the finished part, by which it is known under any name; None before it is there.
    """

    room: Path
    name: str
    made: tuple[int, int] | None = None

    @property
    def part(self) -> Path:
        """Where the run writes."""
        return self.room / NEW / self.name

    @property
    def target(self) -> Path:
        """The name it gets."""
        return self.room.parent / self.name

    @property
    def old(self) -> Path:
        """Where what stood there waits."""
        return self.room / OLD / self.name

    def finished(self) -> "Move":
        """With the part on the disk and `made` known."""
        sync(self.part)
        return Move(self.room, self.name, _key(self.part))


def identity(path: Path) -> Any:
    """By what a file or a folder with its files is known to be still the same, also after a rename; None if absent."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISDIR(status.st_mode):
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    with contextlib.suppress(FileNotFoundError):  # an entry went between listing and looking: no longer the same
        return (status.st_dev, status.st_ino, tuple((name, identity(path / name)) for name in sorted(os.listdir(path))))
    return ()


def sync(path: Path) -> None:
    """Brings a file, or a folder with all in it, to the disk."""
    if path.is_symlink():
        return
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
        sync_folder(path)
        return
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Brings the names in a folder to the disk, where the system can: Windows and some network drives cannot."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def publish(part: Path, target: Path) -> None:
    """Gives a file or folder its name, which must be free; a file may keep its hidden name as a second one.

    A folder takes the place of an empty folder that appeared a moment ago, on systems whose rename does so.

    Raises:
      FileExistsError: something is there.
    """
    if os.name == "nt":
        os.rename(part, target)  # replaces nothing there
    elif part.is_dir() and not part.is_symlink():
        if os.path.lexists(target):
            raise _taken(target)
        try:
            os.rename(part, target)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            raise _taken(target) from error
    else:
        _publish_file(part, target)


def _publish_file(part: Path, target: Path) -> None:
    try:
        # A link itself, not what it points to: what stood under a name may have been one.
        os.link(part, target, **({"follow_symlinks": False} if os.link in os.supports_follow_symlinks else {}))
    except FileExistsError as error:
        raise _taken(target) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # The name is taken by an empty file, which only this run knows, and that is replaced.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(part, target)


def _taken(target: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


def publish_all(moves: Sequence[Move], seen: Sequence[Any]) -> None:
    """Moves aside what stood there, then gives all their names; the caller puts back if it fails.

    The first to be moved aside is the last to come, so that at no moment parts of two results can be seen.

    Args:
      moves: finished ones.
      seen: `identity` of what each replaces, None for nothing.

    Raises:
      OutputError: something appeared or changed there.
    """
    for move, before in zip(moves, seen, strict=True):
        if before is not None:
            os.rename(move.target, move.old)
            if identity(move.old) != before:
                raise OutputError(f"output {move.target}: changed while this run worked, so it was left alone; "
                                  f"choose another name")  # fmt: skip
    for move in reversed(moves):
        try:
            publish(move.part, move.target)
        except FileExistsError as error:
            raise OutputError(f"output {move.target}: appeared while this run worked, so it was left alone; choose "
                              f"another name") from error  # fmt: skip


def put_back(moves: Sequence[Move]) -> list[Path]:
    """Undoes what `publish_all` got done, as far as it came; can be repeated.

    Returns:
      What could not be put back, as something else has taken its name.
    """
    kept = []
    for move in moves:
        if os.path.lexists(move.target) and _key(move.target) == move.made:
            if os.path.lexists(move.part):
                os.unlink(move.target)
            else:
                os.rename(move.target, move.part)
        if os.path.lexists(move.old):
            try:
                publish(move.old, move.target)
                if os.path.lexists(move.old):
                    os.unlink(move.old)
            except FileExistsError:
                kept.append(move.old)
    return kept


def _key(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
