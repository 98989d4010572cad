"""Flags of XLA that pay on TPUs and on several GPUs, set for command lines before JAX's backends start.

Nothing is set on other machines, and nothing that the user has set. docs/accelerators.md says where each comes from. An
unknown flag ends the process, so every name here was tried with the jaxlib and libtpu that are named there.
"""

import importlib.util
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType

OVERLAP = "xla_tpu_overlap_compute_collective_tc"
"""With the flags of FUSION it has made NaN of just such a model, so they are left out where a user sets it."""
FUSION: Mapping[str, str] = MappingProxyType(
    {
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    }
)
TPU: Mapping[str, str] = MappingProxyType(
    {
        "xla_tpu_enable_async_all_to_all": "true",
        "xla_enable_async_all_gather": "true",
        "xla_enable_async_collective_permute": "true",
        "xla_latency_hiding_scheduler_rerun": "2",
        **FUSION,
    }
)
GPUS: Mapping[str, str] = MappingProxyType({"xla_gpu_enable_latency_hiding_scheduler": "true"})

_GOOGLE = "0x1ae0"
_TPUS = frozenset({"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"})
"""PCI devices from v2 to v7x."""


def settle(
    environment: MutableMapping[str, str] = os.environ, distributed: bool = False, root: Path = Path("/")
) -> str | None:
    """Adds this machine's flags to LIBTPU_INIT_ARGS or XLA_FLAGS, before anything touches a device.

    Args:
      environment: changed.
      distributed: whether there are other hosts, so that one GPU is not alone.
      root: of the file system in which devices are looked for.

    Returns:
      A line that says what was set; None for nothing.
    """
    asked = {name for name in environment.get("JAX_PLATFORMS", "").lower().split(",") if name}
    tpus = frozenset(pci(root)) & _TPUS if not asked or "tpu" in asked else frozenset()
    if tpus and (environment.get("TPU_LIBRARY_PATH") or _installed("libtpu")):
        return add(environment, "LIBTPU_INIT_ARGS", TPU)
    cuda = not asked or asked & {"cuda", "gpu"}
    if cuda and _gpus(environment, root) > (0 if distributed else 1) and _installed("jax_cuda12_plugin",
                                                                                   "jax_cuda13_plugin"):  # fmt: skip
        return add(environment, "XLA_FLAGS", GPUS)
    return None


def add(environment: MutableMapping[str, str], variable: str, flags: Mapping[str, str]) -> str | None:
    """Adds to a variable the flags whose names it does not hold yet."""
    present = environment.get(variable, "")
    given = dict(re.findall(r"--(\w+)(?:=(\S*))?", present))
    if given.get(OVERLAP, "false").lower() in ("true", "1", ""):
        flags = {name: value for name, value in flags.items() if name not in FUSION}
    new = " ".join(f"--{name}={value}" for name, value in flags.items() if name not in given)
    if not new:
        return None
    environment[variable] = f"{present} {new}".strip()
    return f"{variable}: added {new} (docs/accelerators.md)"


def pci(root: Path = Path("/")) -> list[str]:
    """PCI device numbers of Google's devices on this host, one each, such as "0x0063" for a v5e.

    Args:
      root: of the file system in which they are looked for.
    """
    found = []
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        if vendor.read_text().strip() == _GOOGLE:
            found.append(vendor.with_name("device").read_text().strip())
    return found


def _gpus(environment: Mapping[str, str], root: Path) -> int:
    """How many GPUs of NVIDIA this process may see."""
    there = sum(re.fullmatch(r"nvidia\d+", device.name) is not None for device in root.glob("dev/nvidia*"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return there if visible is None else min(there, len([name for name in visible.split(",") if name.strip()]))


def _installed(*packages: str) -> bool:
    return any(importlib.util.find_spec(package) is not None for package in packages)
