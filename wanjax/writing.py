"""The one room for writing results: whole or not at all, and never over anything that is not ours.

A result is one or several files and folders of one run (a video, its contact sheet, its JSON). `check` looks, before
any work, at everything that stands where they go; `staged` hands out hidden names to write to, and gives the real names
to all of them or to none at the end:

    checked = writing.check([Target(clip), Target(report)], inputs=[first, last], overwrite=True)
    with writing.staged(checked) as (clip_part, report_part):
        ...

`beside` is both for one file or folder, `write_bytes`, `write_text` and `write_json` are that for small ones. Inside
`staged` no other run can begin on the same names: enter it before long work, not after.

What stands there is replaced only with `overwrite`, only if wanjax wrote it (`wanjax.marks`), and only if it still is
what `check` saw. Everything hidden lies in one folder `.wanjax-*` beside its target, locked while its run lives. One
whose run is gone is removed by the next `check` in that folder, after what the run had moved aside is put back.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from wanjax import marks
from wanjax.publishing import Move, OutputError, identity, publish, publish_all, put_back, sync, sync_folder
from wanjax.rooms import begin, claim, done, leftovers, rooms
from wanjax.targets import Checked, Target, absolute, check, check_parent, parents, refuse_changed, standing

__all__ = ["OutputError", "Target", "Checked", "absolute", "check", "staged", "beside", "write_bytes", "write_text",
           "write_json", "locked", "publish", "sync", "leftovers",
           "check_parent", "terminate_as_interrupt"]  # fmt: skip


@contextlib.contextmanager
def staged(checked: Checked) -> Iterator[tuple[Path, ...]]:
    """Hidden names to write the targets to, in their order, of the same file names; folders are to be made.

    When the block ends well all parts are brought to the disk and get their names together. On any exception,
    KeyboardInterrupt included, none does, and what stood there stays. After a crash on the way the next `check` puts
    back what stood there.

    Raises:
      OutputError: another run is writing one of the targets, or something appeared or changed there since `check`.
    """
    names: dict[Path, list[str]] = {}
    for target in checked.targets:
        names.setdefault(target.path.parent, []).append(target.path.name)
    with rooms(list(names)) as made:
        claim(made, names)
        refuse_changed(checked)
        moves = [Move(made[target.path.parent], target.path.name) for target in checked.targets]
        yield tuple(move.part for move in moves)
        moves = [move.finished() for move in moves]
        refuse_changed(checked)
        _give_names(checked, moves, moves[0].room)


@contextlib.contextmanager
def beside(
    path: str | os.PathLike[str],
    *,
    folder: bool = False,
    names: Callable[[str], Any] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> Iterator[Path]:
    """`check` and `staged` for one file or folder: a hidden name to write to, which takes the real one at the end.

    Raises:
      OutputError: as those two.
    """
    target = Target(absolute(path), folder, names)
    with staged(check([target], inputs=inputs, overwrite=overwrite)) as (part,):
        yield part


def write_bytes(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False, anything: bool = False) -> None:
    """Writes a small file, whole or not at all.

    Args:
      overwrite: whether a file that wanjax wrote may be replaced.
      anything: with `overwrite`, also any other regular file: for formats without a place for the mark, under names
        that only wanjax uses.

    Raises:
      OutputError: no such folder, or something that must not be replaced. OSError: a full disk.
    """
    target = Target(absolute(path))
    if not target.path.parent.is_dir():
        raise OutputError(f"output {path}: no folder {target.path.parent}; create it with mkdir -p")
    known = anything and overwrite and target.path.is_file() and not target.path.is_symlink()
    seen = identity(target.path) if known else standing(target, overwrite)
    with staged(Checked((target,), (seen,))) as (part,):
        part.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = False, anything: bool = False) -> None:
    """`write_bytes` of text in UTF-8; a lone surrogate (an undecodable byte of a command line) becomes `\\udcxx`."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"), overwrite=overwrite, anything=anything)


def write_json(
    path: str | os.PathLike[str],
    value: Any,
    *,
    overwrite: bool = False,
    anything: bool = False,
    mark: bool = True,
    indent: int = 2,
) -> None:
    """`write_text` of what JSON can hold.

    Args:
      overwrite, anything: as in `write_bytes`.
      mark: whether an object says in its first key, "written_by", that wanjax wrote it; not where every key means
        something to the reader.

    Raises:
      TypeError: a value that JSON does not know. ValueError: NaN or infinity, which it does not either.
    """
    value = marks.marked(value) if mark and isinstance(value, dict) else value
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text, overwrite=overwrite, anything=anything)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds a lock file, and removes it; the system lets go of it when the process ends in any way.

    Args:
      path: of the lock file.
      busy: the message if another process holds it.

    Raises:
      OutputError: another process holds it, or the file cannot be made.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if path.exists():
            raise OutputError(busy) from None
        raise OutputError(f"{path}: cannot be locked; choose another place") from None
    except OSError as error:
        raise OutputError(f"{path}: cannot be locked ({error.strerror}); choose another place") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps open files: there the empty file stays
            path.unlink()
        lock.release()


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM (and SIGHUP, unless ignored as by nohup) is a KeyboardInterrupt; for command lines.

    Ctrl-C stays what it is, but is not lost any more where Python drops exceptions: in a callback of the garbage
    collector (JAX has one) or of a weak reference, and in a finalizer. It is sent again a moment later. Does nothing
    outside the main thread. The old handlers come back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mended = {"SIGINT": (signal.default_int_handler,), "SIGHUP": (signal.SIG_DFL,)}
    old = {number: signal.getsignal(number) for name, number in signal.Signals.__members__.items()
           if name == "SIGTERM" or signal.getsignal(number) in mended.get(name, ())}  # fmt: skip
    dropped = sys.unraisablehook
    try:
        sys.unraisablehook = _again(dropped)
        for number, handler in old.items():
            if handler is not None:  # set by a library that is not Python, and could not be brought back
                signal.signal(number, _interrupt)
        yield
    finally:
        sys.unraisablehook = dropped
        for number, handler in old.items():
            if handler is not None:
                signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _again(dropped: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook of what Python drops that sends an interrupt's signal again; all else is told by the one before."""

    def told(unraisable: Any) -> None:
        name = str(unraisable.exc_value)
        if unraisable.exc_type is not KeyboardInterrupt or name not in signal.Signals.__members__:
            dropped(unraisable)
            return
        again = threading.Timer(0.01, _send, (signal.Signals[name],))
        again.daemon = True
        again.start()

    return told


def _send(number: int) -> None:
    """To the main thread, from another, so that it also wakes up."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)


def _give_names(checked: Checked, moves: Sequence[Move], first: Path) -> None:
    """All parts get their names, or everything is as before."""
    if len(moves) == 1 and checked.seen[0] is not None and not checked.targets[0].folder:
        os.replace(moves[0].part, moves[0].target)  # one file for another: no moment without either
    else:
        begin(moves)
        try:
            publish_all(moves, checked.seen)
        except BaseException:
            if not put_back(moves):
                done(first)
            raise
        done(first)
    for parent in parents(checked.targets):
        sync_folder(parent)
