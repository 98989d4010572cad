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
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from wanjax import marks
from wanjax.publishing import Move, OutputError, identity, publish, publish_all, put_back, sync, sync_folder
from wanjax.rooms import begin, claim, done, leftovers, probe, rooms

__all__ = ["OutputError", "Target", "Checked", "absolute", "check", "staged", "beside", "write_bytes", "write_text",
           "write_json", "locked", "publish", "sync", "leftovers",
           "check_parent", "terminate_as_interrupt"]  # fmt: skip


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
    notes = [note for parent in _parents(targets) for note in leftovers(parent)]
    inputs = list(inputs)
    for target in targets:
        _refuse_inputs(target, inputs)
    return Checked(tuple(targets), tuple(_check_target(target, overwrite) for target in targets), tuple(notes))


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
        _refuse_changed(checked)
        moves = [Move(made[target.path.parent], target.path.name) for target in checked.targets]
        yield tuple(move.part for move in moves)
        moves = [move.finished() for move in moves]
        _refuse_changed(checked)
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
    seen = identity(target.path) if known else _check_target(target, overwrite)
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

    Ctrl-C stays what it is, but is not lost any more when it falls into a garbage collection: what is raised in JAX's
    callback there, or in a finalizer, goes no further. Does nothing outside the main thread. The old handlers come back
    at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mended = {"SIGINT": (signal.default_int_handler,), "SIGHUP": (signal.SIG_DFL,)}
    old = {number: signal.getsignal(number) for name, number in signal.Signals.__members__.items()
           if name == "SIGTERM" or signal.getsignal(number) in mended.get(name, ())}  # fmt: skip
    try:
        for number, handler in old.items():
            if handler is not None:  # set by a library that is not Python, and could not be brought back
                signal.signal(number, _interrupt)
        yield
    finally:
        for number, handler in old.items():
            if handler is not None:
                signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_name in ("_xla_gc_callback", "__del__"):
            again = threading.Timer(0.01, _send, (number,))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt(signal.Signals(number).name)


def _send(number: int) -> None:
    """To the main thread, from another, so that it also wakes up."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)


def _parents(targets: Sequence[Target]) -> list[Path]:
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


def _check_target(target: Target, overwrite: bool) -> Any:
    """What stands there, after all reasons not to touch it."""
    path, told = target.path, f"{target.label} {target.path}"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        raise OutputError(f"{told}: a dangling link; remove it or choose another name") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{told}: not a usable name ({error}); choose another") from error
    if target.folder and (not stat.S_ISDIR(mode) or path.is_symlink()):
        raise OutputError(f"{told}: exists and is not a folder; add a suffix or choose another name")
    if not target.folder and stat.S_ISDIR(mode):
        raise OutputError(f"{told}: exists and is a folder; choose another name")
    if not target.folder and not stat.S_ISREG(mode):
        raise OutputError(f"{told}: exists and is not a regular file; choose another name")
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


def _refuse_changed(checked: Checked) -> None:
    for target, seen in zip(checked.targets, checked.seen, strict=True):
        if identity(target.path) != seen:
            raise OutputError(f"{target.label} {target.path}: {'appeared' if seen is None else 'changed'} while this "
                              f"run worked, so it was left alone; choose another name")  # fmt: skip


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
    for parent in _parents(checked.targets):
        sync_folder(parent)
