"""Compiled programs kept on disk, so that the next run need not even trace them.

JAX's compilation cache finds a program by its text, which takes seconds of tracing to make. Here it is found by what it
is made of: the function and its configuration, the shapes of its arguments, our source, versions, flags and devices.
Such a key leads to the digest of the text, under which the machine code lies once: where a change of ours leaves a
program as it was, it is traced once and then found again.

To read an entry is to unpickle it and to run what is in it. So the folder must be one of `cache.private`: who can write
there could as well change what JAX's own cache gives. A damaged entry is none.
"""

import functools
import hashlib
import os
import pickle
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import get_ident
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable

import wanjax
from samplers.jit import LEVELS
from wanjax import writing

MOST_BYTES = 2**29
"""The entries used longest ago go when all are larger."""

_DIGEST = hashlib.sha256().digest_size
_ASKED, _HIT = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"
"""What JAX says when its cache is looked into, and when it has the program."""


def compiled(
    program: functools.partial, arguments: tuple, folder: Path | None, turn: AbstractContextManager | None = None
) -> jax.stages.Compiled:
    """A jitted function compiled for arguments, or found; for one device.

    Args:
      program: a jitted function with its static arguments: positional ones first, the others by name.
      arguments: the others, as `jax.ShapeDtypeStruct`s.
      folder: where it is kept, see `cache.private`; None for nowhere.
      turn: held while it is traced, such as a lock: of several threads that trace at once none is done early, and
        meanwhile nothing compiles.

    Returns:
      The function of the arguments alone.
    """
    turn = turn or nullcontext()
    if folder is None or jax.config.jax_default_device is not None:
        return _lower(program, arguments, turn).compile()
    entry = folder / f"{_key(program, arguments)}.key"
    name = _read(entry)
    found = None if name is None else _load(folder / Path(name.decode(errors="replace")).name)
    if found is None:
        lowered = _lower(program, arguments, turn)
        name = f"{_digest(surroundings(), lowered.as_text())}.program"
        found = _load(folder / name)
        if found is None:
            found, whole = _compile(lowered)
            if not whole:
                return found
            _write(folder / name, pickle.dumps(serialize_executable.serialize(found)))
        _write(entry, name.encode())
    return found


def _lower(program: functools.partial, arguments: tuple, turn: AbstractContextManager) -> jax.stages.Lowered:
    with turn:
        return program.func.lower(*program.args, *arguments, **program.keywords)


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
    """The program, and whether it can be written: of one that JAX's cache gave a CPU client has only a part, and one
    that this process had already may have come from there."""
    heard, thread = [], get_ident()

    def listen(event: str, **_: Any) -> None:
        if get_ident() == thread:
            heard.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        found, asked = lowered.compile(), _ASKED in heard or jax.config.jax_compilation_cache_dir is None
        return found, asked and _HIT not in heard
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _key(program: functools.partial, arguments: tuple) -> str:
    """Digest of all that decides what the program is."""
    leaves, tree = jax.tree.flatten(arguments)
    shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
    return _digest(surroundings(), _source(), program.func.__name__, program.args, sorted(program.keywords.items()),
                   tree, shapes)  # fmt: skip


@functools.cache
def surroundings() -> str:
    """What else decides how a text is compiled: versions, flags, devices."""
    versions = sys.version, jax.__version__, jaxlib.__version__, flax.__version__, np.__version__
    flags = {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "LIBTPU_", "TF_"))}
    machine = [one.device_kind for one in jax.devices()], jax.devices()[0].client.platform_version, os.cpu_count()
    return _digest(versions, sorted(jax.config.values.items()), sorted(flags.items()), machine, sorted(LEVELS.items()))


@functools.cache
def _source() -> str:
    """Digest of our own modules."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(wanjax.__file__).parent):
        for file in sorted(package.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def signed(data: bytes) -> bytes:
    """What is written of `data`: its digest, and itself."""
    return hashlib.sha256(data).digest() + data


def _read(file: Path) -> bytes | None:
    """What `_write` wrote; None where there is nothing or it is damaged. Says that it was used."""
    try:
        content = file.read_bytes()
        os.utime(file)
    except (OSError, ValueError):  # the latter of a name that no file can have
        return None
    data = content[_DIGEST:]
    return data if signed(data) == content else None


def _load(file: Path) -> jax.stages.Compiled | None:
    """A kept program; None for one that cannot be used."""
    data = _read(file)
    if data is None:
        return None
    try:
        return serialize_executable.deserialize_and_load(*pickle.loads(data), execution_devices=jax.devices()[:1])
    except Exception:  # of whatever kind: it is compiled anew, and written over
        return None


def _write(file: Path, data: bytes) -> None:
    """Writes an entry, whole or not at all, and makes room for it."""
    try:
        writing.write_bytes(file, signed(data), overwrite=True, anything=True)
        _make_room(file.parent)
    except (OSError, writing.OutputError):  # a full disk, or another run is writing the same: then it is not kept
        return


def _make_room(folder: Path) -> None:
    files = [(file.stat().st_mtime, file.stat().st_size, file) for file in folder.iterdir() if file.is_file()]
    left = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if left <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        left -= size
