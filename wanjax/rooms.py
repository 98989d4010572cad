"""Hidden folders beside results: one to a run and parent folder, locked while the run lives.

    .wanjax-XXXXXXXX/lock         held (by `filelock`) by the living run
                     claim.json   the names that the run writes, and its hidden folders in other parents
                     moves.json   there while names are given: {name: [device, inode]} of the finished parts
                     new/, old/   see `wanjax.publishing`

While moves.json lies in the FIRST hidden folder of a run, what the run began is undone; once it is gone, the result
stands. So a run that dies at any moment leaves either, and the next run in the folder tidies up.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from wanjax.publishing import NEW, OLD, Move, OutputError, put_back, sync, sync_folder
from wanjax.undo import undone

HIDDEN = ".wanjax-"

_LOCK, _CLAIM, _JOURNAL = "lock", "claim.json", "moves.json"
_UNLOCKED = re.compile(r"\.wanjax-[a-z0-9_]{8}")  # versions before locks left such folders
_STALE_HOURS = 6


@contextlib.contextmanager
def rooms(parents: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """A hidden folder in each of the parents, locked; gone at the end, unless something in one could not be put back.

    Yields:
      parent -> hidden folder.
    """
    with contextlib.ExitStack() as stack:
        made: dict[Path, Path] = {}
        for parent in parents:
            first = next(iter(made.values()), None)
            made[parent] = stack.enter_context(_room(parent, first))
        yield made


@contextlib.contextmanager
def _room(parent: Path, first: Path | None) -> Iterator[Path]:
    """A hidden folder with its lock held; `first` is the run's first one, None if this is it."""
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            room = parent / f"{HIDDEN}{secrets.token_hex(4)}"
            lock = FileLock(room / _LOCK, thread_local=False)
            stack.callback(_leave, room, lock, first or room)  # before anything is there, for an interrupt right after
            if _take(room, lock):
                break
            stack.pop_all()
        else:
            raise OutputError(f"cannot hold a lock in folder {parent}; choose another place")
        stack.enter_context(undone(partial(_abandon, room, lock, first or room)))
        yield room


def _take(room: Path, lock: FileLock) -> bool:
    """Makes and locks a hidden folder; False where another run has the name, or took the fresh one for a dead one's."""
    try:
        room.mkdir(mode=0o700)
    except FileExistsError:
        return False
    except OSError as error:
        raise OutputError(f"cannot write in folder {room.parent} ({error.strerror}); choose another place") from error
    with contextlib.suppress(Timeout, FileNotFoundError):
        lock.acquire(blocking=False)
        (room / NEW).mkdir()
        (room / OLD).mkdir()
        return True
    return False


def _leave(room: Path, lock: FileLock, first: Path) -> None:
    """Ends a hidden folder, unless something could not be put back; the run's first one is the last to go."""
    try:
        _end(room, lock, first)
    except KeyboardInterrupt:  # the first Ctrl-C, if it falls in here, must not leave anything
        _end(room, lock, first)
        raise


def _end(room: Path, lock: FileLock, first: Path) -> None:
    kept = (first / _JOURNAL).exists()
    if not kept:
        _empty(room)
    lock.release()
    if not kept:
        _remove(room)


def _abandon(room: Path, lock: FileLock, first: Path) -> None:
    """`_end`, from another thread than the one that holds the folder and may be about to give names: what was moved
    aside stays, for the next run to put back."""
    if (first / _JOURNAL).exists():
        return
    shutil.rmtree(room / NEW, ignore_errors=True)
    (room / OLD).rmdir()  # OSError where something is in it
    (room / _CLAIM).unlink(missing_ok=True)
    lock.release()
    _remove(room)


def _empty(room: Path) -> None:
    """All but the lock, which is to be the last for those who look whether the run is alive."""
    for entry in (NEW, OLD):
        shutil.rmtree(room / entry, ignore_errors=True)
    with contextlib.suppress(OSError):
        for entry in (_CLAIM, _JOURNAL):
            (room / entry).unlink(missing_ok=True)


def _remove(room: Path) -> None:
    """What `_empty` left; the lock is let go of by now, as Windows keeps open files."""
    with contextlib.suppress(OSError):
        (room / _LOCK).unlink(missing_ok=True)
        room.rmdir()


def probe(parent: Path) -> None:
    """Tries what `rooms` will do. OSError or OutputError if it fails."""
    with _room(parent, None) as room:
        (room / NEW / "probe").write_bytes(b"probe")


def claim(made: dict[Path, Path], names: dict[Path, list[str]]) -> None:
    """Says which names this run writes, and refuses those that an earlier live run does.

    Args:
      made: parent -> hidden folder.
      names: parent -> names in it.

    Raises:
      OutputError: another run is writing one of them.
    """
    since = time.time_ns()
    for parent, room in made.items():
        told = {"rooms": [str(one) for one in made.values()], "targets": names[parent], "since": since,
                "process": os.getpid()}  # fmt: skip
        (room / _CLAIM).write_text(json.dumps(told), encoding="utf-8")
    for parent, room in made.items():
        for other in parent.glob(f"{HIDDEN}*"):
            theirs = _read_json(other / _CLAIM)
            shared = sorted(set(names[parent]) & set(theirs.get("targets", ())))
            # A later one sees this claim and gives way. Should neither see the other, the first to finish wins.
            later = (theirs.get("since", 0), other.name) > (since, room.name)
            if shared and other != room and not later and _alive(other):
                raise OutputError(f"output {parent / shared[0]}: another run (process {theirs.get('process')}) is "
                                  f"writing it; wait for it or choose another name")  # fmt: skip


