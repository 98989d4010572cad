"""How much memory the host gives this process. Imports no JAX."""

from pathlib import Path


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of the host that this process may take: of the machine, its container or its limit.

    Args:
      root: of the file system in which the container's limit is looked for.
    """
    import psutil

    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of both versions of control groups
        file = root / "sys/fs/cgroup" / name
        text = file.read_text().strip() if file.is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    if hasattr(psutil, "RLIMIT_AS"):
        soft, _ = psutil.Process().rlimit(psutil.RLIMIT_AS)
        limits += [soft] if soft > 0 else []
    return min(limits)
