"""What a figure or a result was made with: versions, device, peak memory, to stand beside it."""

import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

try:
    import resource
except ImportError:  # Windows has no such module, and then no peak memory of the host
    resource = None

PACKAGES = ("wanjax", "jax", "jaxlib", "flax", "numpy", "pillow", "imageio", "av", "tokenizers")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of packages; "not installed" where one is not, such as wanjax in a clone."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def host_peak() -> int | None:
    """Bytes that this process had resident at most, mapped files included; None where the system does not tell."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory() -> dict[str, int]:
    """Bytes: "host", the process, and "device", the first device where it keeps count."""
    import jax  # here: the converter's command line has no need of it

    stats = jax.local_devices()[0].memory_stats() or {}
    peak = {"host": host_peak(), "device": stats.get("peak_bytes_in_use")}
    return {name: int(value) for name, value in peak.items() if value is not None}


def report() -> dict[str, Any]:
    """Peak memory, device and versions, as results carry them."""
    import jax

    devices = jax.devices()
    return {
        "peak_memory_bytes": peak_memory(),
        "device": {"kind": devices[0].device_kind, "count": len(devices), "platform": devices[0].platform},
        "versions": versions(),
    }