def begin(moves: Sequence[Move]) -> None:
    """Writes down, on the disk, what is about to be moved."""
    by_room: dict[Path, dict[str, Any]] = {}
    for move in moves:
        by_room.setdefault(move.room, {})[move.name] = move.made
    for room, made in by_room.items():
        (room / _JOURNAL).write_text(json.dumps(made), encoding="utf-8")
        sync(room / _JOURNAL)
        sync(room / _CLAIM)
        sync_folder(room)
        sync_folder(room.parent)


def done(first: Path) -> None:
    """From here on, what was moved stays."""
    (first / _JOURNAL).unlink()


def leftovers(folder: Path) -> list[str]:
    """Removes hidden folders of runs that are gone, after putting back what they had moved aside.

    Those of live runs and of other users stay. One without a lock (of an older version) goes when nothing in it was
    touched for hours and it holds nothing that was moved aside.

    Returns:
      A line for each, for the user.
    """
    notes = []
    for room in sorted(folder.glob(f"{HIDDEN}*")):
        with contextlib.suppress(OSError, Timeout):  # alive, or somebody was faster
            if room.is_dir() and not room.is_symlink() and _own(room):
                notes += _clear(room) if (room / _LOCK).exists() else _clear_unlocked(room)
    return notes


def _clear(room: Path) -> list[str]:
    """Timeout if its run, or another that clears it, is alive."""
    group = [Path(one) for one in _read_json(room / _CLAIM).get("rooms", ())]
    first = group[0] if group else room
    is_first = first.name == room.name  # the parent may have been renamed since
    with _held(room):
        worth_a_word = any(room.rglob("*/*"))
        # The first goes last: without it nothing says whether the moves of another stand.
        unsettled = [] if is_first or first.exists() else list((room / OLD).glob("*"))
        kept = _undo([*group[1:], room]) if is_first else unsettled
        if kept:
            return [f"{kept[0]} was moved aside by a run that was stopped, and its name is taken: move it where it "
                    f"belongs, then remove {room}"]  # fmt: skip
        if is_first or not first.exists():
            for other in group[1:] if is_first else ():
                _drop(other)
            _empty(room)
    if not is_first and first.exists():
        return _clear(first)
    _remove(room)
    return [f"removed {room}, which a run that was stopped had left"] if worth_a_word else []


def _drop(room: Path) -> None:
    """One of the run's others, whose moves are settled with the first."""
    with contextlib.suppress(OSError, Timeout):
        if room.exists() and _own(room):
            with _held(room):
                _empty(room)
            _remove(room)


def _undo(group: Sequence[Path]) -> list[Path]:
    """Puts back everything of a dead run, whose first hidden folder is the last here, unless its moves stand."""
    if not (group[-1] / _JOURNAL).exists():
        return []
    kept = []
    for room in group:
        if not room.exists() or not _own(room):
            continue
        made = _read_json(room / _JOURNAL)
        kept += put_back([Move(room, name, tuple(key)) for name, key in made.items()])
    if not kept:
        done(group[-1])
    return kept


def _clear_unlocked(room: Path) -> list[str]:
    if not _UNLOCKED.fullmatch(room.name) or (os.name == "posix" and stat.S_IMODE(room.stat().st_mode) != 0o700):
        return []  # the user's
    if not any(room.iterdir()):  # cut off while it went, or a run that has only begun and then takes another name
        room.rmdir()
        return []
    times = [path.lstat().st_mtime for path in (room, *room.rglob("*"))]
    if time.time() - max(times) < 3600 * _STALE_HOURS:
        return []
    if (room / OLD).exists():
        return [f"{room / OLD} was moved aside by a run that was stopped: move it where it belongs, then remove {room}"]
    shutil.rmtree(room)
    return [f"removed {room}, which a run that was stopped had left"]


@contextlib.contextmanager
def _held(room: Path) -> Iterator[None]:
    lock = FileLock(room / _LOCK, thread_local=False)
    lock.acquire(blocking=False)
    try:
        yield
    finally:
        lock.release()


def _alive(room: Path) -> bool:
    try:
        with _held(room):
            gone = not (room / _CLAIM).exists()
        if gone:  # removed meanwhile, and made again by the lock
            _remove(room)
        return False
    except Timeout:
        return True
    except OSError:  # removed meanwhile
        return False


def _own(room: Path) -> bool:
    """Whether it is the user's own: what another writes into a shared folder must move nothing."""
    return not hasattr(os, "geteuid") or room.stat().st_uid == os.geteuid()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
