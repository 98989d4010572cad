"""How much memory the host gives this process. Imports no JAX."""

from pathlib import Path

LIMITS = ("memory.max", "memory.limit_in_bytes")
"""What the file is called in both versions of control groups."""


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of the host that this process may take: of the machine, its control groups or its limit.

    Args:
      root: of the file system in which control groups are looked for.
    """
    import psutil

    limits = [psutil.virtual_memory().total]
    for folder in _groups(root):
        for name in LIMITS:
            text = (folder / name).read_text().strip() if (folder / name).is_file() else ""
            limits += [int(text)] if text.isdigit() else []
    if hasattr(psutil, "RLIMIT_AS"):
        soft, _ = psutil.Process().rlimit(psutil.RLIMIT_AS)
        limits += [soft] if soft > 0 else []
    return min(limits)


def _groups(root: Path) -> list[Path]:
    """Folders of the control groups that this process is in, of both versions, from its own to the root: each has a
    limit of its own. In a container its own is what the root shows."""
    mounted, own = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    found = [mounted, mounted / "memory", mounted / "unified"]
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):  # of the second version, of the first
            inner = Path(path.lstrip("/"))
            tops = [mounted / "memory"] if kinds else [mounted, mounted / "unified"]
            found += [top / one for top in tops for one in (inner, *inner.parents)]
    return found
