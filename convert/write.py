"""The writing of a planned model to a wanjax folder (`wanjax.store`): one writer, a layer at a time, resumable.

Everything is written into a hidden folder beside the target and renamed at the end, so that nothing half-written ever
stands under the target's name. What an interruption leaves is gone on with if the job and its sources are the same to
the last bit; what nothing can go on with is removed.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from convert.eight import filled
from convert.families import SLOTS
from convert.finish import JOB, PROGRESS, finish, write_synced
from convert.keymap import Rule
from convert.plan import DTYPES, Plan, lacking, plan, work
from convert.read import load, read_layers
from convert.sources import Part
from convert.tensors import SourceError, sha256
from wanjax import checkpoint, store
from wanjax.config import to_json
from wanjax.manifest import FORMAT, MANIFEST, Manifest, raw
from wanjax.writing import OutputError, Target, absolute, check_parent, locked

__all__ = ["DTYPES", "OutputError", "Plan", "check_target", "lacking", "load", "plan", "work", "write"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(
    planned: Plan,
    target: Path,
    dtype: str,
    told: Callable[[int], Any] = lambda size: None,
    noted: Callable[[str], Any] = lambda note: None,
) -> Manifest:
    """Writes the folder.

    Args:
      target: must not exist.
      dtype: as given to `plan`, for the manifest.
      told: hears of bytes as they are hashed, then as they are written.
      noted: hears of what an earlier run had left.

    Returns:
      The manifest.

    Raises:
      OutputError: the target exists, cannot be written, or another conversion is writing it.
      SourceError: damaged tensors, or files that change meanwhile.
    """
    target = absolute(target)
    check_target(target)
    lock, busy = target.parent / f".{target.name}.lock", "another conversion is writing it; wait or choose another name"
    with locked(lock, f"{target}: {busy}"):
        folder = check_target(target)  # another run may have ended meanwhile
        source, files = planned.source, planned.files
        before = _stats(files)
        above = absolute(source.path).parent
        digests = {os.path.relpath(name, above): digest for name, digest in sha256(files, told).items()}
        tool = f"wanjax {metadata.version('wanjax')}"
        job = {
            "tool": tool,
            "format": FORMAT,
            "sources": digests,
            "config": json.loads(to_json(planned.config)),
            "dtype": dtype,
            "parts": sorted(source.parts),
            "loras": list(source.loras),
        }
        with _kept_only_if_useful(folder, target):
            arrays = _write_arrays(planned, folder, _resume(folder, job, planned, noted), told)
            if _stats(files) != before:
                raise SourceError(f"{source.path}: its files changed during the conversion; run it again")
            manifest = Manifest(arrays, digests, tool, dtype, source.loras)
            finish(planned, folder, target, manifest)
    return manifest


def check_target(target: Path) -> Path:
    """The hidden folder that a target is prepared in.

    Raises:
      OutputError: the target exists, or the folder it lies in does not or cannot be written to.
    """
    given, target = target, absolute(target)
    if given.name in ("", ".."):
        raise OutputError(f"{given}: names no folder to make")
    if os.path.lexists(target):
        raise OutputError(f"{target}: exists; choose another name or remove it")
    check_parent(Target(target, folder=True))
    hidden = target.parent / f".{target.name}.part"
    try:
        hidden.lstat()
    except FileNotFoundError:
        return hidden
    except (OSError, ValueError) as error:  # its name is longer than the target's; a NUL in it
        reason = getattr(error, "strerror", error)
        raise OutputError(f"{str(target)!r}: not a usable name ({reason}); choose another") from error
    if not _ours(hidden):
        raise OutputError(f"{target}: {hidden} is in the way and no conversion's; move it away or choose another name")
    return hidden


def _ours(hidden: Path) -> bool:
    """Whether a folder under the hidden name holds nothing but what an earlier conversion left."""
    names = {JOB, PROGRESS, checkpoint.CONFIG, checkpoint.TOKENIZER, MANIFEST}
    if hidden.is_symlink() or not hidden.is_dir():
        return False
    return all(path.name in names or path.name.partition(".")[0] in SLOTS for path in hidden.iterdir())


@contextlib.contextmanager
def _kept_only_if_useful(folder: Path, target: Path) -> Iterator[None]:
    """Removes what a failure leaves unless the same command can go on from it: after an interruption, or a full disk.

    Raises:
      OutputError: the disk is full, or something appeared under the target's name.
    """
    try:
        yield
    except (OSError, KeyboardInterrupt) as error:
        if not (folder / PROGRESS).is_file() or not (folder / PROGRESS).stat().st_size:
            shutil.rmtree(folder, ignore_errors=True)  # no array is finished
        if isinstance(error, OSError) and error.errno in FULL:
            raise OutputError(f"{target}: {error.strerror}; free some space and run it again") from error
        if isinstance(error, FileExistsError):
            text = "appeared while it was written, and was left alone; move it away and run this again, nothing is lost"
            raise OutputError(f"{target}: {text}") from error
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _stats(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(stat.st_size, stat.st_mtime_ns) for stat in (os.stat(file) for file in files)]


def _resume(
    folder: Path, job: Mapping[str, Any], planned: Plan, noted: Callable[[str], Any]
) -> dict[str, dict[str, Any]]:
    """Entries of arrays that an earlier run of the same job finished; starts the folder anew for another job."""
    try:
        same = json.loads((folder / JOB).read_text(encoding="utf-8")) == job
    except (OSError, ValueError, RecursionError):
        same = False
    if same:
        done = {}
        progress = folder / PROGRESS
        lines = progress.read_text(encoding="utf-8").splitlines() if progress.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):  # a line cut off by the interruption
                entry = json.loads(line)
                done[entry.pop("name")] = entry
        return done
    if folder.exists():
        noted(f"{folder}: left by a conversion of another source or with other settings; removed")
        shutil.rmtree(folder)
    folder.mkdir()
    for name, shapes in planned.shapes.items():
        store.skeleton(folder / name, shapes)
    (folder / PROGRESS).touch()
    write_synced(folder / JOB, json.dumps(job))  # last: only a folder with all of this is gone on with
    return {}


def _write_arrays(
    planned: Plan, folder: Path, done: dict[str, dict[str, Any]], told: Callable[[int], Any]
) -> dict[str, dict[str, Any]]:
    arrays = {}
    with open(folder / PROGRESS, "a", encoding="utf-8") as progress:
        for name, part in planned.source.parts.items():
            leaves = flatten_dict(planned.shapes[name], sep="/")
            for rule in part.family.rules(part.config):
                own = {f"{name}/{path}": leaves[path] for path in filled(rule, leaves[rule.ours])}
                if not own.keys() <= done.keys():
                    made = _write_array(part, rule, own, folder, told)
                    progress.writelines(json.dumps({"name": path} | entry) + "\n" for path, entry in made.items())
                    progress.flush()
                    os.fsync(progress.fileno())
                    done |= made
                else:
                    told(sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in own.values()))
                arrays |= {path: done[path] for path in own}
    return arrays


def _write_array(
    part: Part, rule: Rule, own: Mapping[str, jax.ShapeDtypeStruct], folder: Path, told: Callable[[int], Any]
) -> dict[str, dict[str, Any]]:
    """The arrays that a rule fills, a layer at a time; their entries in the manifest by name."""
    stores = []
    for path, leaf in own.items():
        shutil.rmtree(store.place(folder, path), ignore_errors=True)  # the skeleton's, or what an interruption left
        stores.append(store.create(store.place(folder, path), leaf.shape, leaf.dtype, rule.stacked))
    digests = [hashlib.sha256() for _ in own]
    first = next(iter(own.values()))
    for i, name in enumerate(rule.names(first.shape)):
        for array, digest, layer in zip(stores, digests, read_layers(part, rule, name, first.dtype), strict=True):
            try:
                array[i if rule.stacked else ...].write(layer).result()
            except ValueError as error:  # tensorstore's way to say that the disk is full
                raise OSError(errno.ENOSPC, str(error).splitlines()[0][:200]) from error
            digest.update(raw(layer))
            told(layer.nbytes)
    return {path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "sha256": digest.hexdigest()}
            for (path, leaf), digest in zip(own.items(), digests, strict=True)}  # fmt: skip
