"""JAX's compilation cache in the user's own cache folder, for command lines.

What is in it is machine code that JAX runs, so nobody else may be able to write there. A program for a CPU may use what
only that kind of processor can do, so each kind has a folder of its own: home folders are shared between machines.
"""

import hashlib
import os
import platform
import stat
from pathlib import Path

MOST_BYTES = 2**32
"""The oldest programs go when the folder grows beyond this."""


def enable(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Switches the cache on, before the first compilation.

    Args:
      folder: default the user's cache folder (`XDG_CACHE_HOME`, `~/.cache` or what the system has for it).

    Returns:
      The folder in use; None where `JAX_COMPILATION_CACHE_DIR` names one, which JAX then takes by itself.

    Raises:
      OSError: the folder cannot be made, is not the user's own or others can write to it.
    """
    import jax

    if folder is None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        # A program that compiles in less than a second is worth keeping too: the sampler's helpers are many.
        _least_time(jax)
        return None
    place = default_folder() if folder is None else Path(folder)
    private(place)
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    _least_time(jax)
    return place


def _least_time(jax) -> None:
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def programs(place: Path) -> Path:
    """Where `samplers.kept` keeps programs, beside JAX's in the folder that `enable` gave. OSError as `private`."""
    folder = place / "programs"
    private(folder)
    return folder


def default_folder() -> Path:
    """Where programs of this kind of machine are kept."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("wanjax", appauthor=False)) / f"xla-{_processor()}"


def private(folder: Path) -> None:
    """Makes a folder that only its owner can write to, mode 0700.

    Raises:
      OSError: it cannot be made, belongs to somebody else, or others can write to it; one line with the mend.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name != "posix":
        return
    status = os.stat(folder)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(
            f"compilation cache {folder}: others can write to it, and what is in it is run; chmod 700 it, or pass "
            "--no-compile-cache"
        )


def _processor() -> str:
    """A short name for what the processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:  # no such file outside Linux
        features = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
